"""What a person sees of a run: a progress bar or plain lines on the console, and pictures of reconstructions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from torch import Tensor

from mim_framework.contract.mask import Grid

if TYPE_CHECKING:
    from mim_framework.run import Run
    from mim_framework.runtime.metrics import Throughput


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
            self._console.print(text)


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


# --- pictures --------------------------------------------------------------------------------------------------------

CAPTIONS = ("input", "masked", "reconstruction")
GAP = 4
"""Pixels around every image of a picture."""
CAPTION_HEIGHT = 16
_MIN_WIDTH = 96  # of an image, in pixels: room for the longest caption


def mask_image(image: Tensor, hidden: Tensor, grid: Grid) -> Tensor:
    """image (C, H, W) in [0, 1], hidden (N,) bool on `grid` -> the image with hidden patches grey.

    Raises:
        ValueError: if the image is not a whole number of grid cells.
    """
    rows, columns = grid.shape
    height, width = image.shape[1:]
    if height % rows or width % columns:
        raise ValueError(f"image size {height}x{width} is not a multiple of the grid {grid}")
    cells = hidden.reshape(rows, columns)
    pixels = cells.repeat_interleave(height // rows, dim=0).repeat_interleave(width // columns, dim=1)
    return image.masked_fill(pixels, 0.5)


def reconstruction_picture(
    rows: Sequence[tuple[Tensor, ...]], scale: int | None = None, captions: Sequence[str] = CAPTIONS
) -> Image.Image:
    """A table of images with a caption above each column.

    Args:
        rows: images (C, H, W) in [0, 1], all of one size, C = 1 or 3; values outside are clipped.
        scale: factor of the nearest-neighbour enlargement; by default the smallest that makes the captions fit.
    """
    height, width = rows[0][0].shape[1:]
    scale = scale or math.ceil(_MIN_WIDTH / width)
    cell_height, cell_width = height * scale + GAP, width * scale + GAP
    size = (len(captions) * cell_width + GAP, CAPTION_HEIGHT + len(rows) * cell_height + GAP)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, caption in enumerate(captions):
        draw.text((GAP + column * cell_width, GAP), caption, fill="black", font=ImageFont.load_default())
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            corner = (GAP + column * cell_width, CAPTION_HEIGHT + GAP + row * cell_height)
            enlarged = (width * scale, height * scale)
            picture.paste(_to_pil(image).resize(enlarged, Image.Resampling.NEAREST), corner)
    return picture


def _to_pil(image: Tensor) -> Image.Image:
    pixels = image.detach().float().cpu().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
