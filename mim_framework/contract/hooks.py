"""The plugin contract: what a plugin can register, and the events it is told about. The whole surface is this page.

A plugin is a module named by one entry point of the group `mim_framework`. It decorates functions with `hookimpl`:

    @hookimpl
    def mim_maskers():
        return [SpiralMasker]

Registration hooks return classes; a class carries its name, its `Config` and its documentation. Recipes are found in
the folder `recipes/` beside the module, without importing it. pluggy is never called inside the arithmetic of a step.
An error in a function that listens to run events is reported once and does not end the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:  # so that plugins are listed without torch
    from mim_framework.contract import components as c
    from mim_framework.contract.evaluation import Evaluation
    from mim_framework.contract.run import Run

PROJECT = "mim_framework"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Decorator of a plugin's functions: each implements the hook of its name."""

HOOK_OF_KIND = {
    "masker": "mim_maskers",
    "encoder": "mim_encoders",
    "target": "mim_targets",
    "decoder": "mim_decoders",
    "loss": "mim_losses",
    "objective": "mim_objectives",
    "views": "mim_views",
    "source": "mim_sources",
    "evaluation": "mim_evaluations",
    "checkpoint_format": "mim_checkpoint_formats",
}
"""Kind of component -> the hook that registers it."""


@hookspec
def mim_maskers() -> list[type[c.Masker]]:  # type: ignore[empty-body]
    """Classes that decide what is hidden."""


@hookspec
def mim_encoders() -> list[type[c.Encoder]]:  # type: ignore[empty-body]
    """Classes that turn a masked view into tokens; also used as teachers."""


@hookspec
def mim_targets() -> list[type[c.Target]]:  # type: ignore[empty-body]
    """Classes that say what should be predicted."""


@hookspec
def mim_decoders() -> list[type[c.Decoder]]:  # type: ignore[empty-body]
    """Classes that turn a latent into a prediction."""


@hookspec
def mim_losses() -> list[type[c.Loss]]:  # type: ignore[empty-body]
    """Classes that reduce prediction and target to one number."""


@hookspec
def mim_objectives() -> list[type[c.Objective]]:  # type: ignore[empty-body]
    """Classes that order a step in another way than the five slots."""


@hookspec
def mim_views() -> list[type[c.ViewBuilder]]:  # type: ignore[empty-body]
    """Classes that turn samples into named views."""


@hookspec
def mim_sources() -> list[type[c.Source]]:  # type: ignore[empty-body]
    """Classes that bring samples."""


@hookspec
def mim_evaluations() -> list[type[Evaluation]]:  # type: ignore[empty-body]
    """Classes that measure what frozen features are worth."""


@hookspec
def mim_checkpoint_formats() -> list[type[c.CheckpointFormat]]:  # type: ignore[empty-body]
    """Classes that read and write the checkpoint layouts of other code bases."""


@hookspec
def mim_run_started(run: Run) -> None:
    """Called on every rank after the model is built and a checkpoint, if any, is loaded; before the first step."""


@hookspec
def mim_metrics_logged(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Called on rank 0 after a line was appended to metrics.jsonl."""


@hookspec
def mim_checkpoint_saved(run: Run, path: Path) -> None:
    """Called on rank 0 after a checkpoint is complete on disk."""


@hookspec
def mim_run_finished(run: Run, error: BaseException | None) -> None:
    """Called on every rank after the last step, or with the error that ended the run."""
