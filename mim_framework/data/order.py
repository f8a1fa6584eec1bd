"""Which sample stands at which position of a run.

Position p of the run is the same sample with the same crop on any number of ranks, accumulation steps and workers, and
after a resume: `BatchLayout` says which positions a micro-batch holds, `SampleOrder` which sample stands at a position.
Every order is a pure function of the position, and every epoch of it holds each sample once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.contract.components import Source

OrderKind = Literal["shuffled", "blocks", "sequential"]


@dataclass(frozen=True)
class BatchLayout:
    """How the positions of an optimizer step are dealt to micro-batches and ranks.

    `total_batch_size` images per optimizer step over all ranks, `batch_size` per rank and micro-batch. `left_out` are
    ranges [first, end) of steps whose images are not used, in order and apart: later steps read on behind them.
    """

    total_batch_size: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    left_out: tuple[tuple[int, int], ...] = ()

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

    def data_step(self, step: int) -> int:
        """The step whose images an optimizer step reads, if none were left out."""
        for first, end in self.left_out:
            if step >= first:
                step += end - first
        return step

    def positions(self, step: int, micro: int) -> range:
        """The global positions of this rank's micro-batch `micro` in optimizer step `step`, both from 0."""
        start = self.data_step(step) * self.total_batch_size + (micro * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


class SampleOrder:
    """Position in the run -> index of the sample: every epoch is a new random order of all samples."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self._seed, self._num_samples = seed, num_samples
        self._drawn: dict[int, Tensor] = {}

    def indices(self, positions: Iterable[int]) -> list[int]:
        return [self.index(*divmod(position, self._num_samples)) for position in positions]

    def index(self, epoch: int, place: int) -> int:
        """The sample at a place of an epoch, both from 0."""
        return int(self._kept(epoch, lambda: rng.permutation(self._seed, f"epoch {epoch}", self._num_samples))[place])

    def _kept(self, key: int, draw: Callable[[], Tensor]) -> Tensor:
        """What was drawn for a key, kept for the last two: a batch can reach into the next one."""
        if key not in self._drawn:
            while len(self._drawn) > 1:
                del self._drawn[min(self._drawn)]
            self._drawn[key] = draw()
        return self._drawn[key]


class SequentialOrder(SampleOrder):
    """Every epoch is the order of the source."""

    def index(self, epoch: int, place: int) -> int:
        return place


class BlockOrder(SampleOrder):
    """Every epoch is a new random order of blocks, so many of which at a time are shuffled into each other.

    An epoch's blocks are permuted and then taken in windows of `window` blocks; the samples of a window are permuted.
    So a reader needs one window of blocks at a time, and what is kept is an order of the blocks and of two windows.
    """

    def __init__(self, seed: int, blocks: Sequence[int], window: int) -> None:
        super().__init__(seed, sum(blocks))
        self._lengths = torch.tensor(blocks)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._window = window
        self._num_windows = -(-len(blocks) // window)
        self._epochs: dict[int, tuple[list[Tensor], list[int]]] = {}

    def index(self, epoch: int, place: int) -> int:
        windows, ends = self._windows(epoch)
        number = bisect_right(ends, place)
        first = ends[number - 1] if number else 0
        samples = self._kept(
            epoch * self._num_windows + number,
            lambda: self._shuffled(windows[number], f"window {number} of epoch {epoch}"),
        )
        return int(samples[place - first])

    def _windows(self, epoch: int) -> tuple[list[Tensor], list[int]]:
        """The blocks of each window of an epoch, and the place after its last sample."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            windows = rng.permutation(self._seed, f"blocks of epoch {epoch}", len(self._lengths)).split(self._window)
            ends = accumulate(int(self._lengths[blocks].sum()) for blocks in windows)
            self._epochs[epoch] = list(windows), list(ends)
        return self._epochs[epoch]

    def _shuffled(self, blocks: Tensor, stream: str) -> Tensor:
        """Indices of the samples of some blocks, in random order."""
        samples = [torch.arange(int(self._lengths[b])) + self._starts[b] for b in blocks]
        together = torch.cat(samples)
        return together[rng.permutation(self._seed, stream, len(together))]


def sample_order(kind: OrderKind, source: Source, seed: int, window: int) -> SampleOrder:
    """The order in which a run reads a source.

    Args:
        window: blocks that are shuffled into each other, where `kind` is `blocks`.

    Raises:
        DataError: if the source has no blocks, or they are not its samples.
    """
    if kind == "shuffled":
        return SampleOrder(seed, len(source))
    if kind == "sequential":
        return SequentialOrder(seed, len(source))
    if source.blocks is None:
        raise DataError(
            f"data.order: blocks, but data.source '{source.name}' has none: its samples cost the same in any order; "
            "use data.order=shuffled"
        )
    if (shortest := min(source.blocks, default=0)) < 0:
        raise DataError(f"data.source '{source.name}' says that it has a block of {shortest} samples")
    if sum(source.blocks) != len(source):
        raise DataError(
            f"data.source '{source.name}' says that its {len(source.blocks):,} blocks hold {sum(source.blocks):,} "
            f"samples, but it has {len(source):,}"
        )
    return BlockOrder(seed, source.blocks, window)
