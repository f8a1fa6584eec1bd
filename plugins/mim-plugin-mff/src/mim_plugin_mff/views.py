"""The weak augmentation of MFF's recipe, which keeps most of an image in view: resize, shift by a few pixels, flip."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mim_framework import (
    MAX_PIXELS,
    PILLOW_MAX_PIXELS,
    Image,
    ImageViews,
    Interpolation,
    JpegBackend,
    Sample,
    Section,
)

MAX_ASPECT = 2
"""Images longer than this are cut down to about their crop before the resize, so that a panorama costs no more."""


class Shift(NamedTuple):
    """The crop's first row and column in the resized image; negative or near the far end where it covers padding."""

    top: int
    left: int


def resized_size(height: int, width: int, img_size: int) -> tuple[int, int]:
    """(height, width) when the short side is resized to `img_size`, rounded down as torchvision's `Resize`."""
    short = min(height, width)
    return img_size * height // short, img_size * width // short


def random_shift(rand: list[float], height: int, width: int, img_size: int, padding: int) -> Shift:
    """Where a random crop of `img_size` falls in an image of (height, width) that is padded on all sides, uniformly.

    Args:
        rand: two uniform numbers in [0, 1), for rows and columns.
    """
    rooms = (side + 2 * padding - img_size + 1 for side in (height, width))
    return Shift(*(int(number * room) - padding for number, room in zip(rand, rooms, strict=True)))


def reflected(x: Tensor, start: int, length: int, dim: int) -> Tensor:
    """Indices start ... start + length - 1 of an axis, which goes on beyond its ends as its mirror image.

    The edge is not repeated: before 0 come 1, 2, ...
    """
    size = x.shape[dim]
    before, after = max(0, -start), max(0, start + length - size)
    inside = x.narrow(dim, start + before, length - before - after)
    if not before and not after:
        return inside
    left, right = x.narrow(dim, 1, before).flip(dim), x.narrow(dim, size - 1 - after, after).flip(dim)
    return torch.cat([left, inside, right], dim=dim)


def padded_crop(image: Image, shift: Shift, img_size: int, interpolation: Interpolation, flip: bool) -> Tensor:
    """The crop at `shift` of the resized image, continued by reflection where it reaches over an edge.

    Returns:
        uint8 (3, img_size, img_size).
    """
    height, width = image.size
    if max(height, width) <= MAX_ASPECT * min(height, width):
        size = resized_size(height, width, img_size)
        resized, (top, left) = image.crop(0, 0, height, width, size, interpolation=interpolation), shift
    else:
        resized, (top, left) = _resized_part(image, shift, img_size, interpolation)
    crop = reflected(reflected(resized, top, img_size, dim=1), left, img_size, dim=2)
    return crop.flip(2) if flip else crop.contiguous()


def _resized_part(image: Image, shift: Shift, img_size: int, interpolation: Interpolation) -> tuple[Tensor, Shift]:
    """Of a long image, the pixels that the crop covers, resized, and the shift in them; true to within a pixel."""
    height, width = image.size
    short, starts, spans, shifts = min(height, width), [], [], []
    for side, total, start in zip(image.size, resized_size(height, width, img_size), shift, strict=True):
        if side == short:
            begin, end = 0, side
        else:
            begin = max(start, 0) * short // img_size
            end = min(side, -(-min(start + img_size, total) * short // img_size))
        starts.append(begin)
        spans.append(end - begin)
        shifts.append(start if start < 0 else start - round(begin * img_size / short))
    size = tuple(round(span * img_size / short) for span in spans)
    return image.crop(*starts, *spans, size, interpolation=interpolation), Shift(*shifts)


Positive = Annotated[float, Field(gt=0)]


class ResizedCropViews(ImageViews):
    """One view "x": the short side resized to the view, then a random crop of the padded image and a random flip."""

    name = "resized_crop"
    num_random = 3

    class Config(Section):
        img_size: int = Field(224, gt=0)
        """Height and width of the view, in pixels."""
        padding: int = Field(4, ge=0)
        """Pixels by which the resized image is continued on all sides, by reflection, before the crop."""
        flip: float = Field(0.5, ge=0, le=1)
        """Probability of a horizontal flip."""
        interpolation: Interpolation = "bilinear"
        """Filter of the resize, always with antialiasing: bicubic, bilinear or lanczos."""
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
        """Mean of each channel that is subtracted, for pixels in [0, 1]."""
        std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
        """Standard deviation of each channel by which is divided, for pixels in [0, 1]."""
        max_pixels: int = Field(MAX_PIXELS, gt=0, le=PILLOW_MAX_PIXELS)
        """An image whose header claims more pixels is counted as broken, before anything of it is decoded."""
        decoder: JpegBackend = "auto"
        """What decodes plain JPEGs: pillow, torchcodec (pip install 'mim-framework[fast]'), or auto: the faster one
        that is installed. The pixels are the same; all other formats go through Pillow."""
        scaled_decode: bool = True
        """Decode a large JPEG at 1/2, 1/4 or 1/8 size where the image keeps twice the resolution of the view. Pixels
        differ slightly (under 1.5 of 255 levels on average); false for full-resolution decoding."""

        @model_validator(mode="after")
        def _can_be_reflected(self) -> ResizedCropViews.Config:
            if self.padding >= self.img_size:
                raise ValueError(
                    f"'padding' must be smaller than 'img_size', {self.img_size}, which it mirrors; got {self.padding}"
                )
            return self

    config: Config  # type: ignore[assignment]

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        c = self.config
        *position, flip = rand.tolist()
        image = self.open(sample)
        size = resized_size(*image.size, c.img_size)
        shift = random_shift(position, *size, c.img_size, c.padding)
        return {"x": padded_crop(image, shift, c.img_size, c.interpolation, flip < c.flip)}
