"""Batches of a run: which sample stands at which position, prefetching, and what happens to broken images.

Position p of the run is the same sample with the same crop on any number of ranks, accumulation steps and workers, and
after a resume: `BatchLayout` says which positions a micro-batch holds, `SampleOrder` which sample stands at a position.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.base.section import Choice, Section
from mim_framework.contract.components import Source, ViewBuilder
from mim_framework.data.decode import BrokenImage
from mim_framework.runtime.launch import STOP_SIGNALS

TOLERATED_BROKEN = 10
"""So many broken images are accepted whatever their share, so that a run does not stop at its first batch."""
MAX_REPLACEMENTS = 16
"""So many samples in a row may be broken before a position is given up."""
SIGNAL_SECONDS = 10.0
"""A worker takes SIGTERM for one to the whole job until so many seconds after the first."""


class DataSection(Section):
    """Where the images come from and how they are read."""

    source: Choice
    """Where the images come from."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes per rank that read and decode; 0 reads in the training process, `auto` follows the processor cores."""
    prefetch_factor: int = Field(2, ge=1)
    """Micro-batches that every worker prepares ahead."""
    max_broken: float = Field(0.01, ge=0, le=1)
    """Share of the images read so far that may be broken; above it the run stops. 10 on a rank are always tolerated.
    A broken image is replaced by another one, chosen by its position in the run."""
    views_per_image: int | None = Field(None, gt=0)
    """Every image is seen in so many fixed views, one per epoch in turn; null for a new random view in every epoch."""
    tokens: str | None = Field(None, min_length=1)
    """Folder that `mim tokenize` wrote: token ids of the fixed views, instead of a tokenizer in every step."""

    @model_validator(mode="after")
    def _fixed(self) -> DataSection:
        if self.tokens is not None and self.views_per_image is None:
            raise ValueError("'tokens' are those of fixed views; give 'views_per_image' as `mim tokenize` had it")
        return self

    @property
    def num_workers(self) -> int:
        """`workers` as a number: `auto` leaves one core per rank to training, and takes 16 at most."""
        if self.workers != "auto":
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(16, max(1, cores // ranks_here - 1))


@dataclass(frozen=True)
class BatchLayout:
    """How the positions of an optimizer step are dealt to micro-batches and ranks.

    `total_batch_size` images per optimizer step over all ranks, `batch_size` per rank and micro-batch.
    """

    total_batch_size: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.total_batch_size % (self.batch_size * self.world_size):
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is not a multiple of batch_size {self.batch_size} x "
                f"{self.world_size} ranks"
            )

    @property
    def accum_steps(self) -> int:
        """Micro-batches of one rank per optimizer step."""
        return self.total_batch_size // (self.batch_size * self.world_size)

    def positions(self, step: int, micro: int) -> range:
        """The global positions of this rank's micro-batch `micro` in optimizer step `step`, both from 0."""
        start = step * self.total_batch_size + (micro * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


class SampleOrder:
    """Position in the run -> index of the sample: every epoch is a new random order of all samples."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self._seed, self._num_samples = seed, num_samples
        self._epochs: dict[int, Tensor] = {}

    def indices(self, positions: Iterable[int]) -> list[int]:
        return [int(self._epoch(p // self._num_samples)[p % self._num_samples]) for p in positions]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a batch can reach into the next epoch: two are kept
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = rng.permutation(self._seed, f"epoch {epoch}", self._num_samples)
        return self._epochs[epoch]


@dataclass(frozen=True)
class Broken:
    """A sample that could not be used: `index` in the source, at `position` of the run. `cause` as in `BrokenImage`."""

    position: int
    index: int
    name: str
    cause: str
    detail: str


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch: views and positions (B,) on the device; `broken` samples were replaced by others."""

    views: dict[str, Tensor]
    positions: Tensor
    step: int
    micro: int
    broken: list[Broken]


class Loader:
    """Iterates over the micro-batches of this rank, from the first one of `start_step` to the last of the run.

    `wait_seconds` adds up the time for which the consumer waited, `broken_counts` the broken images by cause.
    """

    def __init__(
        self,
        section: DataSection,
        source: Source,
        views: ViewBuilder,
        *,
        seed: int,
        layout: BatchLayout,
        start_step: int,
        total_steps: int,
        device: torch.device,
        on_broken: Callable[[Broken], None] | None = None,
        run_dir: Path | None = None,
    ) -> None:
        """`on_broken` is told every broken sample; in `run_dir` they are listed as broken_images.rankR.jsonl."""
        self.section, self.source, self.views = section, source, views
        self.seed, self.layout = seed, layout
        self.start_step, self.total_steps = start_step, total_steps
        self.device = device
        self.wait_seconds = 0.0
        self.broken_counts: Counter[str] = Counter()
        self._first_broken: list[Broken] = []
        self._num_read = 0
        self._on_broken = on_broken
        self._broken_list = None if run_dir is None else Path(run_dir) / f"broken_images.rank{layout.rank}.jsonl"

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DataError: if more images are broken than `max_broken` allows.
        """
        reader = TrainingReader(self.source, self.views, self.seed, self.section.views_per_image)
        batches = prefetch(
            reader,
            self._requests(),
            workers=self.section.num_workers,
            prefetch_factor=self.section.prefetch_factor,
            remote=self.source.remote,
            pin_memory=self.device.type == "cuda",
        )
        try:
            while True:
                asked = time.perf_counter()
                read = next(batches, None)
                if read is None:
                    return
                request, views, broken = read
                self._record(request, broken, complete=views is not None)
                views = {name: view.to(self.device, non_blocking=True) for name, view in views.items()}
                # Made on the device: a copy of a list would wait for it.
                first, last = request.positions[0], request.positions[-1]
                positions = torch.arange(first, last + 1, device=self.device)
                self.wait_seconds += time.perf_counter() - asked
                yield Batch(views, positions, request.step, request.micro, broken)
        finally:
            del batches  # ends the workers now, also where the traceback of an error would keep them alive

    def _requests(self) -> Iterator[Request]:
        order = SampleOrder(self.seed, len(self.source))
        for step in range(self.start_step, self.total_steps):
            for micro in range(self.layout.accum_steps):
                positions = self.layout.positions(step, micro)
                yield Request(step, micro, list(positions), order.indices(positions))

    def _record(self, request: Request, broken: list[Broken], complete: bool) -> None:
        """Count and list broken samples, and stop above the budget."""
        self._num_read += len(broken) + (len(request.positions) if complete else 0)
        if not broken:
            return
        self.broken_counts.update(sample.cause for sample in broken)
        self._first_broken = (self._first_broken + broken)[:3]
        if self._broken_list is not None:
            self._broken_list.parent.mkdir(parents=True, exist_ok=True)  # on a machine that does not share the folder
            with open(self._broken_list, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in broken)
        if self._on_broken is not None:
            for sample in broken:
                self._on_broken(sample)
        total, allowed = self.broken_counts.total(), self.section.max_broken
        if complete and (total <= TOLERATED_BROKEN or total <= allowed * self._num_read):
            return
        causes = ", ".join(f"{count} {cause}" for cause, count in self.broken_counts.most_common())
        first = "; ".join(f"{sample.name} ({sample.detail})" for sample in self._first_broken)
        listed = "" if self._broken_list is None else f" All are listed in {self._broken_list}."
        why = (
            f"more than data.max_broken={allowed:g} allows" if complete else f"{1 + MAX_REPLACEMENTS} of them in a row"
        )
        cure = "remove them or raise data.max_broken" if complete else "remove them"
        raise DataError(
            f"{total} of {self._num_read} images read are broken ({causes}), {why}; {cure}. First: {first}.{listed}"
        )


def evaluation_batches(
    source: Source,
    views: ViewBuilder,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    on_broken: Callable[[Broken], None] | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The evaluation views of a source in order, before `prepare`, with labels; broken images are left out.

    Args:
        batch_size: images per batch; a batch with broken images is smaller.
        indices: which samples, by default all.
        on_broken: told every broken sample, with its index as position.

    Yields:
        ({"x": (b, C, H, W)}, labels (b,) int64 with -1 where a sample has none), both on the CPU.
    """
    wanted = range(len(source)) if indices is None else indices
    requests = (list(wanted[i : i + batch_size]) for i in range(0, len(wanted), batch_size))
    reader = _EvaluationReader(source, views)
    for images, labels, broken in prefetch(reader, requests, workers=workers, remote=source.remote):
        for sample in broken if on_broken else ():
            on_broken(sample)
        if images is not None:
            yield {"x": images}, labels


class Request(NamedTuple):
    """What a worker is asked for: plain numbers, which travel to it faster than tensors."""

    step: int
    micro: int
    positions: list[int]
    indices: list[int]


class TrainingReader:
    """Reads one micro-batch per call, in a worker."""

    def __init__(self, source: Source, views: ViewBuilder, seed: int, views_per_image: int | None = None) -> None:
        self.source, self.views, self.seed, self.views_per_image = source, views, seed, views_per_image

    def __getitem__(self, request: Request) -> tuple[Request, dict[str, Tensor] | None, list[Broken]]:
        """The request, its batch (None if a position found no usable sample) and the broken samples."""
        broken: list[Broken] = []
        samples = []
        rand = None
        if self.views_per_image is None:
            rand = rng.uniform(self.seed, "views", torch.tensor(request.positions), self.views.num_random)
        for number, (position, index) in enumerate(zip(request.positions, request.indices, strict=True)):
            sample = self._sample(position, index, None if rand is None else rand[number], broken)
            if sample is None:
                return request, None, broken
            samples.append(sample)
        return request, self.views.collate(samples), broken

    def fixed_view(self, index: int, number: int) -> dict[str, Tensor]:
        """One of the fixed views of a sample: its crop follows from the sample and the number alone.

        Raises:
            BrokenImage: if the sample cannot be used.
        """
        place = torch.tensor([index * self.views_per_image + number])
        row = rng.uniform(self.seed, "fixed views", place, self.views.num_random)[0]
        return self.views.for_sample(self.source.read(index), row, index, number)

    def _sample(self, position: int, index: int, row: Tensor | None, broken: list[Broken]) -> dict[str, Tensor] | None:
        """The views of the sample, or of the first usable one of those that this position falls back to."""
        for attempt in range(1 + MAX_REPLACEMENTS):
            try:
                if row is None:
                    return self.fixed_view(index, position // len(self.source) % self.views_per_image)
                return self.views.for_sample(self.source.read(index), row, index, 0)
            except BrokenImage as error:
                broken.append(Broken(position, index, error.name, error.cause, error.detail))
            bits = rng.random_bits(self.seed, "replacement", torch.tensor([position]), MAX_REPLACEMENTS)
            index = int(bits[0, min(attempt, MAX_REPLACEMENTS - 1)] % len(self.source))
        return None


class _EvaluationReader:
    """Reads the evaluation views of some indices per call, in a worker."""

    def __init__(self, source: Source, views: ViewBuilder) -> None:
        self.source, self.views = source, views

    def __getitem__(self, indices: list[int]) -> tuple[Tensor | None, Tensor, list[Broken]]:
        images, labels, broken = [], [], []
        for index in indices:
            try:
                sample = self.source.read(index)
                images.append(self.views.evaluation_view(sample))
                labels.append(-1 if sample.label is None else sample.label)
            except BrokenImage as error:
                broken.append(Broken(index, index, error.name, error.cause, error.detail))
        return torch.stack(images) if images else None, torch.tensor(labels, dtype=torch.int64), broken


def prefetch(
    reader: Any,
    requests: Iterable[Any],
    *,
    workers: int,
    remote: bool,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """`reader[request]` for every request, in order, read ahead by `workers` processes."""
    with warnings.catch_warnings(), _signals_held_back():
        # torchdata 0.11 calls this on every construction; torch has deprecated it
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
        # Python 3.12 warns of a fork beside other threads; the workers use no lock that torch's threads could hold
        warnings.filterwarnings("ignore", message=".*use of fork\\(\\)", category=DeprecationWarning)
        return iter(
            StatefulDataLoader(
                reader,
                batch_size=None,  # one request is one batch already
                sampler=requests,
                num_workers=workers,
                collate_fn=_unchanged,
                prefetch_factor=prefetch_factor if workers else None,
                multiprocessing_context=_context(remote) if workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_outlive_the_signals_to_the_job,
                generator=torch.Generator(),  # it draws a seed that nothing uses: leave the global generator alone
                snapshot_every_n_steps=None,
            )
        )


def _context(remote: bool) -> multiprocessing.context.BaseContext:
    """Fork is fastest, but the threads and connections of a remote file system do not survive it."""
    if sys.platform == "linux" and not remote:
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Workers, and a fork server, start with the signals blocked: none can end one before it has its handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_the_signals_to_the_job(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a job, SIGTERM often twice, as a launcher passes it on.

    They are for the training process, which still wants batches until it has saved. A later SIGTERM is for the worker.
    """
    first: float | None = None

    def on_sigterm(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        first = now if first is None else first
        if now - first > SIGNAL_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _unchanged(batch: Any) -> Any:
    return batch
