"""The label of each sample as a companion of its views, for recipes that ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.contract.components import Source, sample_or_broken
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import ViewSpec
from mim_framework.contract.world import World

LABEL = "label"
"""Name of the view that holds labels (B,) int64, or what `ViewBuilder.prepare` makes of them."""
SAMPLES_LOOKED_AT = 16
"""So many are tried for a first one that is not broken."""


class Labels:
    """Class numbers of the samples, in the order of `Source.classes`."""

    def __init__(self, num_classes: int | None) -> None:
        """`num_classes` is None where only a model is built and the source is not there."""
        self.spec = ViewSpec.of_kind("labels", LABEL, num_classes=num_classes)

    def check(self, source: Source, world: World) -> list[str]:
        """
        Raises:
            DataError: if the source, or the first sample of it that can be read, has no labels.
        """
        num_classes_of(source)
        first = (sample_or_broken(source, index) for index in range(min(SAMPLES_LOOKED_AT, len(source))))
        sample = next((sample for sample in first if not isinstance(sample, BrokenImage)), None)
        if sample is not None:
            self(sample, 0, 0)
        return []

    def __call__(self, sample: Sample, index: int, view: int) -> Tensor:
        """() int64

        Raises:
            DataError: if the sample has no label, or one that is no class.
        """
        if sample.label is None:
            raise DataError(
                f"data.source: sample '{sample.name}' has no label, and the recipe needs one of every sample; use a "
                "part of the data that has them, or a recipe without target 'labels'"
            )
        if not 0 <= sample.label < (self.spec.num_classes or 0):
            text = f"data.source: sample '{sample.name}' has label {sample.label}"
            raise DataError(f"{text}, the source has {self.spec.num_classes} classes, numbered from 0")
        return torch.tensor(sample.label)


def num_classes_of(source: Source) -> int:
    """
    Raises:
        DataError: if the source has no labels.
    """
    if source.classes is None:
        raise DataError(
            f"data.source '{source.name}' gives no labels, which the recipe needs; a folder of class folders has them "
            "with data.source.labels=true"
        )
    return len(source.classes)
