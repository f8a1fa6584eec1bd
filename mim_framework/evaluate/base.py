"""What evaluations read: features of a frozen encoder, extracted once and shared. Start at `EncoderSubject`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.base.text import plain_logger
from mim_framework.contract.components import Encoder, Objective, Source, ViewBuilder
from mim_framework.contract.evaluation import Features, Method, Pool, Split, check_features
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Views
from mim_framework.contract.specs import EncoderSpec
from mim_framework.contract.world import World
from mim_framework.data.loader import evaluation_batches
from mim_framework.evaluate.cache import FeatureCache, about_encoder, about_source, about_views
from mim_framework.evaluate.splits import Splits

logger = plain_logger(__name__)

MAX_RAW_SIDE = 32
"""Raw pixels are compared at this size at most, as larger images would not fit into memory."""
_UNLABELLED, _NO_IMAGE = -1, -2

Layer = int | None
"""Number of a block, or None for the encoder's own output."""
Asked = tuple[Pool, tuple[int, ...]]
"""What an evaluation has asked for: the kind of feature, and layers, none for the encoder's own output."""
Want = tuple[Pool | None, Layer]
"""A feature that is extracted; of raw pixels the kind is None."""
Extract = Callable[[Views], list[Tensor]]
"""Prepared view (B, C, H, W) -> features, a tensor (B, ...) for each layer."""


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule is in the mode in which it was."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in modes:
            each.training = training


class EncoderSubject:
    """A `Subject`: an encoder with images. It holds every feature that was asked for, on the device.

    Args:
        world: the ranks that share the reading and the forward passes; each gets all features.
        workers: processes that read images.
        batch_size: images per forward pass.
        precision: entered around forward passes, for autocast, or to gather sharded weights.
        objective: what trains the encoder, which may classify images.
        cache: where features are looked for, and kept; for one rank only.
        method: that by which the encoder is trained, if it is there.
    """

    def __init__(
        self,
        encoder: Encoder,
        views: ViewBuilder,
        splits: Splits,
        *,
        device: torch.device,
        world: World = World(),
        workers: int = 0,
        batch_size: int = 256,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
        objective: Objective | None = None,
        cache: FeatureCache | None = None,
        method: Method | None = None,
    ) -> None:
        self.encoder, self.views, self.splits = encoder, views, splits
        self.objective, self.method = objective, method
        self.device, self.world = device, world
        self.workers, self.batch_size, self.precision = workers, batch_size, precision
        assert cache is None or world.size == 1
        self.cache = cache
        self._labels: dict[tuple[Split, int], Tensor] = {}
        self._features: dict[tuple[Split, int, Pool | None, Layer], Tensor] = {}
        self._together: list[int] = []
        self.asked: dict[Asked, None] = {}
        """What was asked for, in order, for reports."""

    @property
    def spec(self) -> EncoderSpec:
        return self.encoder.spec

    def source(self, split: Split) -> Source:
        """
        Raises:
            DataError: if there is no such split.
        """
        if split not in self.splits.sources:
            raise DataError(f"source '{self.splits.sources['train'].name}' has no images of the split '{split}'")
        return self.splits.sources[split]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with evaluation_mode(self.encoder), self.precision():
            yield

    def features(
        self,
        split: Split,
        *,
        pool: Pool = "mean",
        layers: Sequence[int] = (),
        limit: int | None = None,
        labelled: bool = True,
    ) -> Features:
        """
        Raises:
            DataError: if there are no such images.
            ValueError: if the encoder has no such features.
        """
        check_features(self.spec, pool, layers)
        self.asked[pool, tuple(layers)] = None
        numbers: list[Layer] = [layer % self.spec.depth for layer in layers] or [None]
        return self._taken(split, pool, numbers, limit, labelled)

    def raw_pixels(self, split: Split, *, limit: int | None = None, labelled: bool = True) -> Features:
        """
        Raises:
            DataError: if there are no such images.
        """
        return self._taken(split, None, [None], limit, labelled)

    def logits(self, split: Split) -> Features:
        """
        Raises:
            DataError: if no classifier was trained, or there are no such images.
        """

        def extract(views: Views) -> list[Tensor]:
            scores = None if self.objective is None else self.objective.logits(views)
            if scores is None:
                raise DataError(
                    "no classifier was trained here: its accuracy is that of an objective such as 'classify'"
                )
            return [scores]

        with nullcontext() if self.objective is None else evaluation_mode(self.objective):
            [x], y = self._extracted(split, len(self.source(split)), extract)
        self._say_left_out(split, len(self.source(split)), y, labelled=True)
        return Features(x[y != _UNLABELLED], y[y != _UNLABELLED])

    def _taken(
        self, split: Split, pool: Pool | None, layers: list[Layer], limit: int | None, labelled: bool
    ) -> Features:
        """Features from those that are held, after the missing ones were extracted in one pass."""
        count = len(self.source(split))
        count = count if limit is None else min(count, limit)
        missing = self._missing(split, count, pool, layers)
        if self.cache is not None:
            missing = [want for want in missing if not self._from_cache(self.cache, split, count, want, labelled)]
        if missing:
            extract = raw_pixels(self.views) if pool is None else features_of(self.encoder, missing)
            found, self._labels[split, count] = self._extracted(split, count, extract)
            self._features |= {(split, count, *want): x for want, x in zip(missing, found, strict=True)}
            self._say_left_out(split, count, self._labels[split, count], labelled=labelled)
            for want in missing if self.cache is not None else ():
                x = self._features[split, count, *want]
                self.cache.put(self._about(split, count, want), x, self._labels[split, count])
        y = self._labels[split, count]
        every = [self._features[split, count, pool, each] for each in layers]
        x = every[0] if len(every) == 1 else torch.cat(every, dim=-1)
        wanted = y != _UNLABELLED if labelled else torch.ones_like(y, dtype=torch.bool)
        if not bool(wanted.any()):
            what = "has a label and can be read" if labelled else "can be read"
            raise DataError(f"no image of source '{self.source(split).name}', split '{split}', {what}")
        return Features(x, y) if bool(wanted.all()) else Features(x[wanted], y[wanted])

    def _from_cache(self, cache: FeatureCache, split: Split, count: int, want: Want, labelled: bool) -> bool:
        """Take a feature from the cache, if it is there."""
        if (found := cache.get(self._about(split, count, want))) is None:
            return False
        x, y = (each.to(self.device) for each in found)
        first = (split, count) not in self._labels
        self._features[split, count, *want], self._labels[split, count] = x, y
        if first:
            self._say_left_out(split, count, y, labelled=labelled)
        return True

    def _about(self, split: Split, count: int, want: Want) -> dict[str, Any]:
        """All that a feature follows from."""
        pool, layer = want
        made_by = self._about_pixels if pool is None else self._about_encoder
        images = {**self._about_sources[split], "split": split, "count": count}
        return {**made_by, "images": images, "pool": pool, "layer": layer}

    @cached_property
    def _about_encoder(self) -> dict[str, Any]:
        return about_encoder(self.encoder, self.views, self.device)

    @cached_property
    def _about_pixels(self) -> dict[str, Any]:
        return about_views(self.views, self.device)

    @cached_property
    def _about_sources(self) -> dict[Split, dict[str, Any]]:
        return {split: about_source(source) for split, source in self.splits.sources.items()}

    @contextmanager
    def extracting(self, layers: Sequence[int]) -> Iterator[None]:
        """Meanwhile, features of one of these layers are extracted with those of the others, in one pass.

        Patch tokens are not, and are dropped afterwards: those of all layers would fill any memory.
        """
        self._together = sorted({layer % self.spec.depth for layer in layers})
        try:
            yield
        finally:
            self._together = []
            self._drop_tokens()

    def _drop_tokens(self) -> None:
        of_layers = [key for key in self._features if key[2] == "tokens" and key[3] is not None]
        for key in of_layers:
            del self._features[key]

    def _missing(self, split: Split, count: int, pool: Pool | None, layers: Sequence[Layer]) -> list[Want]:
        """What has to be extracted: what is asked for and not held, and what comes with it at no cost."""

        def held(pool: Pool | None, layer: Layer) -> bool:
            return (split, count, pool, layer) in self._features

        missing = [layer for layer in dict.fromkeys(layers) if not held(pool, layer)]
        if not missing or pool is None:
            return [(pool, layer) for layer in missing]
        if pool == "tokens":
            if self._together:
                self._drop_tokens()
            return [(pool, layer) for layer in dict.fromkeys(layers) if not held(pool, layer)]
        if set(missing) & set(self._together):
            missing += [layer for layer in self._together if layer not in missing]
        pools: list[Pool] = ["mean", "cls"] if self.spec.num_prefix_tokens else ["mean"]
        return [(each, layer) for layer in missing for each in pools if not held(each, layer)]

    def _say_left_out(self, split: Split, count: int, labels: Tensor, *, labelled: bool) -> None:
        unread = count - len(labels)
        unlabelled = int((labels == _UNLABELLED).sum()) if labelled else 0
        if (unread or unlabelled) and self.world.is_main:
            why = [f"{unread:,} cannot be read"] * bool(unread) + [f"{unlabelled:,} have no label"] * bool(unlabelled)
            logger.warning(
                f"evaluation on split '{split}': of {count:,} images, {' and '.join(why)}; they are left out"
            )

    def _extracted(self, split: Split, count: int, extract: Extract) -> tuple[list[Tensor], Tensor]:
        """Features (n, ...) of each layer and labels (n,) of `count` images; ranks make equal numbers of passes."""
        source, world = self.source(split), self.world
        chosen = rng.permutation(0, "evaluation", len(source))[:count].sort().values.tolist()
        per_rank = ceil(len(chosen) / world.size)
        own = chosen[world.rank :: world.size]
        found: list[tuple[list[Tensor], Tensor]] = []

        def add(batch: dict[str, Tensor], labels: Tensor) -> None:
            on_device = {name: view.to(self.device, non_blocking=True) for name, view in batch.items()}
            views = self.views.prepare(None, on_device)
            found.append(([each.float() for each in extract(views)], labels.to(self.device)))

        with self.frozen():
            for batch, labels in evaluation_batches(
                source, self.views, self.batch_size, indices=own, workers=self.workers
            ):
                add(batch, labels)
            while len(found) < max(1, ceil(per_rank / self.batch_size)):  # broken images, or none left for this rank
                example = self.views.example(1)
                add({name: example[name] for name in self.spec.views}, torch.full((1,), _NO_IMAGE))
        y = torch.cat([labels for _, labels in found])
        columns = [torch.cat(column) for column in zip(*(rows for rows, _ in found), strict=True)]
        columns = [x[y != _NO_IMAGE] for x in columns]
        y = y[y != _NO_IMAGE]
        if world.size > 1:
            *columns, y = (_gather_in_turn(rows, fill, per_rank, world) for rows, fill in
                           [*((x, 0) for x in columns), (y, _NO_IMAGE)])  # fmt: skip
            columns, y = [x[y != _NO_IMAGE] for x in columns], y[y != _NO_IMAGE]
        return columns, y


class PixelSubject:
    """The images of a subject without its encoder: what every evaluation of it should beat."""

    def __init__(self, subject: EncoderSubject) -> None:
        self._subject = subject
        self.encoder, self.views = subject.encoder, subject.views
        self.world, self.device, self.workers = subject.world, subject.device, subject.workers
        self.method: Method | None = None  # pixels were not trained
        self.asked: dict[Asked, None] = {}

    @property
    def spec(self) -> EncoderSpec:
        return self._subject.spec

    def source(self, split: Split) -> Source:
        return self._subject.source(split)

    def features(
        self,
        split: Split,
        *,
        pool: Pool = "mean",
        layers: Sequence[int] = (),
        limit: int | None = None,
        labelled: bool = True,
    ) -> Features:
        """Raw pixels, whatever is asked for; as one token of an image if tokens are."""
        pixels = self.raw_pixels(split, limit=limit, labelled=labelled)
        return Features(pixels.x[:, None], pixels.y) if pool == "tokens" else pixels

    def raw_pixels(self, split: Split, *, limit: int | None = None, labelled: bool = True) -> Features:
        return self._subject.raw_pixels(split, limit=limit, labelled=labelled)

    def logits(self, split: Split) -> Features:
        """
        Raises:
            DataError: always; pixels have no classifier.
        """
        raise DataError("raw pixels have no classifier")

    def frozen(self) -> AbstractContextManager[None]:
        return self._subject.frozen()


def tokens_of(encoder: Encoder, pool: Pool, layers: Sequence[Layer]) -> Extract:
    """The encoder's features of one kind, of images of which nothing is hidden."""
    return features_of(encoder, [(pool, layer) for layer in layers])


def features_of(encoder: Encoder, wanted: Sequence[tuple[Pool, Layer]]) -> Extract:
    """Features of several kinds and layers in one pass."""
    ask = Ask(layers=frozenset(layer for _, layer in wanted if layer is not None))

    def extract(views: Views) -> list[Tensor]:
        spec = encoder.spec
        masks = {name: Mask.none(len(views[name]), spec.of(name).grid, views[name].device) for name in spec.views}
        latent = encoder.encode(views, masks, ask)
        found = []
        for pool, layer in wanted:
            if layer is None:
                prefix, tokens = latent.prefix, latent.tokens
                if latent.ids is not None and pool == "tokens":
                    tokens = tokens.gather(1, latent.ids.argsort(1)[..., None].expand_as(tokens))
            else:
                width, grid = spec.layers.get(layer, (spec.dim, spec.grid))
                sequence = latent.layers[layer]
                sequence = encoder.final_norm(sequence) if (width, grid) == (spec.dim, spec.grid) else sequence
                prefix, tokens = sequence[:, : spec.num_prefix_tokens], sequence[:, spec.num_prefix_tokens :]
            found.append(prefix[:, 0] if pool == "cls" else tokens if pool == "tokens" else tokens.mean(1))
        return found

    return extract


def raw_pixels(views: ViewBuilder) -> Extract:
    """The pixels in [0, 1] as they are, averaged down to 32x32 if there are more."""

    def extract(prepared: Views) -> list[Tensor]:
        images = views.to_image(prepared["x"]).flatten(1, -3)  # the frames of a clip beside its channels
        height, width = (min(size, MAX_RAW_SIDE) for size in images.shape[-2:])
        return [adaptive_avg_pool2d(images, (height, width)).flatten(1)]

    return extract


def _gather_in_turn(rows: Tensor, fill: float, per_rank: int, world: World) -> Tensor:
    """rows (n, ...) of every rank -> all rows, dealt as indices were; `fill` where a rank had no more."""
    padding = rows.new_full((per_rank - len(rows), *rows.shape[1:]), fill)
    gathered = world.gather(torch.cat([rows, padding]))
    return gathered.unflatten(0, (world.size, per_rank)).transpose(0, 1).flatten(0, 1)
