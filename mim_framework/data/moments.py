"""Mean and spread of the channels of many images, image by image."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as pil

from mim_framework.data.values import UnsupportedValues

_LEVELS = np.arange(256)


@dataclass(frozen=True, eq=False)
class Moments:
    """Of every channel, each (C,) float64: mean, sum of squared deviations from it, smallest and largest value.

    `count`: pixels.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, pixels: pil.Image | np.ndarray) -> Moments:
        """Of a picture `L` or `RGB`, or numbers (H, W, bands).

        Raises:
            UnsupportedValues: if there are NaN or infinite numbers among them.
        """
        if isinstance(pixels, pil.Image):
            counts = pixels.histogram()
            return cls._joined(_of_counts(counts[start : start + 256]) for start in range(0, len(counts), 256))
        return cls._joined(_of_numbers(pixels[..., band]) for band in range(pixels.shape[2]))

    @classmethod
    def _joined(cls, channels: Iterable[tuple[int, float, float, float, float]]) -> Moments:
        counts, *others = zip(*channels, strict=True)
        return cls(counts[0], *(np.array(each, np.float64) for each in others))

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Moments:
        return cls(kept["count"], *(np.array(kept[key], np.float64) for key in ("mean", "squares", "low", "high")))

    def to_json(self) -> dict[str, Any]:
        """Which `from_json` reads back to the last bit."""
        arrays = {key: getattr(self, key).tolist() for key in ("mean", "squares", "low", "high")}
        return {"count": self.count, **arrays}

    @property
    def std(self) -> np.ndarray:
        """Of all pixels as a population, (C,)."""
        return np.sqrt(self.squares / self.count)

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of pixels (Chan, Golub and LeVeque 1979)."""
        count, step = self.count + other.count, other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        squares = self.squares + other.squares + step**2 * (self.count * other.count / count)
        return Moments(count, mean, squares, np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def scaled(self, low: float, high: float) -> Moments:
        """Of the same pixels with `low` as 0 and `high` as 1."""
        span = high - low
        mean, least, most = ((each - low) / span for each in (self.mean, self.low, self.high))
        return Moments(self.count, mean, self.squares / span**2, least, most)

    def repeated(self, times: int) -> Moments:
        """Of one channel, as so many equal ones."""
        arrays = (self.mean, self.squares, self.low, self.high)
        return Moments(self.count, *(np.repeat(each, times) for each in arrays))


def total(moments: Iterable[Moments]) -> Moments:
    """Of all sets of pixels, of which there is one at least."""
    return functools.reduce(Moments.__add__, moments)


def _of_counts(counts: list[int]) -> tuple[int, float, float, float, float]:
    """How often each byte occurs -> count, mean, sum of squared deviations, smallest, largest: in whole numbers."""
    times = np.array(counts)
    count, first, second = int(times.sum()), int(times @ _LEVELS), int(times @ _LEVELS**2)
    present = np.flatnonzero(times)
    return count, first / count, (count * second - first * first) / count, float(present[0]), float(present[-1])


def _of_numbers(band: np.ndarray) -> tuple[int, float, float, float, float]:
    if band.dtype == np.uint8:
        return _of_counts(np.bincount(band.reshape(-1), minlength=256).tolist())
    if band.dtype.kind == "f" and not np.isfinite(band).all():
        raise UnsupportedValues("it holds NaN or infinite values")
    values = band.astype(np.float64)
    mean = values.mean()
    values -= mean
    return values.size, float(mean), float(np.square(values, out=values).sum()), float(band.min()), float(band.max())
