"""How many images are done: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


class ImageProgress:
    """Told images done, images in all, and what else there is to say.

    The bar has no thread of its own, since workers are forked beside it.
    """

    def __init__(
        self,
        *,
        every_seconds: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every_seconds`: time between two plain lines."""
        self._console = console or Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._every_seconds, self._clock = every_seconds, clock
        self._bar: Bar | None = None
        self._began: tuple[int, float] | None = None
        self._shown_at = -math.inf

    def __enter__(self) -> ImageProgress:
        if self._console.is_terminal:
            columns = (TextColumn("images"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
            self._bar = Bar(
                *columns, console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.start()
            self._task = self._bar.add_task("")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, text: str) -> None:
        now = self._clock()
        if self._began is None:  # what an earlier call has done says nothing of the speed
            self._began = done, now
            if self._bar is None:
                self._shown_at = now
        every_seconds = self._every_seconds if self._bar is None else 0.1
        if done < total and now - self._shown_at < every_seconds:
            return
        self._shown_at = now
        if done > self._began[0] and now > self._began[1]:
            speed = (done - self._began[0]) / (now - self._began[1])
            text += f"  {speed:,.1f} images/s  ETA {timedelta(seconds=round((total - done) / speed))}"
        if self._bar is None:
            self._console.print(f"{done:,}/{total:,} images  {text}")
        else:
            self._bar.update(self._task, completed=done, total=total, description=text, refresh=True)
