"""Reading and building the views of one micro-batch, in a worker; broken samples are replaced by others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.contract.components import Source, ViewBuilder
from mim_framework.data.decode import BrokenImage

MAX_REPLACEMENTS = 16
"""So many samples in a row may be broken before a position is given up."""


@dataclass(frozen=True)
class Broken:
    """A sample that could not be used: `index` in the source, at `position` of the run. `cause` as in `BrokenImage`."""

    position: int
    index: int
    name: str
    cause: str
    detail: str


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
