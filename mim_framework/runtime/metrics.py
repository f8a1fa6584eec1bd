"""The numbers of a run: `metrics.jsonl` is the source of truth, TensorBoard shows a copy.

One JSON object per line, `step` first: the number of optimizer steps made when it was written. JSON has no NaN and no
infinity; they are written as the strings "NaN", "Infinity" and "-Infinity", and `read_metrics` turns them back.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from mim_framework.base.errors import MimError
from mim_framework.base.files import content_of, replace_file
from mim_framework.base.section import Section
from mim_framework.base.text import plain_logger

if TYPE_CHECKING:
    from PIL.Image import Image

logger = plain_logger(__name__)

METRICS = "metrics.jsonl"
"""Name of the file of metrics in a run directory."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class LogSection(Section):
    """What is written down on the way."""

    every_steps: int = Field(20, gt=0)
    """Optimizer steps between two lines of metrics.jsonl; a line holds the means since the line before."""
    tensorboard: bool = True
    """Also write the metrics and the reconstructions for TensorBoard."""
    images_every_epochs: float = Field(20.0, ge=0)
    """Epochs between two pictures of reconstructions, of the same images each time; 0 for one at the end only."""
    num_images: int = Field(8, ge=0, le=64)
    """Number of images in such a picture; 0 for no pictures."""


class MetricsWriter:
    """Appends to the metrics of a run directory. Make one on rank 0 only."""

    def __init__(self, run_dir: Path, *, resume_step: int, section: LogSection) -> None:
        """
        Args:
            resume_step: the run goes on after this step; what was written for later ones is dropped, and with 0 all.

        Raises:
            MimError: if the file cannot be written.
        """
        self.run_dir = run_dir
        self.path = run_dir / METRICS
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(resume_step, self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._cannot_write(error) from error
        self._tensorboard: Any = None
        self._let_threads_speak = _threads_of_tensorboard_are_silent() if section.tensorboard else lambda: None
        if section.tensorboard:
            self._in_tensorboard(lambda: self._open_tensorboard(resume_step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line; it is in the hands of the operating system when this returns. Numbers go to TensorBoard too.

        Raises:
            MimError: if the line cannot be written.
        """
        try:
            self._file.write(_to_line({"step": step, **metrics}))
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error
        if self._tensorboard is not None:
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self._in_tensorboard(lambda: [self._tensorboard.add_scalar(*item, step) for item in numbers.items()])

    def image(self, name: str, picture: Image, step: int) -> None:
        """Save a picture as `NAME/step_NNNNNNNN.png` in the run directory, and show it in TensorBoard.

        A picture that cannot be saved is warned about; it is not worth a run.
        """
        path = self.run_dir / name / f"step_{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        except OSError as error:
            logger.warning(f"cannot save the picture {path}: {error}")
        if self._tensorboard is not None:
            import numpy

            pixels = numpy.asarray(picture.convert("RGB"))
            self._in_tensorboard(lambda: self._tensorboard.add_image(name, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        with suppress(OSError):  # what is left to write has failed before, and `write` has said so
            self._file.close()
        if self._tensorboard is not None:
            self._in_tensorboard(self._tensorboard.close)
        self._let_threads_speak()

    def _open_tensorboard(self, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 0.1 s and a thread: only where it is wanted

        first_step = resume_step + 1 if resume_step else 0
        self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=first_step)

    def _in_tensorboard(self, action: Callable[[], object]) -> None:
        """TensorBoard shows a copy: whatever goes wrong in it is said once, and training goes on without it."""
        try:
            action()
        except Exception as error:
            self._tensorboard = None
            logger.warning(f"TensorBoard is off for the rest of this run: {error}. {self.path} goes on")

    def _cannot_write(self, error: OSError) -> MimError:
        return MimError(f"cannot write {self.path}: {error.strerror}")


def _threads_of_tensorboard_are_silent() -> Callable[[], None]:
    """Keep the thread that writes for TensorBoard from printing a traceback; returns what ends it.

    What the thread raised comes once more from the next call of the writer, which says it.
    """
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not type(raised.thread).__module__.startswith("tensorboard."):
            before(raised)

    def undo() -> None:
        if threading.excepthook is hook:
            threading.excepthook = before

    threading.excepthook = hook
    return undo


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, or of the one in a run directory. A line that a crash tore is left out.

    Raises:
        MimError: if there is no such file.
    """
    path = path / METRICS if path.is_dir() else path
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise MimError(f"no metrics in {path}: {error.strerror}") from None
    return [values for values in map(_from_line, lines) if values is not None]


def _to_line(values: dict[str, Any]) -> str:
    finite = {
        key: value if not isinstance(value, float) or math.isfinite(value) else json.dumps(value)
        for key, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _from_line(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in values.items()}


def _step_of(line: bytes) -> int | None:
    values = _from_line(line)
    return None if values is None else values["step"]


def _drop_lines_after(step: int, path: Path) -> None:
    """Keep the whole lines up to `step`."""
    content = content_of(path)
    lines = content.splitlines() if step else []
    wanted = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
    kept = b"".join(line + b"\n" for line in wanted)
    if kept != content:
        replace_file(path, kept)


def as_picture(pixels: Tensor) -> Image:
    """(C, H, W) in [0, 1] -> an RGB picture: grey of one or two channels, else the first three."""
    from PIL import Image

    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    values = (shown.detach().float().nan_to_num().clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


class Throughput:
    """How fast a run goes, and what share of the time it waits for data. Evaluation and saving count as time too."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._last = clock()
        self._waited = 0.0
        self._since_taken: list[_Step] = []
        self._recent: deque[_Step] = deque(maxlen=50)

    def step(self, num_images: int, wait_seconds: float) -> None:
        """An optimizer step has ended.

        Args:
            num_images: images of the step, over all ranks.
            wait_seconds: time spent waiting for data since the beginning, this step included.
        """
        now = self._clock()
        step = (now - self._last, wait_seconds - self._waited, num_images)
        self._last, self._waited = now, wait_seconds
        self._since_taken.append(step)
        self._recent.append(step)

    def take(self) -> dict[str, float]:
        """images_per_s, step_s and wait_share since the last call, for the log; peak_memory_gb where it is known."""
        numbers = _speed(self._since_taken)
        self._since_taken = []
        memory = peak_memory(self._device)
        return numbers if memory is None else {**numbers, "peak_memory_gb": memory / 1e9}

    def recent(self) -> dict[str, float]:
        """images_per_s, step_s and wait_share of the last 50 steps, for the console; empty before the first step."""
        return _speed(self._recent)

    def eta(self, remaining_steps: int) -> timedelta | None:
        """Time that so many steps will take at the recent speed; None before the first step."""
        speed = self.recent()
        return timedelta(seconds=round(remaining_steps * speed["step_s"])) if speed else None


_Step = tuple[float, float, int]  # seconds, seconds of these waiting for data, images


def _speed(steps: list[_Step] | deque[_Step]) -> dict[str, float]:
    if not steps:
        return {}
    seconds, waited, images = (sum(column) for column in zip(*steps, strict=True))
    seconds = max(seconds, 1e-9)
    return {"images_per_s": images / seconds, "step_s": seconds / len(steps), "wait_share": waited / seconds}


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held at once so far: by tensors on a GPU, by this process on a CPU. None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
