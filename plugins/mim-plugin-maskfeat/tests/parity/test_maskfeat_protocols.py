"""The recipes of MaskFeat's protocols against facts of the official code (SlowFast, 287ec007).

There are no golden numbers of its fine-tuning, only the rate of every iteration, and rate and decay of every parameter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.harness import read_json
from parity.protocols import Classes

from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.contract.components import Objective
from mim_framework.contract.records import Latent
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

FACTS = read_json("maskfeat_schedule.json")
FINE_TUNINGS = ("maskfeat_finetune", "maskfeat_finetune_vit_large")


def small(name: str, *changes: str, depth: int = 2) -> tuple[Recipe, Objective]:
    sizes = {"embed_dim": 16, "num_heads": 2, "depth": depth}
    recipe = load_recipe(name, [*(f"encoder.{key}={value}" for key, value in sizes.items()), *changes], Registry())
    return recipe, build_model(recipe, Registry(), with_weights=False, source=Classes(10)).objective


@pytest.mark.parametrize("name", FINE_TUNINGS)
@pytest.mark.parametrize("official", FACTS["schedules"], ids=lambda each: str(each["setting"]["warmup_start_lr"]))
def test_the_rate_of_every_iteration_is_the_official_one(name: str, official: dict[str, Any]):
    """With a recipe's own shape and kind of warm-up, at the numbers of a setting."""
    setting = official["setting"]
    per_epoch, epochs = setting["iters_per_epoch"], setting["epochs"]
    changes = {"base_lr": setting["base_lr"], "lr_per_images": 256, "warmup_epochs": setting["warmup_epochs"],
               "warmup_lr": setting["warmup_start_lr"], "min_lr": setting["cosine_end_lr"]}  # fmt: skip
    optim = load_recipe(name, [f"optim.{key}={value}" for key, value in changes.items()], Registry()).optim
    curve = optim.lr_curve(256)
    rates = [value_at(curve, epoch_of(index, per_epoch), epochs, per_epoch) for index in range(epochs * per_epoch)]
    assert rates == pytest.approx(official["lr_per_iteration"], rel=1e-12)


def our_name(official: str) -> str:
    """The norm follows the pooling, the head is `head.projection`."""
    if official.startswith("norm."):
        return f"heads.main.decoder.fc_{official}"
    return f"heads.main.decoder.{official}".replace("projection.", "") if "head." in official else f"encoder.{official}"


@pytest.mark.parametrize("official", FACTS["finetune_layer_decay"]["cases"], ids=lambda each: str(each["layer_decay"]))
@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_layer_and_decay_of_every_parameter_are_the_official_ones(name: str, official: dict[str, Any]):
    """Class token and positions decay, as officially."""
    recipe, objective = small(name, f"optim.layer_decay={official['layer_decay']}", depth=official["depth"])
    [optimizer] = build_optimizers(recipe, objective, 512).values()
    ours = {name: (group["lr_scale"], recipe.optim.weight_decay * group["decay_scale"])
            for group in optimizer.optimizer.param_groups for name in group["names"]}  # fmt: skip
    wanted = {our_name(key): (each["layer_decay"], each["weight_decay"]) for key, each in official["keys"].items()}
    assert ours.keys() == wanted.keys()
    assert {name: ours[name][1] for name in ours} == {name: wanted[name][1] for name in ours}
    assert {n: ours[n][0] for n in ours} == pytest.approx({n: wanted[n][0] for n in ours}, rel=1e-12)


def test_the_norm_of_the_linear_probe_may_have_any_factors_and_biases():
    """Pre-training has its norm in the head; the batch norm takes out what that had learned."""
    _, objective = small("maskfeat_linear")
    decoder = objective.train().heads["main"].decoder
    assert {name for name, p in objective.named_parameters() if p.requires_grad} == {
        "heads.main.decoder.head.weight", "heads.main.decoder.head.bias",
    }  # fmt: skip
    sequence = torch.randn(32, 197, 16, generator=torch.Generator().manual_seed(0))
    latent = Latent(sequence[:, 1:], objective.encoder.spec.grid, prefix=sequence[:, :1], layers={1: sequence})
    before = decoder.batch_norm(decoder.pooled(latent))
    with torch.no_grad():
        decoder.fc_norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
        decoder.fc_norm.bias.normal_(generator=torch.Generator().manual_seed(2))
    assert torch.allclose(decoder.batch_norm(decoder.pooled(latent)), before, atol=1e-4)
    decoder.fc_norm = torch.nn.Identity()
    assert not torch.allclose(decoder.batch_norm(decoder.pooled(latent)), before, atol=1e-2)
