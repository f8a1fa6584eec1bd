"""Which pixel of an image each pixel of its evaluation view shows, whatever the view builder: measured on a ramp."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_framework.base.errors import DataError
from mim_framework.contract.components import ViewBuilder
from mim_framework.contract.records import Sample
from mim_framework.data.decode import open_image

LEVELS = 255
WORST = 2.0
"""Levels by which the view of a ramp may differ from a ramp."""

Places = np.ndarray[Any, np.dtype[np.int64]]


class Geometry:
    """The crop and resize of a view builder's evaluation view, of images of any size.

    A picture that grows brighter from one side to the other is cropped and resized as an image would be; where a pixel
    comes from is read off its brightness, by a line through the middle half of the view, where no border is felt.
    """

    def __init__(self, views: ViewBuilder) -> None:
        self.views = views
        self.in_chans = views.specs["x"].in_chans or 3
        self._places: dict[tuple[tuple[int, int], tuple[int, ...]], tuple[Places, Places]] = {}

    def image_size(self, sample: Sample) -> tuple[int, int]:
        """(height, width) of a sample as it is meant to be seen."""
        opened = getattr(self.views, "open", None)
        image = open_image(sample.data, sample.name, page=sample.page) if opened is None else opened(sample)
        return image.size

    def places(self, image_size: tuple[int, int], view_size: tuple[int, ...]) -> tuple[Places, Places]:
        """Rows (H,) and columns (W,) of an image that the pixels of its view (H, W) show.

        Raises:
            DataError: if the view is no crop and resize of the image.
        """
        key = (image_size, view_size)
        if key not in self._places:
            self._places[key] = self._along(0, *key), self._along(1, *key)
        return self._places[key]

    def _along(self, axis: int, image_size: tuple[int, int], view_size: tuple[int, ...]) -> Places:
        length = image_size[axis]
        ramp = (np.arange(length) + 0.5) / length * LEVELS
        ramp = np.round(ramp).astype(np.uint8)[:, None] if axis == 0 else np.round(ramp).astype(np.uint8)[None]
        picture = np.broadcast_to(ramp, image_size)
        if self.in_chans > 1:
            picture = np.broadcast_to(picture[..., None], (*image_size, self.in_chans))
        found = self.views.evaluation_view(Sample(np.ascontiguousarray(picture), "ramp"))
        view = found["x"] if isinstance(found, dict) else found
        if tuple(view.shape[-2:]) != tuple(view_size) or view.ndim != 3:
            raise DataError(f"segment: views of shape {tuple(view.shape)} are none that masks of {view_size} fit")
        return self._read_off(view.float().mean(0).mean(1 - axis), length)

    def _read_off(self, levels: Tensor, length: int) -> Places:
        """levels (n,) along an axis of the view -> the places of `length` that they stand for."""
        n = len(levels)
        middle = torch.arange(n)[n // 4 : n - n // 4].double()
        known = levels[n // 4 : n - n // 4].double()
        centred = middle - middle.mean()
        slope = (centred * known).sum() / centred.square().sum()
        if (known - known.mean() - slope * centred).abs().max() > WORST or slope.abs() < 1e-6:
            text = f"evaluation view of '{self.views.name}' is no crop and resize of the image"
            raise DataError(f"segment: the {text}, so that its mask cannot follow")
        at = known.mean() + slope * (torch.arange(n) - middle.mean())
        return (at / LEVELS * length).floor().long().clamp(0, length - 1).numpy()
