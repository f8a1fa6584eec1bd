"""What training left behind, opened again: a run, its encoder alone, or an import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mim_framework.assembly.builder import Builder, Model, build_model, build_source
from mim_framework.assembly.weights import load_into, load_tensors, named_part, some
from mim_framework.base.errors import CheckpointError, MimError, RecipeError
from mim_framework.base.text import plain_logger
from mim_framework.checkpoints.checkpoint import Checkpoint, find_latest, load
from mim_framework.contract.components import Encoder, Source, ViewBuilder
from mim_framework.recipe.draft import load_written
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import choose_device

logger = plain_logger(__name__)


@dataclass
class LoadedRun(Model):
    """A finished or stopped run: its model on `device`, and its data."""

    source: Source
    device: torch.device


@dataclass
class LoadedEncoder:
    """The encoder of a finished or stopped run, before and after, and what it looks at; nothing else is built."""

    recipe: Recipe
    views: ViewBuilder
    untrained: Encoder
    trained: Encoder
    device: torch.device


def load_run(run_dir: Path, *, checkpoint: Path | None = None, registry: Registry | None = None) -> LoadedRun:
    """The model of a run directory with the weights of a checkpoint, on the recipe's device if this machine has it.

    Args:
        checkpoint: by default the newest whole one of the run.

    Raises:
        RecipeError: if the directory holds no run.
        CheckpointError: if there is no whole checkpoint, or it does not fit.
    """
    registry = registry or Registry()
    recipe, device = recipe_of_run(run_dir, registry)
    # A frozen teacher's weights are where the recipe says; those of the model are in the checkpoint.
    model = build_model(recipe.model_copy(update={"init": None}), registry)
    found = _checkpoint_of_run(run_dir, checkpoint)
    load_tensors(model.objective, found.tensors("model"), found.path)
    load_tensors(model.teachers.moving(), found.tensors("teachers"), found.path)
    source = build_source(recipe, registry)
    model.to(device)
    return LoadedRun(
        recipe, model.views, model.objective, model.teachers, model.specs, model.companions, source, device
    )


def load_encoder(run_dir: Path, *, checkpoint: Path | None = None, registry: Registry | None = None) -> LoadedEncoder:
    """Only the encoder of a run directory, for which neither teachers nor stored tokens are needed.

    It comes twice, with the weights from which the run started and with those of a checkpoint, on the recipe's device.

    Args:
        checkpoint: by default the newest whole one of the run.

    Raises:
        RecipeError: if the directory holds no run.
        CheckpointError: if there is no whole checkpoint, its model has no part named `encoder`, or it does not fit.
    """
    registry = registry or Registry()
    recipe, device = recipe_of_run(run_dir, registry)
    _, _, trained = _built_encoder(recipe, registry)
    found = _checkpoint_of_run(run_dir, checkpoint)
    weights = named_part(found.tensors("model"), "encoder.", found.path)
    if lacking := load_tensors(trained, weights, found.path):
        raise CheckpointError(f"{found.path} lacks {some(lacking)} of encoder '{trained.name}'")
    builder, views, untrained = _built_encoder(recipe, registry)
    builder.load_published("encoder", untrained)
    if recipe.init is not None:
        load_into(untrained, Path(recipe.init), prefix="encoder.")
    return LoadedEncoder(recipe, views, untrained.to(device), trained.to(device), device)


def _built_encoder(recipe: Recipe, registry: Registry) -> tuple[Builder, ViewBuilder, Encoder]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        builder = Builder(recipe, registry)
        return builder, builder.build_views(), builder.build_encoder()


def recipe_of_run(run_dir: Path, registry: Registry) -> tuple[Recipe, torch.device]:
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{run_dir} is no run directory: it has no recipe.yaml")
    recipe = load_written(file, registry)
    try:
        device = choose_device(recipe.train.device)
    except MimError:  # trained elsewhere
        device = choose_device("auto")
        logger.warning(f"{run_dir} was trained on {recipe.train.device}, which is not here; using {device.type}")
    return recipe, device


def _checkpoint_of_run(run_dir: Path, named: Path | None) -> Checkpoint:
    found = load(named) if named else find_latest(run_dir / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint yet")
    return found
