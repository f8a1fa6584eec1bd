"""The handwritten digits that scikit-learn brings along."""

from __future__ import annotations

from typing import Literal

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

    config: Config
    classes = tuple("0123456789")

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError("data.source digits needs scikit-learn: pip install 'mim-framework[demo]'") from None
        digits = load_digits()
        self._images = (digits.images * 255 / 16).round().astype("uint8")
        self._labels = digits.target.tolist()
        split = self.config.split
        self._ids = [i for i in range(len(self._images)) if split == "all" or (i % 5 == 4) == (split == "test")]

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Sample:
        i = self._ids[index]
        return Sample(self._images[i], f"digits/{i}", self._labels[i])

    def evaluation_sources(self) -> tuple[Source, Source]:
        return DigitsSource(self.Config(split="train")), DigitsSource(self.Config(split="test"))
