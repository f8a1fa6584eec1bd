"""Plugins of the house and guests use what is public, and nothing else of the framework."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

PUBLIC = ("mim_framework", "mim_framework.nn", "mim_framework.layouts", "mim_framework.testing")
ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("plugins/*/src/**/*.py"), *ROOT.glob("tests/*/mim-plugin-*/src/**/*.py")])


def unpublic_imports(source: str) -> list[str]:
    """The names that a module imports from the framework and that are not public, with the lines where."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.startswith("mim_framework")]
            found += [f"line {node.lineno}: {name}" for name in names if name not in PUBLIC]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mim_framework"):
            public = import_module(node.module).__all__ if node.module in PUBLIC else ()
            names = [each.name for each in node.names if each.name not in public]
            found += [f"line {node.lineno}: {node.module}.{name}" for name in names]
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name + "." + source.stem)
def test_a_plugin_imports_public_names_only(source: Path):
    assert unpublic_imports(source.read_text()) == []


def test_imports_of_what_is_not_public_are_found():
    source = """\
import mim_framework
import mim_framework.runtime.optim
from mim_framework import Mask, Optimizer
from mim_framework.nn import Block
from mim_framework.nn.blocks import Block
"""
    assert unpublic_imports(source) == [
        "line 2: mim_framework.runtime.optim",
        "line 3: mim_framework.Optimizer",
        "line 5: mim_framework.nn.blocks.Block",
    ]


def test_the_seven_plugins_and_the_five_guests_are_looked_at():
    assert {source.relative_to(ROOT).as_posix().split("/src/")[1].split("/")[0] for source in SOURCES} == {
        f"mim_plugin_{name}"
        for name in (
            "beit", "beitv2", "mae", "maskfeat", "mff", "mixmim", "simmim",
            "guest_adios", "guest_ibot", "guest_multimodal", "guest_pointmae", "guest_video",
        )
    }  # fmt: skip
