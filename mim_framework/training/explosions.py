"""What became of the explosions of a run: `explosions.json`, which tells a run that went back what to leave out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mim_framework.base.errors import MimError, TrainingError
from mim_framework.base.files import content_of
from mim_framework.data.order import BatchLayout
from mim_framework.training.directory import EXPLOSIONS, write_records
from mim_framework.training.explosion import Rise
from mim_framework.training.run import Run
from mim_framework.training.saving import Saver

STEPS_BEFORE = 100
"""So many steps before a rise are left out with it; PaLM (Chowdhery et al. 2022, section 5.1) went back as far."""

Holes = tuple[tuple[int, int], ...]


class GoneBack(Exception):
    """The run goes back to an earlier checkpoint: open it again."""


class Explosions:
    """The record of one run directory. Rank 0 writes it, every rank reads it."""

    def __init__(self, run_dir: Path) -> None:
        """
        Raises:
            MimError: if the record cannot be read.
        """
        self.path = run_dir / EXPLOSIONS
        try:
            self.entries: list[dict[str, Any]] = json.loads(content_of(self.path)) if self.path.exists() else []
            self.holes()
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise MimError(
                f"{self.path} cannot be read ({error}); it says which images the run leaves out since it went back. "
                "Bring it back, or delete it to go on with those that the newest checkpoint knows of"
            ) from None

    @property
    def num_rewinds(self) -> int:
        """How often the run has gone back."""
        return len(self.holes())

    def holes(self) -> list[tuple[int, int]]:
        """What each return leaves out."""
        found = [entry["left_out_steps"] for entry in self.entries if entry["action"] == "rewind"]
        return [(int(first), int(end)) for first, end in found]

    def forget_after(self, step: int) -> None:
        """The run goes on after `step`: what was only told or stopped later will be told again."""
        kept = [entry for entry in self.entries if entry["action"] == "rewind" or entry["until"] < step]
        if kept != self.entries:
            self.entries = kept
            self._write()

    def answer(self, rise: Rise, run: Run, checkpoints: Saver, note: Callable[[str], None]) -> None:
        """Do what the recipe says about a loss that explodes; returns if the run goes on as it is.

        Raises:
            GoneBack: if it goes on from an earlier checkpoint.
            TrainingError: if it stops.
        """
        section, world = run.recipe.train, run.world
        if section.on_explosion == "warn":
            world.on_main(lambda: self.add(rise, "warn", None, run.layout, 0))
            note(f"{rise}; the run goes on, as train.on_explosion is warn")
            return
        spent = section.on_explosion == "rewind" and self.num_rewinds >= section.max_rewinds
        action = "stop" if spent else section.on_explosion
        kept = world.share(world.on_main(lambda: checkpoints.back_to(rise.since)))
        step, name = kept if kept is not None else (0, None)
        world.on_main(lambda: self.add(rise, action, name, run.layout, step))
        where = f"{name}, from before" if name else "the beginning, as no checkpoint from before it was kept"
        if action == "rewind":
            note(f"{rise}; the run goes back to {where}, and leaves out the images of the steps around it")
            raise GoneBack
        often = f" after going back {section.max_rewinds} times (train.max_rewinds)" if spent else ""
        error = TrainingError(
            f"{rise}; stopped{often}. The same command goes on from {where}; later ones are set aside. Lower the "
            "learning rate, set optim.clip_grad_norm, or choose train.on_explosion=rewind, which leaves the images of "
            "these steps out, or warn, which goes on"
        )
        error.told_by_another_rank = not world.is_main
        raise error

    def add(self, rise: Rise, action: str, checkpoint: str | None, layout: BatchLayout, go_back_to: int) -> None:
        """Write an explosion down.

        Args:
            checkpoint: that from before the rise.
            go_back_to: step of that checkpoint, for `rewind`.
        """
        entry = {"action": action, **vars(rise), "checkpoint": checkpoint}
        if action == "rewind":
            first = layout.data_step(max(go_back_to, rise.since - STEPS_BEFORE))
            end = layout.data_step(rise.until) + 1
            size = layout.total_batch_size
            entry |= {"left_out_steps": [first, end], "left_out_positions": [first * size, end * size]}
        self.entries.append(entry)
        self._write()

    def _write(self) -> None:
        write_records(self.path, self.entries)


def merged(holes: Iterable[Iterable[int]]) -> Holes:
    """Ranges [first, end) in order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for first, end in sorted((first, end) for first, end in holes):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)
