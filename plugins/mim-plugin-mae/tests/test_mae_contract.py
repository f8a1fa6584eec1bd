"""What every plugin promises, of this one."""

from __future__ import annotations

import pytest

from mim_framework.testing import ComponentContract, RecipeContract


class TestComponents(ComponentContract):
    plugin = "mae"


@pytest.mark.slow
class TestRecipes(RecipeContract):
    plugin = "mae"
    recipes = ("quickstart",)


@pytest.mark.slow
class TestFineTuning(RecipeContract):
    plugin = "mae"
    recipes = ("mae_finetune_quickstart",)


@pytest.mark.slow
class TestLinearProbe(RecipeContract):
    plugin = "mae"
    recipes = ("mae_linear_quickstart",)
    own_statistics = True
