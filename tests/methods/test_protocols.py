"""What holds for every training protocol that ships: linear probes and fine-tunings of all methods."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.protocols import Classes

from mim_framework.assembly.builder import build_model
from mim_framework.contract.components import Objective
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.yaml import read_yaml
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import runs as contract

PROTOCOLS = sorted(
    info.name
    for info in Registry().recipes()
    if read_yaml(info.path.read_bytes(), info.name).data.get("objective") == "classify"
    and not info.name.endswith("quickstart")
)
TABLES = ("pos_embed", "relative_position_bias_table")
"""Last parts of names of tensors that are resized where images are larger than in pre-training."""
ENCODERS: dict[str, dict[str, Any]] = {
    "beit": {"patch_size": 8, "embed_dim": 32, "num_heads": 2},
    "mae_vit": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "simmim_swin": {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
    "maskfeat_vit": {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "mixmim_swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": [4, 4, 4, 2]},
    "simmim_vit": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
"""Small sizes, to be trained in a test."""
BLOCKS = ["masker.num_hidden=20", "masker.min_num_patches=4"]
BEFORE = {
    "beit_800e": ["views.second_size=64", *BLOCKS],
    "beit_vit_large": ["views.second_size=64", *BLOCKS],
    "beit_v2": ["views.second_size=32", *BLOCKS],
    "beit_v2_1600e": ["views.second_size=32", *BLOCKS],
    "beit_v2_vit_large": ["views.second_size=32", *BLOCKS],
    "maskfeat": ["masker.min_num_patches=1"],
    "maskfeat_vit_large": ["masker.min_num_patches=1"],
    "simmim": ["encoder.window_size=2"],
    "simmim_swin_large": ["encoder.window_size=2"],
    "mae": ["decoder.depth=1"],
    "mae_vit_large": ["decoder.depth=1"],
    "mff": ["decoder.depth=1", "objective.layers=[0, 1]"],
    "mixmim": ["encoder.window_size=[2, 4, 4, 2]"],
}
"""What a pre-training has otherwise: smaller windows, whose tables of biases are resized, less depth, the sizes of a
small tokenizer."""
WITHOUT_TOKENIZER = ["tokenizer=null", "target={type: token_ids, vocab_size: 8192}"]
SMALL = [name for name in PROTOCOLS if load_recipe(name, [], Registry()).encoder.type in ENCODERS]


def pretraining_of(recipe: Recipe) -> str:
    """The recipe that its command begins from; `init` is one of the first lines of the file."""
    [text] = [info.path.read_text() for info in Registry().recipes() if info.name == recipe.name]
    return text.partition("init=runs/")[2].split()[0]


@cache
def objective_of(name: str) -> Objective:
    recipe = load_recipe(name, [], Registry())
    if recipe.tokenizer:
        recipe = load_recipe(name, WITHOUT_TOKENIZER, Registry())
    with torch.device("meta"):
        return build_model(recipe, Registry(), with_weights=False, source=Classes(1000)).objective


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_in_full_size_takes_every_weight_of_the_encoder_of_its_pre_training(name: str):
    recipe = load_recipe(name, [], Registry())
    before, encoder = objective_of(pretraining_of(recipe)).encoder, objective_of(name).encoder
    own = encoder.state_dict()
    given = encoder.adopt(before.state_dict())
    assert given.keys() == own.keys()
    assert not [key for key in own if own[key].shape != given[key].shape and not key.endswith(TABLES)]
    if recipe.published is not None:
        assert recipe.published.recipe == name
        assert recipe.published.pretraining == pretraining_of(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_protocol_trains_from_a_run_of_its_pre_training(name: str, tmp_path: Path):
    recipe = load_recipe(name, [], Registry())
    sizes = [f"encoder.{key}={value}" for key, value in ENCODERS[recipe.encoder.type].items()]
    small = [*contract.SHORT, *sizes, "views.img_size=64", "data.source=digits", "data.workers=0"]
    pretraining = pretraining_of(recipe)
    otherwise = list(BEFORE.get(pretraining, []))
    if tokenizer := load_recipe(pretraining, [], Registry()).tokenizer:
        stage_one = f"{Path(tokenizer).name}_quickstart"
        otherwise.append(f"tokenizer={contract.run(tmp_path, stage_one, *contract.SHORT, *contract.STAGE_ONE)}")
    before = contract.run(tmp_path, pretraining, *small, *otherwise)
    changes = [f"init={before}", "data.eval_source=null", "evaluate=[{type: accuracy, every_epochs: 1}]"]
    after = contract.run(tmp_path, name, *small, *changes, "train.steps=2", "optim.warmup_epochs=0")
    assert [line["accuracy_top1"] for line in read_metrics(after / "metrics.jsonl") if "accuracy_top1" in line]
    old, new = contract.weights_of(before), contract.weights_of(after)
    common = {key for key in old.keys() & new.keys() if key.startswith("encoder.") and not key.endswith(TABLES)}
    assert common
    trained = {key for key in common if not torch.equal(old[key], new[key])}
    assert bool(trained) != ("encoder.*" in recipe.train.frozen)
    assert any(key.endswith("head.weight") for key in new)
