"""What holds for every method that ships, beside the contract that its own tests inherit (`mim_framework.testing`)."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from clean_install import ROOT
from PIL import Image

from mim_framework.commands.evaluate import evaluate
from mim_framework.data.sources.digits import DigitsSource
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.installed import BUILTINS
from mim_framework.registry.registry import Registry
from mim_framework.testing import runs as contract

PLUGINS = sorted(info.name for info in Registry().plugins() if info.name != BUILTINS)
QUICKSTARTS = [info.name for info in Registry().recipes() if info.name.endswith("quickstart")]
RECIPES = sorted(name for name in QUICKSTARTS if load_recipe(name, [], Registry()).objective.type != "classify")
"""Of pre-training; a protocol begins where one of these ends."""
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
    if recipe == "quickstart":
        check_that_every_probe_sees_what_was_learned(tmp_path, run_dir)


def check_that_every_probe_sees_what_was_learned(tmp_path: Path, run_dir: Path) -> None:
    """Each evaluation of the trained encoder is above that of the untrained one."""
    write_masks_of_digits(tmp_path / "masks")
    options = [
        "few_shot.n=[5]", "few_shot.draws=3", "linear.steps=500", "linear.rates=[0.02, 0.1, 0.5]",
        "attentive.epochs=15", "attentive.lr=[3.0, 30.0]", "attentive.max_train=1000", "segment.k=10",
        f"segment.masks={tmp_path}/masks", "segment.max_train=200", "segment.max_test=100", "segment.max_patches=5000",
        "segment.steps=300",
    ]  # fmt: skip
    [judged] = evaluate(["few_shot", "linear", "attentive", "segment"], [run_dir], options)
    trained, untrained = judged.numbers["trained"], judged.numbers["untrained"]
    for name in ("linear_top1", "attentive_top1", "segment_linear_miou", "segment_knn_miou"):
        assert trained[name] > untrained[name].high, name
    for name in ("few_shot_knn_top1_n5", "few_shot_logistic_top1_n5"):  # three draws have wide intervals
        assert trained[name] > untrained[name] + 0.1, name


def write_masks_of_digits(folder: Path) -> None:
    """Ink is of the class of its digit, paper of class 10."""
    for split in ("train", "test"):
        source = DigitsSource(DigitsSource.Config(split=split))
        for index in range(len(source)):
            sample = source.read(index)
            path = folder / f"{sample.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.where(sample.data > 100, sample.label, 10).astype(np.uint8)).save(path)
