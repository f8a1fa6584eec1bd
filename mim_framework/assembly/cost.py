"""What a model costs: parameters, floating-point operations per image, memory; and what the device can do at best."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mim_framework.assembly.builder import Model, build_model, build_optimizers
from mim_framework.assembly.preflight import failures_as_recipe_errors
from mim_framework.base.errors import RecipeError
from mim_framework.base.precision import uses_bfloat16
from mim_framework.contract.components import Source
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

MAX_MODULES = 4_000
"""Several times the largest published model; a step of more is not counted in seconds."""
BYTES_PER_VALUE = 40
"""What drawing a made-up view needs at its peak: random bits in int64, several times."""


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


def measure_cost(recipe: Recipe, registry: Registry, *, source: Source | None = None) -> Cost:
    """Counts on the meta device, so that no weight is ever allocated; components that cannot run there run on the CPU.

    Args:
        source: the recipe's, if it is open already.

    Raises:
        RecipeError: if the recipe's parts do not fit, a component fails, or an optimizer cannot be made.
    """
    with _unless_values_are_needed():
        return _count(recipe, _of_sane_size(recipe, registry, source), torch.device("meta"))
    return _count(recipe, build_model(recipe, registry, with_weights=False, source=source), torch.device("cpu"))


def compare_weights(recipe: Recipe, registry: Registry, *, source: Source | None = None) -> Model:
    """The model after the files of the recipe's weights were read and compared with it; none of them is loaded.

    Raises:
        CheckpointError: if a file cannot be read, does not fit, or fills hardly anything.
    """
    with suppress(RuntimeError), _unless_values_are_needed(), torch.device("meta"):  # as where tables are resized
        return build_model(recipe, registry, with_weights=False, compare_weights=True, source=source)
    return build_model(recipe, registry, with_weights=False, compare_weights=True, source=source)


def refuse_too_large_recipe(recipe: Recipe, registry: Registry, source: Source) -> None:
    """Build on the meta device and look at the size, where the components can be built there.

    Raises:
        RecipeError: as of `refuse_too_large`, or if the recipe's parts do not fit.
    """
    with _unless_values_are_needed():
        _of_sane_size(recipe, registry, source)


@contextmanager
def _unless_values_are_needed() -> Iterator[None]:
    """Go on behind it where components need values, which the meta device has not."""
    try:
        yield
    except RecipeError as error:
        if not isinstance(error.__cause__, RuntimeError):  # torch's answer to what needs values
            raise


def _of_sane_size(recipe: Recipe, registry: Registry, source: Source | None) -> Model:
    """The model on the meta device.

    Raises:
        RecipeError: as of `refuse_too_large`, or if the recipe's parts do not fit.
    """
    with torch.device("meta"):
        model = build_model(recipe, registry, with_weights=False, source=source)
    refuse_too_large(model)
    return model


def refuse_too_large(model: Model) -> None:
    """Every rank holds the whole weights before they are sharded, so that they must fit into its machine.

    Raises:
        RecipeError: naming the memory that the weights would need, the tokens or the modules.
    """
    objective, recipe = model.objective, model.recipe
    weights = 4 * sum(each.numel() for part in (objective, model.teachers) for each in part.parameters())
    weights += 4 * sum(each.numel() for part in (objective, model.teachers) for each in part.buffers())
    views = BYTES_PER_VALUE * 2 * sum(math.prod(spec.shape) for spec in model.specs.views.values())
    there = machine_memory()
    for what, needed in (("this model's weights", weights), ("a batch of two made-up images", views)):
        if there is not None and needed > there:
            sizes = f"{needed / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f} GiB"
            raise RecipeError(f"{recipe.location('')}: {what} would need {sizes}; is there a digit too many?")
    if (num_modules := sum(1 for _ in objective.modules())) > MAX_MODULES:
        raise RecipeError(f"{recipe.location('')}: {num_modules:,} modules, at most {MAX_MODULES:,} are allowed")


def machine_memory() -> int | None:
    """Bytes of memory of this machine; None where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _count(recipe: Recipe, model: Model, device: torch.device) -> Cost:
    batch_size = 2
    positions = torch.arange(batch_size).to(device)
    engine = model.engine(device, bfloat16=device.type == "cpu" and uses_bfloat16(recipe.train.precision, device))
    step = engine.step(seed=recipe.seed, positions=positions, phase=recipe.phase_names()[0])
    with failures_as_recipe_errors(recipe), FlopCounterMode(display=False) as counter:
        with device:
            batch = model.example(batch_size)
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
