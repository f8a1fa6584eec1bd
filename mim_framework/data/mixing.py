"""Mixup and CutMix: each image of a pair takes a part of the other one, and of its label.

The semantics are those of `timm.data.mixup.Mixup` in its batch and element modes, with the first of which the official
fine-tunings were made. Two things differ, so that ranks, micro-batches and a resume agree: the draw belongs to the
optimizer step (or to the position of an image), where timm draws for the micro-batch of each rank, and the partner of
an image is its neighbour (positions 2k and 2k + 1), where timm takes the row as far from the end of the micro-batch as
it is from its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mim_framework.base import rng

BETA_TRIES = 32
"""Each is accepted with a probability of one half at least; where none is, the share is one half."""
NUM_RANDOM = 4 + 2 * BETA_TRIES


@dataclass(frozen=True)
class Mix:
    """What the images of a step have in common: the share that each keeps of itself, and where the other one shows.

    `rows` and `columns` bound the region that CutMix takes from the partner; None for mixup, which blends all pixels.
    """

    share: float = 1.0
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def images(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), B even -> the same shape."""
        if self.share == 1.0:
            return images
        others = neighbours(images)
        if self.rows is None or self.columns is None:
            return images * self.share + others * (1 - self.share)
        region = (..., slice(*self.rows), slice(*self.columns))
        mixed = images.clone()
        mixed[region] = others[region]
        return mixed

    def labels(self, labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
        """labels (B,) int64 -> probabilities (B, num_classes) float32, of which `smoothing` is spread evenly."""
        soft = smoothed(labels, num_classes, smoothing)
        return soft if self.share == 1.0 else soft * self.share + neighbours(soft) * (1 - self.share)


@dataclass(frozen=True, eq=False)
class MixOfEach:
    """The same with numbers of its own for each image (timm's mode `elem`); partners are those of unmixed images.

    `shares` (B,) float32; `regions` (B, H, W) bool, where the partner shows of images that CutMix cuts; `cut` (B,).
    """

    shares: Tensor
    regions: Tensor
    cut: Tensor

    @classmethod
    def of(cls, mixes: Sequence[Mix], height: int, width: int) -> MixOfEach:
        """One for each of some draws."""
        regions = torch.zeros(len(mixes), height, width, dtype=torch.bool)
        for region, mix in zip(regions, mixes, strict=True):
            if mix.rows is not None and mix.columns is not None:
                region[slice(*mix.rows), slice(*mix.columns)] = True
        cut = torch.tensor([mix.rows is not None for mix in mixes])
        return cls(torch.tensor([mix.share for mix in mixes]), regions, cut)

    def to(self, device: torch.device) -> MixOfEach:
        return MixOfEach(self.shares.to(device), self.regions.to(device), self.cut.to(device))

    def images(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), B even -> the same shape."""
        others, shares = neighbours(images), self.shares[:, None, None, None]
        blended = images * shares + others * (1 - shares)
        return torch.where(self.cut[:, None, None, None], torch.where(self.regions[:, None], others, images), blended)

    def labels(self, labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
        """labels (B,) int64 -> probabilities (B, num_classes) float32."""
        soft, shares = smoothed(labels, num_classes, smoothing), self.shares[:, None]
        return soft * shares + neighbours(soft) * (1 - shares)


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """labels (B,) int64 -> probabilities (B, num_classes) float32, of which `smoothing` is spread evenly."""
    low = smoothing / num_classes
    soft = torch.full((len(labels), num_classes), low, device=labels.device)
    return soft.scatter_(1, labels[:, None], 1 - smoothing + low)


@dataclass(frozen=True)
class Mixing:
    """How strongly to mix: the parameters of the beta distributions (0 = off) and two probabilities."""

    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    switch_prob: float = 0.5

    def draw(self, seed: int, step: int, height: int, width: int) -> Mix:
        """What an optimizer step does to images of this size."""
        return self.drawn(uniform_of_step(seed, step), height, width)

    def draw_each(self, rand: Tensor, height: int, width: int) -> MixOfEach:
        """rand (B, NUM_RANDOM) uniform -> what is done to each of these images, on its device."""
        mixes = [self.drawn(row, height, width) for row in rand.tolist()]
        return MixOfEach.of(mixes, height, width).to(rand.device)

    def drawn(self, uniform: Sequence[float], height: int, width: int) -> Mix:
        """What these `NUM_RANDOM` uniform numbers in [0, 1) give."""
        apply, switch, *place = uniform
        if apply >= self.mixup_prob or not (self.mixup or self.cutmix):
            return Mix()
        cut = self.cutmix > 0 and (not self.mixup or switch < self.switch_prob)
        share = beta(self.cutmix if cut else self.mixup, place[2:])
        return cut_mix(share, place[0], place[1], height, width) if cut else Mix(share)


def cut_mix(share: float, row: float, column: float, height: int, width: int) -> Mix:
    """CutMix of a box with the area 1 - `share`; what of it lies outside of the image counts for the image again.

    Args:
        row, column: where its centre is, uniform in [0, 1).
    """
    side = math.sqrt(1 - share)
    rows = _clipped(int(row * height), int(height * side), height)
    columns = _clipped(int(column * width), int(width * side), width)
    area = (rows[1] - rows[0]) * (columns[1] - columns[0])
    return Mix(1 - area / (height * width), rows, columns)


def _clipped(centre: int, length: int, size: int) -> tuple[int, int]:
    return max(0, centre - length // 2), min(size, centre + (length + 1) // 2)


def beta(alpha: float, uniform: Sequence[float]) -> float:
    """A number with the distribution Beta(alpha, alpha), for alpha up to 1 (Jöhnk 1964).

    Args:
        uniform: pairs of uniform numbers in [0, 1), one pair for each try.
    """
    for u, v in zip(uniform[::2], uniform[1::2], strict=True):
        a, b = u ** (1 / alpha), v ** (1 / alpha)
        if 0 < a + b <= 1:
            return a / (a + b)
    return 0.5


def neighbours(x: Tensor) -> Tensor:
    """x (B, ...), B even: every row exchanged with the other one of its pair."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def uniform_of_step(seed: int, step: int) -> list[float]:
    """`NUM_RANDOM` uniform numbers in [0, 1), the same on every rank and in every micro-batch of a step."""
    return rng.uniform(seed, "mixing of a step", torch.tensor([step], device="cpu"), NUM_RANDOM)[0].tolist()
