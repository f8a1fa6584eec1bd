"""The handwritten digits that scikit-learn brings along."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample


class DigitsSource(Source):
    """scikit-learn's bundled set of 1797 real handwritten digits, 8x8 pixels, with labels; needs no download.

    Every fifth image is a test image. The values 0 to 16 are scaled to 0 to 255.
    """

    name = "digits"

    class Config(Section):
        split: Literal["train", "test", "all"] = "train"
        """Every fifth image is in `test`, the others are in `train`."""
        shift: int = Field(0, ge=0, le=7)
        """Move every digit by up to so many pixels in both directions, each by a draw of its own that stays the
        same; what leaves the frame is lost. From 2 on a linear classifier cannot tell digits by their pixels."""

    config: Config
    classes = tuple("0123456789")

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self._images, self._labels = _images_and_labels()
        split = self.config.split
        self._ids = [i for i in range(len(self._images)) if split == "all" or (i % 5 == 4) == (split == "test")]
        if self.config.shift:
            self._images = _moved(self._images, self.config.shift)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Sample:
        i = self._ids[index]
        return Sample(self._images[i], f"digits/{i}", self._labels[i])

    def evaluation_sources(self) -> tuple[Source, Source]:
        train, test = (self.config.model_copy(update={"split": split}) for split in ("train", "test"))
        return DigitsSource(train), DigitsSource(test)


@functools.cache
def _images_and_labels() -> tuple[np.ndarray, list[int]]:
    """(1797, 8, 8) uint8 and their classes; read once in a process, as a run opens the source several times."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data.source digits needs scikit-learn: pip install 'mim-framework[demo]'") from None
    digits = load_digits()
    return (digits.images * 255 / 16).round().astype("uint8"), digits.target.tolist()


def _moved(images: np.ndarray, most: int) -> np.ndarray:
    """images (n, 8, 8), each moved by its own draw from -most to most in both directions, over black."""
    draws = rng.random_bits(0, "digits: shift", torch.arange(len(images)), 2) % (2 * most + 1)
    padded = np.pad(images, ((0, 0), (most, most), (most, most)))
    height, width = images.shape[1:]
    moved = [x[top : top + height, left : left + width] for x, (top, left) in zip(padded, draws.tolist(), strict=True)]
    return np.stack(moved)
