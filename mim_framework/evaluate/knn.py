"""What frozen features are worth: weighted k-nearest-neighbour classification, during a run and after it.

Start at `knn_predict`; `online_knn` is what a run calls.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder, Source, ViewBuilder
from mim_framework.contract.mask import Mask
from mim_framework.contract.specs import EncoderSpec
from mim_framework.contract.world import World
from mim_framework.data.loader import evaluation_batches
from mim_framework.evaluate.base import evaluation_mode

MAX_RAW_SIDE = 32
"""Raw pixels are compared at this size at most, as larger images would not fit into memory."""
_SIMILARITIES_AT_ONCE = 2**24


class KNNSection(Section):
    """k-nearest-neighbour classification on frozen features, where the source has labels."""

    every_epochs: float = Field(20.0, ge=0)
    """Epochs between two evaluations; 0 for one at the end only."""
    k: int = Field(20, gt=0)
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour votes with the weight exp(cosine similarity / temperature)."""
    pool: Literal["mean", "cls"] = "mean"
    """Feature of an image: the mean of its patch tokens, or the class token."""
    max_train: int = Field(50_000, gt=0)
    """Labelled images that can be neighbours; of a larger set, a fixed random choice."""
    max_test: int = Field(10_000, gt=0)
    """Images that are classified; of a larger set, a fixed random choice."""
    batch_size: int = Field(256, gt=0)
    """Images per forward pass."""


class EvaluateSection(Section):
    """What is measured on the way."""

    knn: KNNSection | None = KNNSection()
    """k-nearest-neighbour classification; null for none."""


def knn_predict(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """train_x (n, D), train_y (n,), test_x (m, D) -> classes (m,) int64.

    The k training features of highest cosine similarity vote for their class with weight exp(similarity / temperature),
    as in Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4.
    """
    k = min(k, len(train_x))
    chunk = max(1, _SIMILARITIES_AT_ONCE // len(train_x))
    with torch.autocast(train_x.device.type, enabled=False):  # bfloat16 would blur which neighbours are nearest
        train_x = normalize(train_x.float()).t()
        predicted = []
        for part in normalize(test_x.float()).split(chunk):
            similarity, neighbours = (part @ train_x).topk(k)
            votes = torch.zeros(len(part), num_classes, device=part.device)
            votes.scatter_add_(1, train_y[neighbours], (similarity / temperature).exp())
            predicted.append(votes.argmax(1))
    return torch.cat(predicted)


Extract = Callable[[Tensor], Tensor]
"""Prepared view (B, C, H, W) -> features (B, D)."""


def check_pool(spec: EncoderSpec, section: KNNSection) -> None:
    """
    Raises:
        ValueError: if the class token is wanted of an encoder that has none.
    """
    if section.pool == "cls" and not spec.num_prefix_tokens:
        raise ValueError("pool is 'cls', but the encoder has no class token; use evaluate.knn.pool=mean")


def pooled_tokens(encoder: Encoder, pool: Literal["mean", "cls"] = "mean") -> Extract:
    """The encoder's feature of an image of which nothing is hidden."""

    def extract(view: Tensor) -> Tensor:
        latent = encoder(view, Mask.none(len(view), encoder.spec.grid, view.device))
        return latent.prefix[:, 0] if pool == "cls" else latent.pooled()

    return extract


def raw_pixels(views: ViewBuilder) -> Extract:
    """The pixels in [0, 1] as they are, averaged down to 32x32 if there are more: what any encoder should beat."""

    def extract(view: Tensor) -> Tensor:
        images = views.to_image(view)
        height, width = (min(size, MAX_RAW_SIDE) for size in images.shape[-2:])
        return adaptive_avg_pool2d(images, (height, width)).flatten(1)

    return extract


@torch.no_grad()
def features(
    extract: Extract,
    views: ViewBuilder,
    source: Source,
    *,
    batch_size: int,
    device: torch.device,
    limit: int | None = None,
    workers: int = 0,
    world: World = World(),
) -> tuple[Tensor, Tensor]:
    """The features (n, D) float32 and labels (n,) int64 of a source's labelled images, on the device.

    Args:
        limit: of more images than this, a random choice that is the same each time.
        workers: processes that read images.
        world: the ranks that share the work; each gets all features. They make the same number of forward passes.

    Raises:
        DataError: if no image has a label.
    """
    chosen = rng.permutation(0, "evaluation", len(source))[:limit].sort().values.tolist()
    per_rank = ceil(len(chosen) / world.size)
    own = chosen[world.rank :: world.size]
    found = []
    for batch, labels in evaluation_batches(source, views, batch_size, indices=own, workers=workers):
        on_device = {name: view.to(device, non_blocking=True) for name, view in batch.items()}
        found.append((extract(views.prepare(None, on_device)["x"]).float(), labels.to(device)))
    while len(found) < max(1, ceil(per_rank / batch_size)):  # broken images, or none left for this rank
        example = views.prepare(None, {"x": views.example(1)["x"].to(device)})["x"]
        found.append((extract(example).float(), torch.full((1,), -1, device=device)))
    x, y = (torch.cat(column) for column in zip(*found, strict=True))
    if world.size > 1:
        x, y = _gather_in_turn(x[y >= 0], y[y >= 0], per_rank, world)
    labelled = y >= 0
    if not bool(labelled.any()):
        raise DataError(f"kNN needs labelled images, source '{source.name}' has none that can be read")
    return x[labelled], y[labelled]


def _gather_in_turn(x: Tensor, y: Tensor, per_rank: int, world: World) -> tuple[Tensor, Tensor]:
    """x (n, D), y (n,) of every rank -> all rows, dealt as indices were; a label of -1 where a rank had no more."""
    padding = per_rank - len(x)
    x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
    y = torch.cat([y, y.new_full((padding,), -1)])
    return tuple(
        world.gather(rows).unflatten(0, (world.size, per_rank)).transpose(0, 1).flatten(0, 1) for rows in (x, y)
    )


def knn_top1(
    extract: Extract,
    views: ViewBuilder,
    sources: tuple[Source, Source],
    section: KNNSection,
    device: torch.device,
    *,
    workers: int = 0,
    world: World = World(),
) -> float:
    """Share of the test images that their neighbours among the training images classify rightly.

    Args:
        sources: (train, test), as `Source.evaluation_sources` gives them.
        world: the ranks that share the reading and the forward passes; each returns the same number.
    """
    options = {"batch_size": section.batch_size, "device": device, "workers": workers, "world": world}
    train_x, train_y = features(extract, views, sources[0], limit=section.max_train, **options)
    test_x, test_y = features(extract, views, sources[1], limit=section.max_test, **options)
    num_classes = int(train_y.max()) + 1
    predicted = knn_predict(
        train_x, train_y, test_x, k=section.k, temperature=section.temperature, num_classes=num_classes
    )
    return int((predicted == test_y).sum()) / len(test_y)


def online_knn(
    encoder: Encoder,
    views: ViewBuilder,
    sources: tuple[Source, Source],
    section: KNNSection,
    device: torch.device,
    *,
    workers: int = 0,
    world: World = World(),
) -> float:
    """`knn_top1` of an encoder, which is left in the mode in which it was.

    Raises:
        ValueError: if `section.pool` wants the class token of an encoder that has none.
    """
    check_pool(encoder.spec, section)
    extract = pooled_tokens(encoder, section.pool)
    with evaluation_mode(encoder):
        return knn_top1(extract, views, sources, section, device, workers=workers, world=world)
