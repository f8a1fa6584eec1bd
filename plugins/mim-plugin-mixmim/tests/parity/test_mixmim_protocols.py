"""The recipes of MixMIM's protocols against facts of the official code (Sense-X/MixMIM, 2b2f5a9a).

There are no golden numbers of its fine-tuning, only which rate and decay every parameter has; pooled features are
compared with those of the pre-training.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mim_plugin_mixmim.checkpoints import OfficialCheckpoint
from parity.harness import read_json
from parity.protocols import Classes

from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.contract.components import Objective
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

LAYERS = read_json("mixmim_layer_decay.json")["cases"]
SMALL = {"embed_dim": 8, "num_heads": [1, 2, 4, 8], "window_size": [2, 2, 2, 1]}


def fine_tuning(*changes: str, classes: int = 10) -> tuple[Recipe, Objective]:
    recipe = load_recipe("mixmim_finetune", list(changes), Registry())
    with torch.device("meta"):
        return recipe, build_model(recipe, Registry(), with_weights=False, source=Classes(classes)).objective


def rules(official: dict[str, Any], head: float) -> dict[str, tuple[float, float]]:
    """(factor on the rate, weight decay) of every parameter that trains."""
    sizes = {**SMALL, "depths": official["depths"]}
    recipe, objective = fine_tuning(
        *(f"encoder.{key}={value}" for key, value in sizes.items()),
        f"optim.layer_decay={official['layer_decay']}",
        f"optim.multipliers.0.lr={head}",
    )
    [optimizer] = build_optimizers(recipe, objective, 1024).values()
    return {
        name: (group["lr_scale"], recipe.optim.weight_decay * group["decay_scale"])
        for group in optimizer.optimizer.param_groups
        for name in group["names"]
    }


def wanted(official: dict[str, Any]) -> dict[str, tuple[float, float]]:
    rest = {name: key for name, key in official["keys"].items() if not name.startswith("head.")}
    ours = OfficialCheckpoint().import_state(rest)
    ours |= {f"heads.main.decoder.{name}": key for name, key in official["keys"].items() if name.startswith("head.")}
    return {name: (key["lr_scale"], key["weight_decay"]) for name, key in ours.items()}


@pytest.mark.parametrize("official", LAYERS, ids=lambda case: str(case["layer_decay"]))
def test_layer_and_decay_of_every_parameter_are_the_official_ones(official: dict[str, Any]):
    ours, theirs = rules(official, official["layer_decay"]), wanted(official)
    assert ours.keys() == theirs.keys()
    assert {name: ours[name][1] for name in ours} == {name: theirs[name][1] for name in ours}
    assert {n: ours[n][0] for n in ours} == pytest.approx({n: theirs[n][0] for n in ours}, rel=1e-12)


@pytest.mark.parametrize("official", LAYERS[:1], ids=lambda case: str(case["layer_decay"]))
def test_a_head_of_the_full_rate_would_be_found(official: dict[str, Any]):
    ours, theirs = rules(official, 1.0), wanted(official)
    assert {name for name in ours if ours[name] != pytest.approx(theirs[name], rel=1e-12)} == {
        "heads.main.decoder.head.weight", "heads.main.decoder.head.bias",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mixmim_finetune", "mixmim_finetune_large"])
def test_the_head_is_slowed_by_the_factor_of_a_layer(name: str):
    optim = load_recipe(name, [], Registry()).optim
    [multiplier] = optim.multipliers
    assert (multiplier.parameters, multiplier.lr) == (("heads.*",), optim.layer_decay)


def test_the_rate_of_every_iteration_is_that_of_mae():
    """util/lr_sched.py, base rate, batch and length are the same."""
    official = read_json("eval-schedules.json")["schedules"]["mae_finetune_base"]
    recipe = load_recipe("mixmim_finetune", [], Registry())
    curve, per_epoch = recipe.optim.lr_curve(recipe.train.total_batch_size), official["iters_per_epoch"]
    epochs = [epoch_of(index, per_epoch) for index in range(official["epochs"] * per_epoch)]
    assert recipe.train.epochs == official["epochs"]
    assert [value_at(curve, epoch, official["epochs"]) for epoch in epochs] == official["lr_per_iteration"]


def test_the_base_model_has_the_published_size():
    """88 million parameters with 1000 classes (README); positions are fixed."""
    _, objective = fine_tuning(classes=1000)
    trained = {name: p.numel() for name, p in objective.named_parameters() if p.requires_grad}
    assert round(sum(trained.values()) / 1e6) == 88
    assert not [name for name in trained if "pos_embed" in name]
