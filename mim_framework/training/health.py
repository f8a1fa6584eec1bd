"""What the report of health must know of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from mim_framework.evaluate.health.report import Training
from mim_framework.recipe.recipe import Recipe


def training_of(recipe: Recipe, notes: Sequence[str] = ()) -> Training:
    """What its metrics do not say of a run.

    Args:
        notes: what its user was told at the start.
    """
    types = [section.type for section in recipe.named_optimizers().values()]
    return Training(
        adam=all("adam" in name for name in types),
        moving=any(section.copy_of for section in recipe.named_teachers().values()),
        notes=tuple(notes),
    )
