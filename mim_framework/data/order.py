"""Which sample stands at which position of a run.

Position p of the run is the same sample with the same crop on any number of ranks, accumulation steps and workers, and
after a resume: `BatchLayout` says which positions a micro-batch holds, `SampleOrder` which sample stands at a position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from mim_framework.base import rng


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
