"""What is allowed but hardly meant: said by `mim check` and at the start of a run. Start at `doubts`."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mim_framework.assembly.cost import Cost, measure_cost
from mim_framework.assembly.length import run_length
from mim_framework.base.errors import MimError
from mim_framework.base.precision import cpu_has_bfloat16
from mim_framework.contract.components import Source
from mim_framework.recipe.evaluations import type_of
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.rules import DEFAULT_OBJECTIVE
from mim_framework.recipe.yaml import read_yaml
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import OptimSection

CPU_FLOPS = 20e9
"""Operations per second that one thread of a processor makes of a training step in float32, as a rule."""
LONG_EPOCH_HOURS = 1.0
"""An epoch on a processor that takes longer is doubted."""
NUM_HEADERS = 16
"""Images of a local source whose size is looked at."""
RATE_FACTOR = 10.0
"""A learning rate so far above or below those of the shipped recipes is doubted."""
BATCH_FACTOR = 8.0
"""Only recipes whose batch is not so many times larger or smaller are compared, where there are any."""


def doubts(
    recipe: Recipe, registry: Registry, source: Source, device: torch.device, *, cost: Cost | None = None
) -> list[str]:
    """One sentence each, with the key and what would be usual.

    Args:
        cost: of the recipe's model, if it is known already.
    """
    steps_per_epoch, total_steps = run_length(recipe, len(source))
    return [
        *recipe.doubts(recipe.train.epochs or total_steps / steps_per_epoch),
        *_passes(recipe, len(source)),
        *_small_images(recipe, source),
        *_precision(recipe, device),
        *_long_epochs(recipe, registry, source, device, cost),
        *_rates(recipe, registry),
    ]


def _passes(recipe: Recipe, num_images: int) -> Iterator[str]:
    total = recipe.train.total_batch_size
    if total > num_images:
        yield (
            f"train.total_batch_size {total} is more than the {num_images} images of data.source: every step, which "
            f"counts as an epoch, sees them {total / num_images:.1f} times; use at most {num_images}"
        )


def _small_images(recipe: Recipe, source: Source) -> Iterator[str]:
    """From the headers of a few images; of a source behind a network none is read."""
    wanted = recipe.views.options.get("img_size")
    sides = [wanted] if isinstance(wanted, int) else wanted if isinstance(wanted, list | tuple) else []
    if source.remote or not sides or not all(isinstance(side, int) for side in sides):
        return
    every = max(1, len(source) // NUM_HEADERS)
    sizes = [size for index in range(0, len(source), every) if (size := _size(source, index)) is not None][:NUM_HEADERS]
    small = [size for size in sizes if min(size) < min(sides)]
    if len(small) * 2 > len(sizes):
        width, height = min(small, key=min)
        yield (
            f"views.img_size {wanted} is larger than {len(small)} of {len(sizes)} images looked at, the smallest "
            f"{width}x{height} pixels: their crops are enlarged"
        )


def _size(source: Source, index: int) -> tuple[int, int] | None:
    """Width and height of an encoded image that Pillow knows; None of any other."""
    from PIL import Image

    try:
        data = source.read(index).data
        if not isinstance(data, bytes):
            return None
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:  # a broken image is told when it is met
        return None


def _precision(recipe: Recipe, device: torch.device) -> Iterator[str]:
    if recipe.train.precision == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        yield (
            "train.precision bfloat16 is emulated by this processor, which is about ten times slower; use "
            "train.precision=float32"
        )
    if recipe.train.precision == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        yield "train.precision bfloat16 is emulated by this GPU; use train.precision=float32"


def _long_epochs(
    recipe: Recipe, registry: Registry, source: Source, device: torch.device, cost: Cost | None
) -> Iterator[str]:
    if device.type != "cpu":
        return
    per_second, num_images = CPU_FLOPS * torch.get_num_threads(), len(source)
    if cost is None:
        if num_images < 2_000:  # no model of this field needs an hour for them
            return
        cost = measure_cost(recipe, registry, source=source)
    hours = cost.train_flops * num_images / per_second / 3600
    if hours > LONG_EPOCH_HOURS:
        yield (
            f"an epoch on this processor takes about {hours:,.0f} hours: {num_images:,} images of "
            f"{cost.train_flops / 1e9:.1f} GFLOP each, at {per_second / 1e9:.0f} GFLOP a second of "
            f"{torch.get_num_threads()} threads; use a GPU, a smaller encoder or fewer images"
        )


def _rates(recipe: Recipe, registry: Registry) -> Iterator[str]:
    """Rates for 256 images against those of the shipped recipes of the same encoder, objective and optimizer."""
    total = recipe.train.total_batch_size
    for name, section in recipe.named_optimizers().items():
        rate = section.peak_lr(total) * 256 / total
        shipped = list(_shipped_rates(recipe, section.type, registry))
        alike = [each for each in shipped if total / BATCH_FACTOR <= each[1] <= total * BATCH_FACTOR]
        known = {recipe_name: its for recipe_name, _, its in alike or shipped}
        if not known or not rate:
            continue
        least, most = min(known.values()), max(known.values())
        if least / RATE_FACTOR <= rate <= most * RATE_FACTOR:
            continue
        far = f"{rate / most:.3g} times the highest" if rate > most else f"{least / rate:.3g} times below the lowest"
        span = f"{least:.2g}" if least == most else f"{least:.2g} to {most:.2g}"
        yield (
            f"the learning rate of optimizer '{name}' is {rate:.3g} for 256 images, {far} of the shipped recipes of "
            f"encoder '{recipe.encoder.type}' with {section.type} ({', '.join(sorted(known)[:3])}: {span})"
        )


def _shipped_rates(recipe: Recipe, optimizer: str, registry: Registry) -> Iterator[tuple[str, int, float]]:
    """Name, total batch and rate for 256 images."""
    own = recipe.encoder.type, recipe.objective.type
    for info in registry.recipes():
        try:
            data = _data_of(info.path)
            if (type_of(data["encoder"]), type_of(data.get("objective", DEFAULT_OBJECTIVE))) != own:
                continue
            section = OptimSection.model_validate(data["optim"])
            total = data["train"]["total_batch_size"]
        except (OSError, MimError, ValueError, LookupError, TypeError):
            continue  # a recipe of several optimizers, or one that cannot be read
        if section.type == optimizer:
            yield info.name, total, section.peak_lr(total) * 256 / total


@functools.cache
def _data_of(path: Path) -> Any:
    """A shipped recipe, which does not change while this process lives."""
    return read_yaml(path.read_bytes(), str(path)).data
