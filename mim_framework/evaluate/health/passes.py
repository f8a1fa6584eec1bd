"""Images for `health`, and passes over them that ranks share: the same images and draws on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.contract.components import Source, ViewBuilder
from mim_framework.contract.evaluation import Split, Subject
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent
from mim_framework.data.prefetch import prefetch
from mim_framework.data.reader import named


@dataclass(frozen=True)
class Chunk:
    """Some images, before `prepare`, on the CPU; the views of one image stand side by side.

    `images`: how many; 0 of a made-up one, for a rank that has none left while others make a pass. `start`: the place
    of the first one among all.
    """

    batch: dict[str, Tensor]
    images: int
    start: int


def kept_aside(subject: Subject) -> Split:
    """The images that training has not seen, "test", or "train" where a source keeps none."""
    try:
        subject.source("test")
    except DataError:
        return "train"
    return "test"


def a_choice(source: Source, count: int, skip: int = 0) -> list[int]:
    """Places of `count` images, or as many as there are; always the same, and others after `skip` of them."""
    return rng.permutation(0, "health", len(source))[skip : skip + count].tolist()


class _FixedViews:
    """Reads in a worker, per call, some images: for each its views of training, whose draws follow from its place.

    With `count` 0, its evaluation view. A broken image is left out.
    """

    def __init__(self, source: Source, views: ViewBuilder, count: int) -> None:
        self.source, self.views, self.count = source, views, count

    def __getitem__(self, places: list[int]) -> list[list[dict[str, Tensor]]] | DataError:
        found = []
        for place in places:
            try:
                found.append(self._views(place))
            except BrokenImage:
                continue
            except DataError as error:
                return error
        return found

    def _views(self, place: int) -> list[dict[str, Tensor]]:
        sample = self.source.read(place)
        if not self.count:
            return [named(self.views.evaluation_view(sample))]
        positions = place * self.count + torch.arange(self.count)
        rows = rng.uniform(0, "views of health", positions, self.views.num_random)
        return [self.views(sample, row) for row in rows]


def chunks(subject: Subject, split: Split, places: Sequence[int], *, views: int, at_once: int) -> Iterator[Chunk]:
    """This rank's share of some images, in chunks that are the same on any number of ranks.

    Every rank gets equally many chunks.

    Args:
        views: views of training of each image, drawn by its place; 0 for its evaluation view.
        at_once: images of a chunk; rounded up to what the views need to mix.

    Raises:
        DataError: if images cannot be read that are not broken.
    """
    source, world, multiple = subject.source(split), subject.world, subject.views.batch_multiple
    at_once += -at_once % multiple
    every = [list(places[start : start + at_once]) for start in range(0, len(places), at_once)]
    own = every[world.rank :: world.size]
    read = prefetch(
        _FixedViews(source, subject.views, views), own, workers=subject.workers, remote=source.remote
    )  # fmt: skip
    for turn in range(ceil(len(every) / world.size)):
        found = next(read) if turn < len(own) else []
        if isinstance(found, DataError):
            raise found
        found = found[: len(found) - len(found) % multiple]
        batch = (
            subject.views.collate([view for of_one in found for view in of_one]) if found else _made_up(subject, views)
        )
        yield Chunk(batch, len(found), (turn * world.size + world.rank) * at_once)


def _made_up(subject: Subject, views: int) -> dict[str, Tensor]:
    return subject.views.example(max(views, 1) * subject.views.batch_multiple)


def on_device(batch: dict[str, Tensor], subject: Subject) -> dict[str, Tensor]:
    return {name: view.to(subject.device) for name, view in batch.items()}


def encoded(subject: Subject, batch: dict[str, Tensor], ask: Ask = Ask()) -> Latent:
    """The encoder's answer to a batch before `prepare`, of which nothing is hidden; `frozen` is the caller's."""
    spec, views = subject.spec, subject.views.prepare(None, on_device(batch, subject))
    masks = {name: Mask.none(len(views[name]), spec.of(name).grid, subject.device) for name in spec.views}
    return subject.encoder.encode(views, masks, ask)


def summed(values: Tensor, subject: Subject) -> Tensor:
    """float64 sums over all ranks, on the CPU."""
    return subject.world.sum(values.to(subject.device)).cpu() if subject.world.size > 1 else values.cpu()


def gathered(rows: list[Tensor], per_rank: int, subject: Subject) -> Tensor:
    """Rows (n, ...) that each rank found, at most `per_rank` in every tensor, of all ranks together on the CPU."""
    padded = [torch.cat([each, each.new_zeros(per_rank - len(each), *each.shape[1:])]) for each in rows]
    real = torch.cat([torch.arange(per_rank, device=subject.device) < len(each) for each in rows])
    return subject.world.gather(torch.cat(padded))[subject.world.gather(real)].cpu()
