"""Batches of a run: prefetched, counted, and stopped where too many images are broken. Start at `Loader`."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NoReturn, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mim_framework.base.errors import Cause, DataError
from mim_framework.base.files import SideFile, content_of, replace_file
from mim_framework.base.section import Choice, LocalPath, Section
from mim_framework.base.text import plain_logger
from mim_framework.contract.components import Source, ViewBuilder
from mim_framework.data.companions import Companion
from mim_framework.data.order import BatchLayout, OrderKind, sample_order
from mim_framework.data.prefetch import prefetch
from mim_framework.data.reader import (
    MAX_REPLACEMENTS,
    Broken,
    EvaluationRead,
    Read,
    Request,
    TrainingReader,
    _EvaluationReader,
)
from mim_framework.data.stores import REMOTE

logger = plain_logger(__name__)

TOLERATED_BROKEN = 10
"""So many broken images are accepted whatever their share, so that a run does not stop at its first batch."""
OF_THE_SERVER = ("retries", "unreachable")
"""Counts that do not follow from the images: tries of remote reads that were repeated, and reads that were given up."""
COUNTED = ("read", *(f"broken/{cause}" for cause in get_args(Cause)), "broken/other", *OF_THE_SERVER)
"""What a loader counts: images read, broken ones by cause, and what servers did."""


class SourceChoice(Choice):
    """A source at another key than `source`."""

    kind: ClassVar[str] = "source"


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
    A broken image is replaced by another one, chosen by its position in the run; one that a server does not deliver is
    not broken: the run saves and stops."""
    eval_source: SourceChoice | None = None
    """Images by which encoders are judged, which evaluations do not learn from. By default those that `source` keeps
    aside, as `digits` and `torchvision` do. A source that has such a part is judged by it, and learned from by the
    rest; with any other, evaluations learn from `source`, whose classes it must have."""
    eval_train_source: SourceChoice | None = None
    """Images that evaluations learn from, if others than `source`, such as the labelled ones where it has no labels."""
    accept_changed_source: bool = False
    """Go on with a run although its source has other images than when its checkpoint, or the ids of `tokens`, were
    written: others then stand where those stood. Recorded in `source_changes.jsonl` of the run directory."""
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

    When reading fails in the middle, `failure` is set and the batches of that step still come, with the images of the
    last one in them: so all ranks end the step, which does not count, and save what they have. `fit` raises the error.
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
        counted: Mapping[str, int] | None = None,
        finish_step: bool = False,
    ) -> None:
        """`on_broken` is told every broken sample; in `run_dir` they are listed as broken_images.rankR.jsonl.

        Args:
            counted: what this rank counted before `start_step`, as `counts` gave it.
            finish_step: set `failure` where there is a batch before, instead of raising it at once.

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
        if section.order == "blocks":
            source.expect_blocks(section.order_window)
        self.start_step, self.total_steps = start_step, total_steps
        self.device = device
        self.wait_seconds = 0.0
        self.failure: DataError | None = None
        self.finish_step = finish_step
        self._counts = Counter({name: (counted or {}).get(name, 0) for name in COUNTED})
        self._counts_before_step = self._counts.copy()
        self._first_broken: list[Broken] = []
        self._on_broken = on_broken
        name = f"broken_images.rank{layout.rank}.jsonl"
        self._broken_list = None if run_dir is None else SideFile(Path(run_dir) / name)
        if run_dir is not None:
            first = layout.positions(start_step, 0).start - layout.rank * layout.batch_size
            _keep_lists_before(first, Path(run_dir), layout)

    @property
    def broken_counts(self) -> Counter[str]:
        """Broken images by cause."""
        broken = {name: count for name, count in self._counts.items() if name.startswith("broken/") and count}
        return Counter({name.removeprefix("broken/"): count for name, count in broken.items()})

    def counts(self, *, before_step: bool = False) -> dict[str, int]:
        """Everything of `COUNTED` on this rank so far, or before the step that is being read."""
        return dict(self._counts_before_step if before_step else self._counts)

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DataError: if more images are broken than `max_broken` allows, a sample lacks what the recipe needs, a store
                is unreachable or a worker was killed.
        """
        last: Batch | None = None
        for step, micro, batch in self._batches():
            if not isinstance(batch, DataError):
                last = batch
                yield batch
                continue
            if last is None or not self.finish_step:
                raise batch
            self.failure = batch
            yield Batch(last.views, last.positions, step, micro, [])
            if micro + 1 == self.layout.accum_steps:
                raise batch

    def _batches(self) -> Iterator[tuple[int, int, Batch | DataError]]:
        """Every (step, micro) with its batch, or from one on with the error that ends reading."""
        reader = TrainingReader(self.source, self.views, self.seed, self.section.views_per_image, self.companions)
        batches = prefetch(
            reader,
            self._requests(),
            workers=self.section.num_workers,
            prefetch_factor=self.section.prefetch_factor,
            remote=self.source.remote,
            pin_memory=self.device.type == "cuda",
        )
        failure: DataError | None = None
        self._counts.update(REMOTE.take())  # of the listing
        try:
            for step, micro in self._places():
                if micro == 0:
                    self._counts_before_step = self._counts.copy()
                asked = time.perf_counter()
                try:
                    if failure is None:
                        read = next(batches)
                        self._record(read)
                except DataError as error:
                    failure = error
                if failure is not None:
                    yield step, micro, failure
                    continue
                views = {name: view.to(self.device, non_blocking=True) for name, view in read.views.items()}
                # Made on the device: a copy of a list would wait for it.
                first, last = read.request.positions[0], read.request.positions[-1]
                positions = torch.arange(first, last + 1, device=self.device)
                self.wait_seconds += time.perf_counter() - asked
                yield step, micro, Batch(views, positions, step, micro, read.broken)
        finally:
            del batches  # ends the workers now, also where the traceback of an error would keep them alive

    def _places(self) -> Iterator[tuple[int, int]]:
        """Every step with each of its micro-batches."""
        return product(range(self.start_step, self.total_steps), range(self.layout.accum_steps))

    def _requests(self) -> Iterator[Request]:
        for step, micro in self._places():
            positions = self.layout.positions(step, micro)
            yield Request(list(positions), self.order.indices(positions))

    def _record(self, read: Read) -> None:
        """Count and list broken samples, and stop above the budget or where the reader gave up."""
        request, broken, complete = read.request, read.broken, read.views is not None
        self._counts["read"] += len(broken) + (len(request.positions) if complete else 0)
        self._counts.update(read.remote)
        self._counts.update(_counted_as(sample.cause) for sample in broken)
        self._first_broken = (self._first_broken + broken)[:3]
        if self._broken_list is not None and broken:
            self._broken_list.append(json.dumps(asdict(sample)) for sample in broken)
        if self._on_broken is not None:
            for sample in broken:
                self._on_broken(sample)
        if read.error is not None:
            raise read.error
        accepted = within_budget(self.broken_counts, self._counts["read"], self.section.max_broken)
        if broken and not (complete and accepted):
            self._give_up(complete)

    def _give_up(self, complete: bool) -> NoReturn:
        total, allowed = self.broken_counts.total(), self.section.max_broken
        causes = told_causes(self.broken_counts)
        first = "; ".join(f"{sample.name} ({sample.detail})" for sample in self._first_broken)
        listed = "" if self._broken_list is None else f" All are listed in {self._broken_list.path}."
        why = (
            f"more than data.max_broken={allowed:g} allows" if complete else f"{1 + MAX_REPLACEMENTS} of them in a row"
        )
        cure = "remove them or raise data.max_broken" if complete else "remove them"
        num_read = self._counts["read"]
        raise DataError(
            f"{total} of {num_read} images read are broken ({causes}), {why}; {cure}. First: {first}.{listed}"
        )


def _counted_as(cause: str) -> str:
    return f"broken/{cause if cause in get_args(Cause) else 'other'}"


def within_budget(broken: Counter[str], num_read: int, allowed: float) -> bool:
    """Whether so many broken images, by cause, of so many that were read are accepted; `allowed` is a share."""
    total = broken.total()
    return total <= TOLERATED_BROKEN or total <= allowed * num_read


def told_causes(broken: Counter[str]) -> str:
    """'3 empty, 1 truncated', the most frequent first."""
    return ", ".join(f"{count} {cause}" for cause, count in broken.most_common())


def _keep_lists_before(position: int, run_dir: Path, layout: BatchLayout) -> None:
    """Take out of the lists of broken images what a run read at this position or later and will now read again.

    Every rank looks after its own list, and rank 0 after those of ranks that are no more.
    """
    for path in run_dir.glob("broken_images.rank*.jsonl"):
        rank = path.name.split(".")[1].removeprefix("rank")
        if not rank.isdigit() or min(int(rank), layout.world_size) % layout.world_size != layout.rank:
            continue
        try:
            lines = content_of(path).splitlines(keepends=True)
            kept = [line for line in lines if _position_of(line) < position]
            if len(kept) < len(lines):
                replace_file(path, b"".join(kept))
        except OSError as error:
            logger.warning(f"{path} may list images twice: {error.strerror}")


def _position_of(line: bytes) -> float:
    """That of a broken image, infinite for a line that a crash tore."""
    try:
        return float(json.loads(line)["position"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


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
    for read in evaluation_reads(source, views, batch_size, indices=indices, workers=workers):
        for sample in read.broken if on_broken else ():
            on_broken(sample)
        if read.views is not None:
            yield read.views, read.labels


def evaluation_reads(
    source: Source,
    views: ViewBuilder,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[EvaluationRead]:
    """As `evaluation_batches`, with the names of samples, and with the broken ones.

    Raises:
        DataError: if the source cannot be read any more.
    """
    wanted = range(len(source)) if indices is None else indices
    requests = (list(wanted[i : i + batch_size]) for i in range(0, len(wanted), batch_size))
    reader = _EvaluationReader(source, views)
    for read in prefetch(reader, requests, workers=workers, remote=source.remote, pin_memory=pin_memory):
        if isinstance(read, DataError):
            raise read
        yield read
