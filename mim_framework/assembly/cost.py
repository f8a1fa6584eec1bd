"""What a model costs: parameters, floating-point operations per image, memory; and what the device can do at best."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mim_framework.assembly.builder import Model, build_model, build_optimizers
from mim_framework.assembly.preflight import failures_as_recipe_errors
from mim_framework.base.errors import RecipeError
from mim_framework.base.precision import uses_bfloat16
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry


@dataclass(frozen=True)
class Cost:
    """Parameters by part, and operations per image (2 per multiply-add) of one forward and one training step."""

    parameters: dict[str, int]
    trainable: int
    forward_flops: float
    train_flops: float
    tokens: int
    positions: int

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and the two moments of Adam in float32."""
        return 4 * (sum(self.parameters.values()) + 3 * self.trainable)


def measure_cost(recipe: Recipe, registry: Registry) -> Cost:
    """Counts on the meta device, so that no weight is ever allocated; components that cannot run there run on the CPU.

    Raises:
        RecipeError: if the recipe's parts do not fit, a component fails, or an optimizer cannot be made.
    """
    try:
        with torch.device("meta"):
            model = build_model(recipe, registry, with_weights=False)
        return _count(recipe, model, torch.device("meta"))
    except RecipeError as error:
        if not isinstance(error.__cause__, RuntimeError):  # torch's answer to what needs values
            raise
        return _count(recipe, build_model(recipe, registry, with_weights=False), torch.device("cpu"))


def _count(recipe: Recipe, model: Model, device: torch.device) -> Cost:
    batch_size = 2
    positions = torch.arange(batch_size).to(device)
    engine = model.engine(device, bfloat16=device.type == "cpu" and uses_bfloat16(recipe.train.precision, device))
    step = engine.step(seed=recipe.seed, positions=positions, phase=recipe.phase_names()[0])
    with failures_as_recipe_errors(recipe), FlopCounterMode(display=False) as counter:
        batch = {name: tensor.to(device) for name, tensor in model.example(batch_size).items()}
        loss = sum(engine.forward(step, batch).losses.values())
        forward = counter.get_total_flops()
        loss.backward()
    build_optimizers(recipe, model.objective, recipe.train.total_batch_size)
    parameters = {name: sum(p.numel() for p in child.parameters()) for name, child in model.objective.named_children()}
    if model.teachers.sections:
        parameters["teachers"] = sum(p.numel() for p in model.teachers.parameters())
    encoder = model.specs.encoder
    grids = [encoder.of(view).grid for view in encoder.views]
    positions = 0 if model.objective.encoder is None else sum(grid.num_patches for grid in grids)
    hidden = round(model.specs.masker.num_hidden * positions / model.specs.masker.grid.num_patches)
    return Cost(
        parameters={name: count for name, count in parameters.items() if count},
        trainable=sum(p.numel() for p in model.objective.parameters() if p.requires_grad),
        forward_flops=forward / batch_size,
        train_flops=counter.get_total_flops() / batch_size,
        tokens=positions - hidden if encoder.visible_only else positions,
        positions=positions,
    )


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of the device's best large matrix product in this precision, measured now."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
