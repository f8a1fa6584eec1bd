"""Help for tests of plugins: the contract that every plugin keeps, several ranks at once, extra components.

Importing it leaves torch one thread, since ranks are forked. Start at `PluginContract`.
"""

from __future__ import annotations

from mim_framework.testing.contract import ComponentContract, PluginContract, RecipeContract
from mim_framework.testing.ranks import run_ranks
from mim_framework.testing.registry import RegistryWith

__all__ = ["ComponentContract", "PluginContract", "RecipeContract", "RegistryWith", "run_ranks"]
