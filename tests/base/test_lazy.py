"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mim_framework
from mim_framework import layouts, nn


@pytest.mark.parametrize("package", [mim_framework, nn, layouts], ids=lambda package: package.__name__)
def test_every_public_name_can_be_imported_and_others_are_refused_by_name(package):
    assert [name for name in package.__all__ if getattr(package, name, None) is None] == []
    assert set(package.__all__) == set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'gone'"):
        _ = package.gone


def test_packages_of_public_names_are_imported_without_torch():
    code = "import sys, mim_framework.nn, mim_framework.layouts; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
