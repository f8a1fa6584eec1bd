"""Guests: packages of other people's kind. Each is built as a wheel, installed and trained, by public names only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clean_install import build_wheels, call

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def install_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Builds and installs `tests/guests/NAME` for the tests of a module; returns the folder it is installed in.

    Of other plugins only MAE's is used, since one of ours may offer the same method under the same names.
    """
    site = tmp_path_factory.mktemp("site")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(site)

    def install(name: str) -> Path:
        patch.setenv("MIM_LOAD_PLUGINS", f"{name},mim-plugin-mae")
        wheels = build_wheels(tmp_path_factory.mktemp("wheels"), [HERE / name])
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site]
        call(*pip, *wheels.values(), cwd=site)
        importlib.invalidate_caches()
        return site

    yield install
    patch.undo()
    for module in [each for each, found in sys.modules.items() if str(site) in str(getattr(found, "__file__", ""))]:
        del sys.modules[module]
