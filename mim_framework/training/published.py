"""A line at the end of a run: the paper's number, its own, and what it did differently. Start at `comparison`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mim_framework.base.errors import MimError
from mim_framework.recipe.draft import load_recipe, load_written
from mim_framework.recipe.recipe import PublishedSection, Recipe
from mim_framework.registry.registry import Registry

NOT_COMPARED = (
    "name", "description", "seed", "output_dir", "init", "data.", "train.batch_size", "train.device", "train.precision",
    "train.distributed", "train.compile", "train.max_nonfinite_steps", "train.on_", "train.step_timeout",
    "train.max_rewinds", "checkpoint", "log", "evaluate", "published", "views.decoder", "views.scaled_decode",
    "views.max_pixels", "views.value_range", "views.alpha",
)  # fmt: skip
"""Keys that say where and how a run is made rather than what is learned; the number of its images is told apart."""
SHORT = {"train.total_batch_size": "batch", "train.epochs": "epochs"}
TOLD = 8
"""So many deviations are named, the rest is counted."""


def comparison(recipe: Recipe, value: float | None, registry: Registry) -> str | None:
    """The line, None if the recipe names no published number.

    Args:
        value: of the run, a share; None if it was not measured.
    """
    published = recipe.published
    if published is None:
        return None
    epochs = f"{published.pretraining_epochs:g} epochs, " if published.pretraining_epochs else ""
    own = "not measured" if value is None else f"{100 * value:.1f}"
    found = list(deviations(recipe, published, registry))
    told = found[:TOLD] + [f"{len(found) - TOLD} more"] * (len(found) > TOLD)
    paper = f"paper {published.value:g} ({epochs}{published.source})"
    return f"{paper} | this run {own} | deviations: {', '.join(told) or 'none'}"


def deviations(recipe: Recipe, published: PublishedSection, registry: Registry) -> Iterator[str]:
    """What the run, and the one that it began from, do otherwise than the shipped recipes."""
    yield from differences(recipe, published.recipe, registry)
    if published.pretraining is None:
        return
    if recipe.init is None:
        yield "no pre-training"
        return
    file = Path(recipe.init) / "recipe.yaml"
    if not file.is_file():
        yield f"pre-training unknown (init {recipe.init} is no run)"
        return
    try:
        before = load_written(file, registry)
    except MimError as error:
        yield f"pre-training unknown ({error})"
        return
    wanted, epochs = published.pretraining_epochs, before.train.epochs
    if wanted is not None and epochs != wanted:
        length = f"{epochs:g} epochs" if epochs is not None else f"{before.train.steps} steps"
        yield f"pre-training {length} instead of {wanted:g} epochs"
    for text in differences(before, published.pretraining, registry, but=("train.epochs", "train.steps")):
        yield f"pre-training {text}"


def differences(recipe: Recipe, shipped: str, registry: Registry, but: tuple[str, ...] = ()) -> Iterator[str]:
    """ "batch 256 instead of 1024", and so on, of a recipe and a shipped one."""
    try:
        theirs = load_recipe(shipped, [], registry)
    except MimError:
        yield f"recipe '{shipped}' is not installed"
        return
    ours, wanted = (flat(each.model_dump(mode="json")) for each in (recipe, theirs))
    for key in dict.fromkeys([*wanted, *ours]):
        if key.startswith(NOT_COMPARED) or key.startswith(but or "\0") or ours.get(key) == wanted.get(key):
            continue
        yield f"{SHORT.get(key, key)} {shown(ours.get(key))} instead of {shown(wanted.get(key))}"


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def shown(value: Any) -> str:
    """A value as a recipe would have it."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
