"""Reading and building the views of one micro-batch, in a worker; broken samples are replaced by others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.contract.components import Source, ViewBuilder, sample_or_broken
from mim_framework.contract.records import Sample
from mim_framework.data.companions import Companion
from mim_framework.data.stores import REMOTE

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

    @classmethod
    def of(cls, position: int, index: int, error: BrokenImage) -> Broken:
        """What an error says of the sample."""
        return cls(position, index, error.name, error.cause, error.detail)


class Request(NamedTuple):
    """What a worker is asked for: plain numbers, which travel to it faster than tensors."""

    positions: list[int]
    indices: list[int]


class ReadSample(NamedTuple):
    """The views of a sample by name, and what each companion has beside them."""

    views: dict[str, Tensor]
    beside: list[Tensor]


def read_each(source: Source, indices: Sequence[int]) -> Iterator[Sample | BrokenImage]:
    """The samples at `indices`, in order, a broken one in its place.

    Read together only where the source has a way of its own for it: the encoded images of a micro-batch are many bytes.

    Raises:
        DataError: if `read_many` of the source gives another number of samples.
    """
    if type(source).read_many is Source.read_many:
        yield from (sample_or_broken(source, index) for index in indices)
        return
    found = source.read_many(indices)
    if len(found) != len(indices):
        raise DataError(f"data.source '{source.name}': read_many gave {len(found)} samples for {len(indices)} indices")
    yield from found


@dataclass(frozen=True)
class Read:
    """The answer to a request.

    `views` is None if a position found no usable sample, or if there is an `error` that ends the run: raised in a
    worker, its text would be one of a traceback. `remote` holds the counts of `stores.REMOTE`.
    """

    request: Request
    views: dict[str, Tensor] | None
    broken: list[Broken]
    remote: dict[str, int]
    error: DataError | None = None


class TrainingReader:
    """Reads one micro-batch per call, in a worker: views, and the companions that travel beside them."""

    def __init__(
        self,
        source: Source,
        views: ViewBuilder,
        seed: int,
        views_per_image: int | None = None,
        companions: Sequence[Companion] = (),
    ) -> None:
        self.source, self.views, self.seed, self.views_per_image = source, views, seed, views_per_image
        self.companions = companions

    def __getitem__(self, request: Request) -> Read:
        broken: list[Broken] = []
        views, error = None, None
        try:
            views = self._batch(request, broken)
        except DataError as raised:
            error = raised
        return Read(request, views, broken, REMOTE.take(), error)

    def _batch(self, request: Request, broken: list[Broken]) -> dict[str, Tensor] | None:
        samples = []
        rows: Iterable[Tensor | None] = repeat(None, len(request.positions))
        if self.views_per_image is None:
            rows = rng.uniform(self.seed, "views", torch.tensor(request.positions), self.views.num_random)
        found = read_each(self.source, request.indices)
        for position, index, sample, row in zip(request.positions, request.indices, found, rows, strict=True):
            usable = self._usable(position, index, sample, row, broken)
            if usable is None:
                return None
            samples.append(usable)
        return self.collate(samples)

    def collate(self, samples: list[ReadSample]) -> dict[str, Tensor]:
        """Samples of one micro-batch, in order, to a batch of views and companions."""
        batch = self.views.collate([sample.views for sample in samples])
        for number, companion in enumerate(self.companions):
            batch[companion.spec.name] = torch.stack([sample.beside[number] for sample in samples])
        return batch

    def fixed_view(self, sample: Sample | BrokenImage, index: int, number: int) -> ReadSample:
        """One of the fixed views of the sample at `index`: its crop follows from the index and the number alone.

        Raises:
            BrokenImage: if the sample cannot be used.
        """
        place = torch.tensor([index * self.views_per_image + number])
        row = rng.uniform(self.seed, "fixed views", place, self.views.num_random)[0]
        return self._read(sample, row, index, number)

    def _usable(
        self, position: int, index: int, sample: Sample | BrokenImage, row: Tensor | None, broken: list[Broken]
    ) -> ReadSample | None:
        """The sample, or the first usable one of those that this position falls back to."""
        for attempt in range(1 + MAX_REPLACEMENTS):
            if attempt:
                index = self._replacement(position, attempt - 1)
                sample = sample_or_broken(self.source, index)
            try:
                if row is None:
                    return self.fixed_view(sample, index, position // len(self.source) % self.views_per_image)
                return self._read(sample, row, index, 0)
            except BrokenImage as error:
                broken.append(Broken.of(position, index, error))
        return None

    def _replacement(self, position: int, number: int) -> int:
        """Index of the sample that a position falls back to, the first one with number 0."""
        bits = rng.random_bits(self.seed, "replacement", torch.tensor([position]), MAX_REPLACEMENTS)
        return int(bits[0, number] % len(self.source))

    def _read(self, sample: Sample | BrokenImage, row: Tensor, index: int, number: int) -> ReadSample:
        if isinstance(sample, BrokenImage):
            raise sample
        views = self.views(sample, row)
        return ReadSample(views, [companion(sample, index, number) for companion in self.companions])


class EvaluationRead(NamedTuple):
    """Evaluation views of the samples that can be used, None if none can; their labels, -1 where there is none.

    `names`: index and name of each.
    """

    views: dict[str, Tensor] | None
    labels: Tensor
    broken: list[Broken]
    names: list[tuple[int, str]]


class _EvaluationReader:
    """Reads the evaluation views of some indices per call, in a worker."""

    def __init__(self, source: Source, views: ViewBuilder) -> None:
        self.source, self.views = source, views

    def __getitem__(self, indices: list[int]) -> EvaluationRead | DataError:
        """The batch, or the error that ends the evaluation, as in `TrainingReader`."""
        try:
            return self._batch(indices)
        except DataError as error:
            return error

    def _batch(self, indices: list[int]) -> EvaluationRead:
        images, labels, broken, names = [], [], [], []
        for index, sample in zip(indices, read_each(self.source, indices), strict=True):
            try:
                if isinstance(sample, BrokenImage):
                    raise sample
                images.append(self.views.evaluation_view(sample))
                labels.append(-1 if sample.label is None else sample.label)
                names.append((index, sample.name))
            except BrokenImage as error:
                broken.append(Broken.of(index, index, error))
        found = [named(each) for each in images]
        batch = {name: torch.stack([each[name] for each in found]) for name in found[0]} if found else None
        return EvaluationRead(batch, torch.tensor(labels, dtype=torch.int64), broken, names)


def named(view: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """An evaluation view by name: "x" where a builder gives one alone."""
    return view if isinstance(view, dict) else {"x": view}
