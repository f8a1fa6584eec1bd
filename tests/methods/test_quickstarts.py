"""What holds for every method that ships, beside the contract that its own tests inherit (`mim_framework.testing`)."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from clean_install import ROOT

from mim_framework.commands.evaluate import evaluate
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.installed import BUILTINS
from mim_framework.registry.registry import Registry
from mim_framework.testing import runs as contract

PLUGINS = sorted(info.name for info in Registry().plugins() if info.name != BUILTINS)
RECIPES = sorted(info.name for info in Registry().recipes() if info.name.endswith("quickstart"))
LATE = {
    "maskfeat_quickstart", "simmim_quickstart", "simmim_vit_quickstart", "beit_quickstart", "beit_v2_quickstart",
    "beit_dvae_quickstart", "beit_v2_vqkd_quickstart",
}  # fmt: skip
"""A sixth of the recipe is not enough for their features to pass those of the untrained encoder: only the loss is
looked at, after a twentieth."""


@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_method_has_a_small_recipe_and_keeps_the_contract(plugin: str):
    assert contract.small_recipes(plugin)
    tests = ROOT / "plugins" / f"mim-plugin-{plugin}" / "tests" / f"test_{plugin}_contract.py"
    text = tests.read_text()
    assert f'class TestComponents(ComponentContract):\n    plugin = "{plugin}"' in text
    assert f'class TestRecipes(RecipeContract):\n    plugin = "{plugin}"' in text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_few_epochs_on_digits_lower_the_loss_and_soon_beat_the_untrained_encoder(tmp_path: Path, recipe: str):
    """A sixth of the recipe's own length; what the whole of it brings is in the README of its plugin."""
    loaded = load_recipe(recipe, [], Registry())
    epochs = loaded.train.epochs / (20 if recipe in LATE else 6)
    options = [*contract.SHORT, "train.steps=null", f"train.epochs={epochs}", "train.total_batch_size=64"]
    if loaded.tokenizer:
        stage_one = Path(loaded.tokenizer).name
        options.append(f"tokenizer={contract.run(tmp_path, stage_one, *contract.SHORT, *contract.STAGE_ONE)}")
    run_dir = contract.run(tmp_path, recipe, *options)
    losses = contract.losses_of(run_dir)
    assert fmean(losses[-5:]) < 0.95 * fmean(losses[:5])
    if recipe not in LATE:
        [judged] = evaluate(["knn"], [run_dir])
        assert judged.numbers["trained"]["knn_top1"] > judged.numbers["untrained"]["knn_top1"] + 0.03
