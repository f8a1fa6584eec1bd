"""What a person sees of a run: a progress bar or plain lines on the console, and pictures of reconstructions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from mim_framework.base.text import for_people

if TYPE_CHECKING:
    from mim_framework.runtime.metrics import Throughput
    from mim_framework.training.run import Run


class Progress:
    """How far a run is: a bar with the time left on a terminal, else a line now and then. Silent on all ranks but 0.

    The bar has no thread of its own, since data workers are forked beside it.
    """

    def __init__(
        self,
        run: Run,
        *,
        start: int,
        every_seconds: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            start: steps that had been made before.
            every_seconds: time between two plain lines.
        """
        self._total, self._start = run.total_steps, start
        self._every_seconds, self._clock = every_seconds, clock
        self._console = console or Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._active = run.world.is_main
        self._shown_at = -math.inf
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self._active and self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
            self._bar = Bar(
                *columns, console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._start)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, done: int, measured: Mapping[str, float], *, lr: Mapping[str, float], throughput: Throughput
    ) -> None:
        """After a step; `done` counts the finished ones. Shows the losses of `measured` and the learning rates."""
        last = done == self._total
        every_seconds = self._every_seconds if self._bar is None else 0.1
        if not self._active or not (last or self._clock() - self._shown_at >= every_seconds):
            return
        self._shown_at = self._clock()
        text = summary({**measured, **lr}, throughput.recent(), throughput.eta(self._total - done))
        if self._bar is None:
            self._console.print(f"step {done}/{self._total}  {text}")
        else:
            self._bar.update(self._task, completed=done, description=text, refresh=True)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._active:
            self._console.print(for_people(text))


def summary(measured: Mapping[str, float], speed: Mapping[str, float], eta: timedelta | None) -> str:
    """One line: losses, learning rates, images/s, share of the time waiting for data, time left."""
    parts = [f"{name} {value:.4f}" for name, value in measured.items() if name.split("/")[-1] == "loss"]
    parts += [f"{name} {value:.2e}" for name, value in measured.items() if name.split("/")[0] == "lr"]
    if speed:
        parts += [f"{speed['images_per_s']:.{0 if speed['images_per_s'] >= 10 else 1}f} images/s"]
        parts += [f"data wait {100 * speed['wait_share']:.0f} %"]
    if eta is not None:
        parts.append(f"ETA {eta}")
    return "  ".join(parts)
