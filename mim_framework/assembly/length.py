"""The length of a run in steps, and how its batches are divided."""

from __future__ import annotations

import math

from mim_framework.base.errors import RecipeError
from mim_framework.data.order import BatchLayout
from mim_framework.recipe.recipe import Recipe


def run_length(recipe: Recipe, num_images: int) -> tuple[int, int]:
    """(steps per epoch, total steps). An epoch is floor(images / total_batch_size) steps, at least one."""
    steps_per_epoch = max(1, num_images // recipe.train.total_batch_size)
    if recipe.train.steps is not None:
        return steps_per_epoch, recipe.train.steps
    assert recipe.train.epochs is not None
    return steps_per_epoch, max(1, math.ceil(round(recipe.train.epochs * steps_per_epoch, 6)))


def batch_layout(recipe: Recipe, rank: int, world_size: int) -> BatchLayout:
    """The total batch divided into ranks and micro-batches.

    Raises:
        RecipeError: if it does not divide; the message names a total that does.
    """
    total = recipe.train.total_batch_size
    unit = (recipe.train.batch_size or max(1, total // world_size)) * world_size
    if total % unit:
        near = max(1, round(total / unit)) * unit
        micro = f"train.batch_size {recipe.train.batch_size} x " if recipe.train.batch_size else ""
        raise RecipeError(
            f"{recipe.location('train.total_batch_size')}: {total} images do not divide into {micro}{world_size} "
            f"ranks; use {near}, for example"
        )
    return BatchLayout(total, unit // world_size, rank, world_size)
