"""Packages whose names are imported when they are first used, so that importing the package itself is cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def module_of_names(home: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Module -> its names, turned around: name -> its module."""
    return {name: module for module, names in home.items() for name in names}


def on_demand(package: str, module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562), whose names lie in modules relative to it."""

    def find(name: str) -> Any:
        if name in module_of:
            return getattr(import_module(f"{package}.{module_of[name]}"), name)
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return find
