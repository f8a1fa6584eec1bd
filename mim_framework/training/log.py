"""What a run writes down after its steps: progress, lines of metrics.jsonl, steps that were skipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mim_framework.base.errors import TrainingError
from mim_framework.base.files import SideFile, content_of
from mim_framework.checkpoints.checkpoint import Checkpoint
from mim_framework.contract.components import Component
from mim_framework.contract.world import World
from mim_framework.data.loader import COUNTED, OF_THE_SERVER, Loader
from mim_framework.runtime.metrics import MetricsWriter, Throughput
from mim_framework.runtime.optim import Optimizer
from mim_framework.training.measured import History, Summary
from mim_framework.training.progress import Progress
from mim_framework.training.run import Run


class Log:
    """The log of one run on one rank; rank 0 writes.

    `window` holds sums of what was measured since the last line, `nonfinite_in_a_row` counts skipped steps.
    """

    def __init__(
        self,
        run: Run,
        optimizers: dict[str, Optimizer],
        loader: Loader,
        metrics: MetricsWriter | None,
        progress: Progress,
        state: dict[str, Any],
    ) -> None:
        self.run, self.optimizers, self.loader = run, optimizers, loader
        self.metrics, self.progress = metrics, progress
        self.throughput = Throughput(run.device)
        self.skipped_steps = SideFile(run.dir / "nonfinite.jsonl")
        self._of_the_server_before = {} if metrics is None else _last_logged(metrics.path, OF_THE_SERVER)
        self.window: dict[str, float] = dict(state.get("window", {}))
        self.nonfinite_in_a_row = int(state.get("nonfinite_in_a_row", 0))

    def state(self, *, before_step: bool = False) -> dict[str, Any]:
        """What a resumed run must remember. Every rank must call it.

        Args:
            before_step: leave out what was read for the step that does not count.
        """
        rows = self._read_by_ranks(before_step=before_step)
        kept = [{name: count for name, count in row.items() if name not in OF_THE_SERVER} for row in rows]
        return {"window": self.window, "nonfinite_in_a_row": self.nonfinite_in_a_row, "reading": kept}

    def step(self, done: int, measured: Summary) -> dict[str, float] | None:
        """After a step; the line that was written, if one was due.

        Raises:
            TrainingError: if too many steps in a row were skipped.
        """
        run, recipe = self.run, self.run.recipe
        self._count(done, measured)
        self.throughput.step(run.layout.total_batch_size, self.loader.wait_seconds)
        self.progress.update(done, measured.losses, lr=self.rates(), throughput=self.throughput)
        if done % recipe.log.every_steps == 0 or done == run.total_steps:
            return self._line(done)
        return None

    def skipped(self, index: int, phase: str, history: History, summary: Summary) -> None:
        """A line of nonfinite.jsonl: which losses, and the samples of the micro-batches where they are not finite.

        Every rank must call it; a loss or sample counts whichever rank holds it.
        """
        run = self.run
        losses = run.world.gather(torch.stack([entry["loss"].float() for entry in history.values]))
        positions = run.world.gather(torch.stack(history.positions))
        if not run.world.is_main:
            return
        bad = ~losses.isfinite()
        cause = "loss" if bool(bad.any()) else "gradient"
        samples = positions[bad] if cause == "loss" else positions
        parts = [name.removeprefix("loss/") for name in summary.nonfinite_losses if name != "loss"]
        line = {"step": index, "phase": phase, "cause": cause, "losses": parts, "positions": samples.flatten().tolist()}
        self.skipped_steps.append([json.dumps(line)])
        which = f" ({', '.join(parts)})" if parts else ""
        self.note(
            f"step {index}: the {cause}{which} is not finite, no update; `mim replay {run.dir}` says where it begins"
        )

    def rates(self) -> dict[str, float]:
        """The learning rates of the last step."""
        return {"lr" if len(self.optimizers) == 1 else f"lr/{name}": o.lr for name, o in self.optimizers.items()}

    def numbers(self, done: int, numbers: dict[str, float]) -> None:
        """A line of its own, such as that of an evaluation."""
        if self.metrics is not None:
            self.metrics.write(done, numbers)

    def note(self, text: str) -> None:
        """A line on the console."""
        self.progress.note(text)

    def _count(self, done: int, measured: Summary) -> None:
        if measured.finite:
            self.nonfinite_in_a_row = 0
            for name, value in {**measured.named(), "steps": 1.0}.items():
                self.window[name] = self.window.get(name, 0.0) + value
            return
        self.nonfinite_in_a_row += 1
        self.window["skipped_steps"] = self.window.get("skipped_steps", 0.0) + 1.0
        if self.nonfinite_in_a_row > self.run.recipe.train.max_nonfinite_steps:
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.nonfinite_in_a_row} steps in a row, up to step "
                f"{done}; the samples are in {self.run.dir / 'nonfinite.jsonl'}; mim replay {self.run.dir} names the "
                "module where it begins. Lower the learning rate, set optim.clip_grad_norm or use "
                "train.precision=float32. The last checkpoint is from before"
            )

    def _line(self, done: int) -> dict[str, float]:
        steps, skipped = self.window.pop("steps", 0.0), self.window.pop("skipped_steps", 0.0)
        line = {
            "epoch": self.run.epoch(done),
            **{name: total / steps for name, total in self.window.items()},
            **self.rates(),
        }
        self.window = {}
        if skipped:
            line["skipped_steps"] = skipped
        for path, module in self.run.model.objective.named_modules():
            if isinstance(module, Component):  # by place, as two heads may hold components of one name
                line |= {f"{path or module.name}/{name}": value.item() for name, value in module.metrics().items()}
        line |= self._troubles(self._read_by_ranks())
        line |= self.throughput.take()
        self.numbers(done, line)
        return line

    def reading_failed(self, done: int) -> None:
        """A line with what was counted until reading failed, in the step after `done`. Every rank must call it."""
        self.numbers(done, self._troubles(self._read_by_ranks()))

    def reading_failed_at_once(self, done: int) -> None:
        """A line with what servers did to this rank until its first read failed, where no other takes part."""
        if found := {
            name: value for name, value in self._troubles([self.loader.counts()]).items() if name in OF_THE_SERVER
        }:
            self.numbers(done, found)

    def _read_by_ranks(self, **of: bool) -> list[dict[str, int]]:
        """What the loader of each rank has counted, without zeros."""
        counts = self.loader.counts(**of)
        own = torch.tensor([counts[name] for name in COUNTED], device=self.run.device)
        rows = self.run.world.gather(own).view(-1, len(COUNTED)).tolist()
        return [{name: count for name, count in zip(COUNTED, row, strict=True) if count} for row in rows]

    def _troubles(self, rows: list[dict[str, int]]) -> dict[str, float]:
        """Over all ranks, what a reader of the log wants to know: everything but the images that could be read.

        What servers did is not in checkpoints, which are the same bits without it; the log itself remembers it.
        """
        total = sum((Counter(row) for row in rows), Counter(self._of_the_server_before))
        return {name: float(total[name]) for name in COUNTED if name != "read" and total[name]}


def counted_before(resumed: Checkpoint | None, world: World) -> dict[str, int]:
    """What this rank counted before a checkpoint; on another number of ranks, its share of what they did."""
    rows = [] if resumed is None else resumed.state.get("reading", [])
    return dict(sum((Counter(row) for row in rows[world.rank :: world.size]), Counter()))


def _last_logged(path: Path, names: Iterable[str]) -> dict[str, int]:
    """The last value of each count in metrics.jsonl, of which only the lines that hold one are taken apart."""
    content, found = content_of(path), {}
    for name in names:
        place = content.rfind(f'"{name}"'.encode())
        if place >= 0:
            line = content[content.rfind(b"\n", 0, place) + 1 :].partition(b"\n")[0]
            found[name] = int(json.loads(line)[name])
    return found
