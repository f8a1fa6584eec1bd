"""What training left behind, opened again: a run, its encoder alone, or an import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mim_framework.assembly.builder import Builder, Model, build_model, build_source
from mim_framework.assembly.length import run_length
from mim_framework.assembly.weights import adopted, load_tensors, named_part, some
from mim_framework.base.errors import CheckpointError, MimError, PluginError, RecipeError
from mim_framework.base.schedule import epoch_of
from mim_framework.base.text import plain_logger
from mim_framework.checkpoints.checkpoint import Checkpoint, find_latest, load, load_weights
from mim_framework.contract.components import Encoder, Source, ViewBuilder
from mim_framework.contract.evaluation import Method
from mim_framework.evaluate.cache import weights_hash
from mim_framework.recipe.draft import load_written
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.installed import BUILTINS
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import choose_device
from mim_framework.runtime.metrics import METRICS, read_metrics

logger = plain_logger(__name__)


@dataclass
class LoadedRun(Model):
    """A finished or stopped run: its model on `device`, its data, and the `steps` after which it was saved."""

    dir: Path
    source: Source
    device: torch.device
    steps: int

    def method(self) -> Method:
        """What evaluations may ask of the method, where the checkpoint stands."""
        recipe, engine = self.recipe, self.engine(self.device)
        steps_per_epoch, total = run_length(recipe, len(self.source))
        index = max(0, self.steps - 1)
        where = {
            "index": index, "total": total, "epoch": epoch_of(index, steps_per_epoch),
            "epochs": recipe.train.epochs or total / steps_per_epoch, "steps_per_epoch": steps_per_epoch,
            "phase": recipe.phase_names()[0],
        }  # fmt: skip
        return Method(
            self.objective,
            step=lambda positions: engine.step(seed=recipe.seed, positions=positions, **where),
            begin=engine.begin,
            teachers=dict(self.teachers.teachers.items()),
            beside=frozenset(companion.spec.name for companion in self.companions),
            history=lambda: read_metrics(self.dir) if (self.dir / METRICS).is_file() else [],
        )


@dataclass(frozen=True)
class Origin:
    """Where an encoder comes from: None where its files do not tell."""

    subject: str
    """As it was named."""
    kind: str
    """run, checkpoint, import, export, timm or random."""
    encoder: str
    """Name of the component, or of timm's model."""
    method: str | None = None
    """The plugin that brings what is not built in: of its objective, else of its encoder, target, decoder or masker."""
    run: str | None = None
    """Name of the run that trained it."""
    step: int | None = None
    """Optimizer steps of that run."""
    images_seen: int | None = None
    """Images in all those steps, with the total batch size of the run's recipe."""


@dataclass
class LoadedEncoder:
    """An encoder of any origin on `device`, before and after its training, and what it looks at.

    `recipe`: that of its run, if it comes from one that is here. `draw`: makes the encoder as it was before training,
    None where the "trained" one is not trained either.
    """

    trained: Encoder
    views: ViewBuilder
    device: torch.device
    origin: Origin
    recipe: Recipe | None = None
    draw: Callable[[], Encoder] | None = None

    @cached_property
    def untrained(self) -> Encoder | None:
        """The encoder from which training started, or another one drawn like it; made when it is first asked for.

        Raises:
            CheckpointError: if the weights that the run started from are gone or do not fit.
        """
        return None if self.draw is None else self.draw().to(self.device)

    @cached_property
    def weights_sha256(self) -> str:
        """Of names, types, shapes and values of all weights and buffers that are saved: equal for equal encoders."""
        return weights_hash(self.trained)


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
        recipe, model.views, model.objective, model.teachers, model.specs, model.companions, run_dir, source, device,
        found.step,
    )  # fmt: skip


def load_encoder(run_dir: Path, *, checkpoint: Path | None = None, registry: Registry | None = None) -> LoadedEncoder:
    """Only the encoder of a run directory, for which neither teachers nor stored tokens are needed.

    It has the weights of a checkpoint, and is on the recipe's device; `untrained` has those from which the run started.

    Args:
        checkpoint: by default the newest whole one of the run.

    Raises:
        RecipeError: if the directory holds no run.
        CheckpointError: if there is no whole checkpoint, its model has no part named `encoder`, or it does not fit.
    """
    registry = registry or Registry()
    recipe, device = recipe_of_run(run_dir, registry)
    _, views, trained = _built_encoder(recipe, registry)
    found = _checkpoint_of_run(run_dir, checkpoint)
    weights = named_part(found.tensors("model"), "encoder.", found.path)
    if lacking := load_tensors(trained, weights, found.path):
        raise CheckpointError(f"{found.path} lacks {some(lacking)} of encoder '{trained.name}'")

    def draw() -> Encoder:
        builder, _, untrained = _built_encoder(recipe, registry)
        builder.load_published("encoder", untrained)
        if recipe.init is not None:
            init = named_part(load_weights(Path(recipe.init)), "encoder.", Path(recipe.init))
            load_tensors(untrained, adopted(untrained, init, untrained.state_dict()), Path(recipe.init))
        return untrained

    origin = Origin(
        str(checkpoint or run_dir),
        "checkpoint" if checkpoint else "run",
        trained.name,
        method_of(parts_of(recipe.model_dump(mode="json")), registry),
        run=recipe.name,
        step=found.step,
        images_seen=found.step * recipe.train.total_batch_size,
    )
    return LoadedEncoder(trained.to(device), views, device, origin, recipe, draw)


def parts_of(slots: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(slot, component's name) of the slots by which a method is known, the most telling ones first."""
    heads = [slots, *(slots.get("heads") or {}).values()]
    places = [("objective", slots), ("encoder", slots)]
    places += [(slot, head) for slot in ("target", "decoder", "loss") for head in heads]
    return [(slot, place[slot]["type"]) for slot, place in [*places, ("masker", slots)] if place.get(slot)]


def method_of(parts: Iterable[tuple[str, str]], registry: Registry) -> str | None:
    """The first plugin that is not the built-in one among those that bring these components and can be used."""
    plugins = {info.module.partition(".")[0]: info.name for info in registry.plugins() if info.name != BUILTINS}
    for kind, name in parts:
        with suppress(PluginError):
            package = registry.find(kind, name).__module__.partition(".")[0]
            if package in plugins:
                return plugins[package]
    return None


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
