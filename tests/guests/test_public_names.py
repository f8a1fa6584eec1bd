"""Guests use what is public, and nothing else of the framework."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mim_framework

SOURCES = sorted(Path(__file__).parent.glob("mim-plugin-*/src/**/*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name + "." + source.stem)
def test_a_guest_imports_public_names_only(source: Path):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            assert not [each.name for each in node.names if each.name.startswith("mim_framework")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mim_framework"):
            assert node.module == "mim_framework", f"line {node.lineno}"
            assert {each.name for each in node.names} <= set(mim_framework.__all__), f"line {node.lineno}"


def test_there_are_three_guests():
    assert {source.parents[2].name for source in SOURCES} == {
        "mim-plugin-guest-adios", "mim-plugin-guest-ibot", "mim-plugin-guest-pointmae",
    }  # fmt: skip
