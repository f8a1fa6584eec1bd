"""Pictures of images, masked images and reconstructions, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mim_framework.contract.mask import Grid
from mim_framework.runtime.metrics import as_picture

# --- pictures --------------------------------------------------------------------------------------------------------

CAPTIONS = ("input", "masked", "reconstruction")
GAP = 4
"""Pixels around every image of a picture."""
CAPTION_HEIGHT = 16
_MIN_WIDTH = 96  # of an image, in pixels: room for the longest caption


MAX_FRAMES = 4
"""Frames of a clip that are shown, evenly spaced, side by side."""


def mask_image(image: Tensor, hidden: Tensor, grid: Grid) -> Tensor:
    """image (C, *size) in [0, 1], hidden (N,) bool on `grid` -> the image with hidden patches grey.

    Raises:
        ValueError: if the image is not a whole number of grid cells.
    """
    size = image.shape[1:]
    if len(size) != len(grid.shape) or any(pixels % cells for pixels, cells in zip(size, grid.shape, strict=True)):
        raise ValueError(f"image size {'x'.join(map(str, size))} is not a multiple of the grid {grid}")
    pixels = hidden.reshape(grid.shape)
    for axis, (many, few) in enumerate(zip(size, grid.shape, strict=True)):
        pixels = pixels.repeat_interleave(many // few, dim=axis)
    return image.masked_fill(pixels, 0.5)


def flat(image: Tensor) -> Tensor:
    """image (C, H, W) as it is; of a clip (C, T, H, W) some frames side by side, (C, H, frames * W)."""
    if image.ndim == 3:
        return image
    num_frames = min(MAX_FRAMES, image.shape[1])
    frames = [image[:, i * image.shape[1] // num_frames] for i in range(num_frames)]
    return torch.cat(frames, dim=-1)


def reconstruction_picture(
    rows: Sequence[tuple[Tensor, ...]], scale: int | None = None, captions: Sequence[str] = CAPTIONS
) -> Image.Image:
    """A table of images with a caption above each column.

    Args:
        rows: images (C, H, W) in [0, 1], all of one size; values outside are clipped. Of other numbers of channels than
            three, see `as_picture`.
        scale: factor of the nearest-neighbour enlargement; by default the smallest that makes the captions fit.
    """
    height, width = rows[0][0].shape[1:]
    scale = scale or math.ceil(_MIN_WIDTH / width)
    cell_height, cell_width = height * scale + GAP, width * scale + GAP
    size = (len(captions) * cell_width + GAP, CAPTION_HEIGHT + len(rows) * cell_height + GAP)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, caption in enumerate(captions):
        draw.text((GAP + column * cell_width, GAP), caption, fill="black", font=ImageFont.load_default())
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            corner = (GAP + column * cell_width, CAPTION_HEIGHT + GAP + row * cell_height)
            enlarged = (width * scale, height * scale)
            picture.paste(as_picture(image).resize(enlarged, Image.Resampling.NEAREST), corner)
    return picture
