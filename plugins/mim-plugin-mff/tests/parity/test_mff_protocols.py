"""The rates of MFF's protocols against those of the official schedulers (mmengine 0.10.7, by mmpretrain's configs).

There are no golden numbers of its protocols, whose models and probes are those of MAE: see test_mae_protocols.py.
"""

from __future__ import annotations

from math import cos, pi
from typing import Any

import pytest
import torch
from parity.harness import read_json
from parity.protocols import Classes

from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.assembly.preflight import make_step
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

SCHEDULES = read_json("mff_schedule.json")["schedules"]


@pytest.mark.parametrize("official", SCHEDULES, ids=lambda each: str(each["setting"]["start_factor"]))
def test_the_rate_of_every_iteration_is_the_official_one(official: dict[str, Any]):
    """With the linear probe's own shape and warm-up, at the numbers of a setting."""
    setting = official["setting"]
    per_epoch, epochs, peak = setting["iters_per_epoch"], setting["epochs"], setting["lr"]
    changes = {"lr": peak, "warmup_epochs": setting["warmup_epochs"], "min_lr": setting["eta_min"],
               "warmup_lr": setting["start_factor"] * peak}  # fmt: skip
    optim = load_recipe("mff_linear", [f"optim.{key}={value}" for key, value in changes.items()], Registry()).optim
    curve = optim.lr_curve(16384)
    rates = [value_at(curve, epoch_of(index, per_epoch), epochs, per_epoch) for index in range(epochs * per_epoch)]
    assert rates == pytest.approx(official["lr_per_iteration"], rel=1e-12)


def test_the_linear_probe_begins_at_the_official_share_of_its_rate():
    optim = load_recipe("mff_linear", [], Registry()).optim
    assert optim.warmup_lr == pytest.approx(1e-4 * optim.lr)


@pytest.mark.parametrize("index", [4, 5, 30, 50, 99])
def test_layers_of_fine_tuning_share_the_end_and_not_the_peak(index: int):
    """10 epochs of 10 steps, half of one warms up: what mmengine's chain of schedulers gives each group, by hand.

    `CosineAnnealingLR` knows one `eta_min` for all groups; a warm-up from 1e-4 of a group's rate is one from 0 here.
    """
    sizes = {"depth": 3, "embed_dim": 16, "num_heads": 2}
    changes = [*(f"encoder.{key}={value}" for key, value in sizes.items()), "optim.warmup_epochs=0.5"]
    recipe = load_recipe("mff_finetune", [*changes, "train.epochs=10"], Registry())
    with torch.device("meta"):
        objective = build_model(recipe, Registry(), with_weights=False, source=Classes(10)).objective
    [optimizer] = build_optimizers(recipe, objective, 1024).values()
    step = make_step(recipe, torch.arange(2), index=index, epoch=index / 10, epochs=10.0, steps_per_epoch=10)
    optimizer.schedule(step)
    rates = {name: group["lr"] for group in optimizer.optimizer.param_groups for name in group["names"]}
    layers = {"encoder.pos_embed": 0, "encoder.blocks.1.mlp.fc1.weight": 2, "heads.main.decoder.head.weight": 4}
    for name, layer in layers.items():
        peak, end = 2e-3 * 0.65 ** (4 - layer), 1e-6
        wanted = peak if index == 4 else end + (peak - end) * (1 + cos(pi * (index - 5) / 95)) / 2
        assert rates[name] == pytest.approx(wanted, rel=1e-9), name
