"""What every plugin promises, of this one."""

from __future__ import annotations

import pytest

from mim_framework.testing import ComponentContract, RecipeContract


class TestComponents(ComponentContract):
    plugin = "maskfeat"


@pytest.mark.slow
class TestRecipes(RecipeContract):
    plugin = "maskfeat"
