"""Batches of a run: prefetched, counted, and stopped where too many images are broken. Start at `Loader`."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mim_framework.base.errors import DataError
from mim_framework.base.files import SideFile
from mim_framework.base.section import Choice, LocalPath, Section
from mim_framework.contract.components import Source, ViewBuilder
from mim_framework.data.companions import Companion
from mim_framework.data.order import BatchLayout, OrderKind, sample_order
from mim_framework.data.prefetch import prefetch
from mim_framework.data.reader import MAX_REPLACEMENTS, Broken, Request, TrainingReader, _EvaluationReader

TOLERATED_BROKEN = 10
"""So many broken images are accepted whatever their share, so that a run does not stop at its first batch."""


class DataSection(Section):
    """Where the images come from and how they are read."""

    source: Choice
    """Where the images come from."""
    order: OrderKind = "shuffled"
    """`shuffled`: every epoch is a new random order of all images. `blocks`: a random order of the source's blocks, for
    example shards, of which `order_window` at a time are shuffled into each other; cheap where they lie behind a
    network. `sequential`: the source's own order in every epoch."""
    order_window: int = Field(16, ge=1)
    """Blocks that are shuffled into each other with `order: blocks`; a worker has to hold about so many."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes per rank that read and decode; 0 reads in the training process, `auto` follows the processor cores."""
    prefetch_factor: int = Field(2, ge=1)
    """Micro-batches that every worker prepares ahead."""
    max_broken: float = Field(0.01, ge=0, le=1)
    """Share of the images read so far that may be broken; above it the run stops. 10 on a rank are always tolerated.
    A broken image is replaced by another one, chosen by its position in the run."""
    accept_changed_source: bool = False
    """Go on with a run although its source has other images than when its checkpoint was written: others then stand
    where those stood. Recorded in `source_changes.jsonl` of the run directory."""
    views_per_image: int | None = Field(None, gt=0)
    """Every image is seen in so many fixed views, one per epoch in turn; null for a new random view in every epoch."""
    tokens: LocalPath | None = Field(None, min_length=1)
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


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch on the device: views with their companions, positions (B,); `broken` samples were replaced."""

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
        companions: Sequence[Companion] = (),
    ) -> None:
        """`on_broken` is told every broken sample; in `run_dir` they are listed as broken_images.rankR.jsonl.

        Raises:
            DataError: if the source has no blocks and the section wants an order of them, or the views cannot take a
                micro-batch of this size.
        """
        self.section, self.source, self.views, self.companions = section, source, views, companions
        self.seed, self.layout = seed, layout
        size, multiple = layout.batch_size, views.batch_multiple
        if size % multiple:
            raise DataError(
                f"train.batch_size: {size} images per rank and micro-batch are no multiple of {multiple}, as views "
                f"'{views.name}' need to mix them; use {size + -size % multiple}, for example"
            )
        self.order = sample_order(section.order, source, seed, section.order_window)
        self.start_step, self.total_steps = start_step, total_steps
        self.device = device
        self.wait_seconds = 0.0
        self.broken_counts: Counter[str] = Counter()
        self._first_broken: list[Broken] = []
        self._num_read = 0
        self._on_broken = on_broken
        name = f"broken_images.rank{layout.rank}.jsonl"
        self._broken_list = None if run_dir is None else SideFile(Path(run_dir) / name)

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DataError: if more images are broken than `max_broken` allows, or a sample lacks what the recipe needs.
        """
        reader = TrainingReader(self.source, self.views, self.seed, self.section.views_per_image, self.companions)
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
                if isinstance(read, DataError):
                    raise read
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
        for step in range(self.start_step, self.total_steps):
            for micro in range(self.layout.accum_steps):
                positions = self.layout.positions(step, micro)
                yield Request(step, micro, list(positions), self.order.indices(positions))

    def _record(self, request: Request, broken: list[Broken], complete: bool) -> None:
        """Count and list broken samples, and stop above the budget."""
        self._num_read += len(broken) + (len(request.positions) if complete else 0)
        if not broken:
            return
        self.broken_counts.update(sample.cause for sample in broken)
        self._first_broken = (self._first_broken + broken)[:3]
        if self._broken_list is not None:
            self._broken_list.append(json.dumps(asdict(sample)) for sample in broken)
        if self._on_broken is not None:
            for sample in broken:
                self._on_broken(sample)
        total, allowed = self.broken_counts.total(), self.section.max_broken
        if complete and (total <= TOLERATED_BROKEN or total <= allowed * self._num_read):
            return
        causes = ", ".join(f"{count} {cause}" for cause, count in self.broken_counts.most_common())
        first = "; ".join(f"{sample.name} ({sample.detail})" for sample in self._first_broken)
        listed = "" if self._broken_list is None else f" All are listed in {self._broken_list.path}."
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
        ({"x": (b, C, H, W)} or more views, labels (b,) int64 with -1 where a sample has none), both on the CPU.
    """
    wanted = range(len(source)) if indices is None else indices
    requests = (list(wanted[i : i + batch_size]) for i in range(0, len(wanted), batch_size))
    reader = _EvaluationReader(source, views)
    for batch, labels, broken in prefetch(reader, requests, workers=workers, remote=source.remote):
        for sample in broken if on_broken else ():
            on_broken(sample)
        if batch is not None:
            yield batch, labels
