"""When a run is saved, what a checkpoint holds of it, and how it goes on from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mim_framework.base.errors import CheckpointError, DataError
from mim_framework.base.files import SideFile
from mim_framework.base.text import plain_logger
from mim_framework.base.validation import describe, validate
from mim_framework.checkpoints import checkpoint, state
from mim_framework.data.identity import KNOWN_IN_PLACES, source_changes
from mim_framework.runtime.optim import Optimizer
from mim_framework.runtime.sharding import local
from mim_framework.training.run import Run

logger = plain_logger(__name__)


class _State(BaseModel):
    """What every checkpoint's `state.json` holds, and of what type."""

    model_config = ConfigDict(extra="allow")

    num_images: int = Field(ge=0)
    source: dict[str, str | int | float | bool | None] = {}
    left_out: list[tuple[int, int]] = []
    optimizer_scalars: dict[str, int | float | bool]
    window: dict[str, float] = {}
    nonfinite_in_a_row: int = Field(0, ge=0)


class Saver:
    """The checkpoints of one run.

    Args:
        saved: told the path of every checkpoint, on rank 0.
    """

    def __init__(self, run: Run, optimizers: dict[str, Optimizer], saved: Callable[[Path], None]) -> None:
        self.run, self.optimizers, self.saved = run, optimizers, saved
        self.folder = run.dir / "checkpoints"
        self.kept_in: set[int] = set()
        identity = run.source.identity()
        self.beside = {name: str(identity[name]) for name in KNOWN_IN_PLACES if name in identity}
        self.identity = {**identity, **self.beside}

    def due(self, done: int) -> bool:
        """Whether the recipe wants one after `done` steps."""
        section = self.run.recipe.checkpoint
        every_steps = bool(section.every_steps) and done % section.every_steps == 0
        return every_steps or self.run.due(done, section.every_epochs)

    def worth_keeping(self, done: int) -> bool:
        """Whether the state after a skipped step should be saved: its weights are finite, and none of this epoch was.

        Every rank must call it.
        """
        epoch = int(self.run.epoch(done))
        if epoch in self.kept_in:
            return False
        self.kept_in.add(epoch)
        parameters = self.run.model.objective.parameters()
        broken = sum((~local(parameter.detach()).isfinite()).sum() for parameter in parameters)
        return float(self.run.world.sum(broken.float())) == 0

    def save(self, done: int, numbers: dict[str, Any], *, rising: int = 0, must: bool = True) -> None:
        """Write the state after `done` steps. Every rank must call it.

        Args:
            numbers: what the log, the count of skipped steps and the watch over the loss must remember.
            rising: steps for which the loss has been rising; the newest checkpoint from before them is kept.
            must: whether the run ends where it cannot be written, whatever the recipe says.

        Raises:
            CheckpointError: if it cannot be written.
        """
        run, teachers = self.run, self.run.model.teachers.moving()
        groups = state.gather(run.model.objective, teachers, self.optimizers, run.world)
        content = {
            "num_images": len(run.source),
            "source": {name: value for name, value in self.identity.items() if name not in self.beside},
            "left_out": list(map(list, run.layout.left_out)),
            **numbers,
            "optimizer_scalars": state.scalars(self.optimizers),
        }

        def write() -> Path:
            path = checkpoint.save_checkpoint(self.folder, done, groups, content, self.beside)
            before = done - rising if rising else None
            best = numbers.get("best")
            checkpoint.prune(
                self.folder, run.recipe.checkpoint, run.steps_per_epoch, before=before,
                best=None if best is None else best["step"],
            )  # fmt: skip
            return path

        try:
            path = run.world.on_main(write)
        except CheckpointError as error:
            if must or run.recipe.train.on_save_error == "stop":
                raise
            if run.world.is_main:
                logger.warning(f"{error}. The run goes on, as train.on_save_error is warn")
            return
        if path is not None:
            self.saved(path)

    def back_to(self, since: int) -> tuple[int, str] | None:
        """Set aside what was saved while a loss rose; step and name of the checkpoint before. On rank 0.

        Args:
            since: the step, from 0, at which the rise was measured first; the update before it made it.
        """
        checkpoint.set_aside_from(self.folder, max(since, 1))
        path = checkpoint.newest_before(self.folder, since)
        return None if path is None else (checkpoint.step_of(path), path.name)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Put a checkpoint's tensors and numbers into model, teachers and optimizers."""
        state.restore(found, self.run.model.objective, self.run.model.teachers.moving(), self.optimizers)
        state.restore_scalars(self.optimizers, found.state["optimizer_scalars"])

    def newest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, the same on every rank, if there is one.

        Raises:
            CheckpointError: if all are damaged, or this machine does not have that of rank 0.
            DataError: if the source has other images than when it was written, and the recipe does not accept that.
        """
        world = self.run.world
        found = world.on_main(lambda: self._same_images(checkpoint.find_latest(self.folder)))
        name = world.share(None if found is None else found.path.name)
        if name is None or found is not None:
            return found
        return self._same_images(_opened(self.folder / name))  # rank 0 has verified it

    def _same_images(self, found: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint | None:
        """The checkpoint, if the source has the images that it had then, or the recipe accepts that it has not."""
        if found is None:
            return None
        _, problems = validate(_State, found.state)
        if problems:
            raise CheckpointError(f"{found.path}/state.json is no state of a run: {describe(problems)}")
        then = {"num_images": found.state["num_images"], **found.state.get("source", {}), **found.beside}
        if not (changes := source_changes(then, self.identity)):
            return found
        if not self.run.recipe.data.accept_changed_source:
            raise DataError(
                f"data.source has changed since {found.path}: {', '.join(changes)}. They decide which sample stands "
                "where, so the run would silently go on with others. Bring the images back, set "
                "data.accept_changed_source=true if that is meant, or start a run of its own from these weights: "
                f"name=... init={found.path}"
            )
        if self.run.world.is_main:
            line = {"step": found.step, "changes": changes, "then": then, "now": self.identity}
            SideFile(self.run.dir / "source_changes.jsonl").append([json.dumps(line)])
            logger.warning(f"data.source has changed since {found.path}: {', '.join(changes)}; accepted by the recipe")
        return found


def _opened(path: Path) -> checkpoint.Checkpoint:
    if not path.is_dir():
        raise CheckpointError(
            f"rank 0 resumes from {path}, which this machine does not have; "
            "output_dir must be a folder that all machines of the run share"
        )
    return checkpoint.load(path, verify=False)
