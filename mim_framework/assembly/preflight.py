"""One made-up batch through a model, before any data is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mim_framework.assembly.builder import Model
from mim_framework.assembly.weights import some
from mim_framework.base.errors import MimError, RecipeError
from mim_framework.contract.records import Outcome, common_count
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.recipe.recipe import Recipe


def make_step(recipe: Recipe, positions: torch.Tensor, **changes: Any) -> Step:
    """A step outside of training, for preflights, evaluation and tests."""
    values: dict[str, Any] = {
        "index": 0, "total": 1, "epoch": 0.0, "epochs": 1.0,
        "positions": positions, "seed": recipe.seed, "world": World(),
    }  # fmt: skip
    return Step(**{**values, **changes})


@contextmanager
def failures_as_recipe_errors(recipe: Recipe) -> Iterator[None]:
    """Whatever a component raises on a made-up batch, as a RecipeError with that error for its cause."""
    try:
        yield
    except MimError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise RecipeError(f"{recipe.location('')}: the model fails on a made-up batch: {what}") from error


def preflight(model: Model, device: torch.device, *, bfloat16: bool = False) -> dict[str, float]:
    """One made-up batch of two images through forward and backward, in the precision of the run; returns its losses.

    It leaves no gradient behind, and the buffers as they were: running statistics are not for made-up images.

    Raises:
        RecipeError: if a component fails, a mask breaks its promise, or a trainable parameter gets no gradient.
    """
    objective, recipe = model.objective, model.recipe
    engine = model.engine(device, bfloat16=bfloat16)
    positions = torch.arange(2, device=device)
    batch = {name: tensor.to(device) for name, tensor in model.example(2).items()}
    got_gradient: set[str] = set()
    outcome = Outcome({})
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        for phase in recipe.phase_names():
            step = engine.step(seed=recipe.seed, positions=positions, phase=phase)
            with failures_as_recipe_errors(recipe):
                if objective.masker is not None:
                    for mask in objective.masker(step, engine.begin(step, batch)).masks.values():
                        mask.validate()
                outcome = engine.forward(step, batch)
                if recipe.train.average == "over_positions":
                    common_count(outcome)
                sum(outcome.losses.values(), start=torch.zeros((), device=device)).backward()
            got_gradient |= {name for name, p in objective.named_parameters() if p.grad is not None}
            objective.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            buffer.copy_(buffers[name])
    idle = [name for name, p in objective.named_parameters() if p.requires_grad and name not in got_gradient]
    if idle:
        raise RecipeError(
            f"{recipe.location('')}: trainable parameters that no loss reaches: {some(idle)}. They would stop "
            "distributed training; create them only if the recipe uses them, or set requires_grad=False"
        )
    return {name: loss.item() for name, loss in outcome.losses.items()}
