"""One made-up batch through a model, before any data is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mim_framework.assembly.builder import Model
from mim_framework.assembly.weights import some
from mim_framework.base.errors import MimError, RecipeError
from mim_framework.contract.components import Masker
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


def preflight(model: Model, device: torch.device) -> dict[str, float]:
    """One made-up batch of two images through forward and backward; returns its losses.

    It leaves no gradient behind, and the buffers as they were: running statistics are not for made-up images.

    Raises:
        RecipeError: if a component fails, a mask breaks its promise, or a trainable parameter gets no gradient.
    """
    objective, recipe = model.objective, model.recipe
    positions = torch.arange(2, device=device)
    batch = {name: tensor.to(device) for name, tensor in model.views.example(2).items()}
    got_gradient: set[str] = set()
    losses: dict[str, torch.Tensor] = {}
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        for phase in recipe.phase_names():
            step = make_step(recipe, positions, phase=phase, teachers=model.teachers.session())
            with failures_as_recipe_errors(recipe):
                views = model.views.prepare(step, batch)
                for component in objective.components():
                    component.begin_step(step)
                masker = getattr(objective, "masker", None)
                if isinstance(masker, Masker):  # an objective of its own may call anything so
                    for mask in masker(step, views).masks.values():
                        mask.validate()
                losses = objective(step, views)
                sum(losses.values(), start=torch.zeros((), device=device)).backward()
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
    return {name: loss.item() for name, loss in losses.items()}
