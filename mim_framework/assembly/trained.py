"""The encoder of a run or an import, as its recipe or slots describe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mim_framework.base.errors import CheckpointError, RecipeError
from mim_framework.base.section import Choice
from mim_framework.base.validation import describe, validate
from mim_framework.recipe.draft import load_written
from mim_framework.recipe.yaml import read_yaml
from mim_framework.registry.registry import Registry

IMPORTED_SLOTS = "slots.yaml"
"""Name of the slots in a folder of `mim import`."""


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder as a run or an import describes it, with the normalisation of the images that it saw."""

    encoder: Choice
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class _Slots(BaseModel):
    """What is read of the slots that `mim import` wrote."""

    encoder: Choice
    views: Choice


def imported_slots(file: Path) -> tuple[Choice, Choice, dict[str, Any]]:
    """Encoder and views of the slots that `mim import` wrote, and all slots as data.

    Raises:
        CheckpointError: if they cannot be read.
    """
    try:
        data = read_yaml(file.read_bytes(), str(file)).data
    except (OSError, RecipeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; mim import makes it anew") from error
    slots, problems = validate(_Slots, data)
    if slots is None:
        raise CheckpointError(f"{file} is damaged: {describe(problems)}; mim import makes it anew")
    return slots.encoder, slots.views, data


def trained_encoder(path: Path, registry: Registry) -> TrainedEncoder:
    """What stands in a run directory, in one of its checkpoints, or in a folder or file of `mim import`.

    Raises:
        CheckpointError: if it is none of these; the message says which command makes one.
    """
    folder = path.parent if path.is_file() else path
    recipes = [each / "recipe.yaml" for each in (folder, folder.parent.parent)]
    run = next((each for each in recipes if each.is_file()), None)
    if (folder / IMPORTED_SLOTS).is_file():
        encoder, views, _ = imported_slots(folder / IMPORTED_SLOTS)
    elif run is not None and path.exists():
        recipe = load_written(run, registry)
        encoder, views = recipe.encoder, recipe.views
    else:
        known = [info.name for info in registry.recipes()]
        cure = f"`mim run {path.name}` makes it" if path.name in known else "train one with `mim run`"
        if path.is_file():
            cure = f"`mim import {path}` makes a folder that can be named here"
        what = "is neither a run nor a folder of `mim import`" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; {cure}")
    cls, config = registry.resolve("views", views)
    spec = cls(config).specs.get("x")
    return TrainedEncoder(encoder, None if spec is None else spec.mean, None if spec is None else spec.std)
