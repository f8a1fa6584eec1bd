"""What a checkpoint holds is enough to go on as if nothing had happened, whatever the optimizer keeps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints import checkpoint, state
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.runtime.optim import Optimizer, OptimSection


def make(kind: str) -> tuple[nn.Module, dict[str, Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    section = OptimSection(type=kind, lr=0.01, weight_decay=0.1)
    return model, {"main": Optimizer("main", section, list(model.named_parameters()), [], total_batch_size=1)}


def train(model: nn.Module, optimizers: dict[str, Optimizer], steps: range) -> None:
    for index in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(index))
        model(x).square().mean().backward()
        for optimizer in optimizers.values():
            optimizer.schedule(Step(index, 6, index / 6, 1.0, torch.arange(1), 0, World()))
            optimizer.step()
        model.zero_grad()


def save(folder: Path, model: nn.Module, optimizers: dict[str, Optimizer]) -> checkpoint.Checkpoint:
    groups = state.gather(model, nn.Module(), optimizers, World())
    return checkpoint.load(checkpoint.save_checkpoint(folder, 3, groups, {"scalars": state.scalars(optimizers)}))


@pytest.mark.parametrize(
    "kind",
    ["adamw", "lamb", "lion", "muon", "adan", "laprop", "lars", "adafactor", "adafactorbv", "novograd"],
)
def test_three_steps_a_checkpoint_and_three_steps_are_six_bit_for_bit(tmp_path, kind):
    straight, optimizers = make(kind)
    train(straight, optimizers, range(6))
    first, half = make(kind)
    train(first, half, range(3))
    saved = save(tmp_path, first, half)

    resumed, optimizers = make(kind)
    state.restore(saved, resumed, nn.Module(), optimizers)
    state.restore_scalars(optimizers, saved.state["scalars"])
    train(resumed, optimizers, range(3, 6))

    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(straight[0].weight, first[0].weight)


def test_the_numbers_of_a_group_are_saved_but_not_what_follows_from_the_recipe(tmp_path):
    model, optimizers = make("lamb")
    train(model, optimizers, range(2))
    numbers = state.scalars(optimizers)
    assert [numbers[f"main|group {group}|step"] for group in (0, 1)] == [2, 2]
    assert not {path.rpartition("|")[2] for path in numbers} & {
        "lr",
        "lr_scale",
        "weight_decay",
        "decay_scale",
        "decay",
        "foreach",
        "fused",
    }


def test_state_that_cannot_be_saved_or_does_not_fit_is_named():
    model, optimizers = make("adamw")
    train(model, optimizers, range(1))
    with pytest.raises(
        CheckpointError, match="optimizer state of '9.weight', which the recipe's optimizer 'main' does not"
    ):
        state.restore_scalars(optimizers, {"main|9.weight|step": 1})
    optimizers["main"].optimizer.state[model[0].weight]["Q"] = [math.pi]
    with pytest.raises(CheckpointError, match="optimizer 'adamw' keeps 'Q' as list, which cannot be saved"):
        state.scalars(optimizers)
