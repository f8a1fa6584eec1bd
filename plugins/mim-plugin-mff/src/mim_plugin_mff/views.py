"""The weak augmentation of MFF's recipe, which keeps most of an image in view: resize, shift by a few pixels, flip."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mim_framework import (
    MAX_PIXELS,
    PILLOW_MAX_PIXELS,
    Alpha,
    Image,
    ImageViews,
    ImgSize,
    Interpolation,
    JpegBackend,
    Sample,
    Section,
    height_width,
    one_for_each_channel,
)

MAX_ASPECT = 2
"""Images longer than this are cut down to about their crop before the resize, so that a panorama costs no more."""


class Shift(NamedTuple):
    """The crop's first row and column in the resized image; negative or near the far end where it covers padding."""

    top: int
    left: int


def resized_size(height: int, width: int, img_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image resized until it just covers the view, rounded down as by torchvision's `Resize`."""
    view, side = tight(height, width, img_size)
    return view * height // side, view * width // side


def tight(height: int, width: int, img_size: tuple[int, int]) -> tuple[int, int]:
    """The side of the view and that of the image which become equal: the short ones, of a square view."""
    rows_are_tight = img_size[0] * width >= img_size[1] * height
    return (img_size[0], height) if rows_are_tight else (img_size[1], width)


def random_shift(rand: list[float], height: int, width: int, img_size: tuple[int, int], padding: int) -> Shift:
    """Where a random crop of `img_size` falls in an image of (height, width) that is padded on all sides, uniformly.

    Args:
        rand: two uniform numbers in [0, 1), for rows and columns.
    """
    rooms = (side + 2 * padding - view + 1 for side, view in zip((height, width), img_size, strict=True))
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


def padded_crop(
    image: Image, shift: Shift, img_size: tuple[int, int], interpolation: Interpolation, flip: bool
) -> Tensor:
    """The crop at `shift` of the resized image, continued by reflection where it reaches over an edge.

    Returns:
        uint8 (C, *img_size).
    """
    height, width = image.size
    view, side = tight(height, width, img_size)
    if all(each * view <= MAX_ASPECT * side * own for each, own in zip(image.size, img_size, strict=True)):
        size = resized_size(height, width, img_size)
        resized, (top, left) = image.crop(0, 0, height, width, size, interpolation=interpolation), shift
    else:
        resized, (top, left) = _resized_part(image, shift, img_size, interpolation)
    crop = reflected(reflected(resized, top, img_size[0], dim=1), left, img_size[1], dim=2)
    return crop.flip(2) if flip else crop.contiguous()


def _resized_part(
    image: Image, shift: Shift, img_size: tuple[int, int], interpolation: Interpolation
) -> tuple[Tensor, Shift]:
    """Of a long image, the pixels that the crop covers, resized, and the shift in them; true to within a pixel."""
    height, width = image.size
    (view, tight_side), starts, spans, shifts = tight(height, width, img_size), [], [], []
    for side, own, total, start in zip(image.size, img_size, resized_size(height, width, img_size), shift, strict=True):
        if total == own:
            begin, end = 0, side
        else:
            begin = max(start, 0) * tight_side // view
            end = min(side, -(-min(start + own, total) * tight_side // view))
        starts.append(begin)
        spans.append(end - begin)
        shifts.append(start if start < 0 else start - round(begin * view / tight_side))
    size = tuple(round(span * view / tight_side) for span in spans)
    return image.crop(*starts, *spans, size, interpolation=interpolation), Shift(*shifts)


Positive = Annotated[float, Field(gt=0)]


class ResizedCropViews(ImageViews):
    """One view "x": the short side resized to the view, then a random crop of the padded image and a random flip."""

    name = "resized_crop"
    num_random = 3

    class Config(Section):
        img_size: ImgSize = 224
        """Height and width of the view, in pixels: a number for a square, or [height, width]."""
        padding: int = Field(4, ge=0)
        """Pixels by which the resized image is continued on all sides, by reflection, before the crop."""
        flip: float = Field(0.5, ge=0, le=1)
        """Probability of a horizontal flip."""
        interpolation: Interpolation = "bilinear"
        """Filter of the resize, always with antialiasing: bicubic, bilinear or lanczos."""
        mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.485, 0.456, 0.406)
        """Mean of each channel that is subtracted, for pixels in [0, 1]. There are as many channels as numbers: one
        makes images grey, three RGB, another number must be that of the bands of every file."""
        std: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.229, 0.224, 0.225)
        """Standard deviation of each channel by which is divided, for pixels in [0, 1]."""
        value_range: tuple[float, float] | None = None
        """The values that become black and white in files deeper than 8 bits, such as [0, 4095] for a scanner of 12
        bits; others are clipped. Without it, 16-bit, 32-bit and float files are refused, and told what they hold."""
        alpha: Alpha = "auto"
        """What happens to transparency: `white` composites on it, `drop` leaves the band out, `keep` takes it for one
        more channel. `auto` is `white`, but refuses a TIFF, whose writers call any fourth band alpha."""
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
            if self.padding >= min(height_width(self.img_size)):
                raise ValueError(
                    f"'padding' must be smaller than 'img_size', {self.img_size}, which it mirrors; got {self.padding}"
                )
            return one_for_each_channel(self)

    config: Config  # type: ignore[assignment]

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        c = self.config
        *position, flip = rand.tolist()
        image = self.open(sample)
        size = resized_size(*image.size, self.size)
        shift = random_shift(position, *size, self.size, c.padding)
        return {"x": padded_crop(image, shift, self.size, c.interpolation, flip < c.flip)}
