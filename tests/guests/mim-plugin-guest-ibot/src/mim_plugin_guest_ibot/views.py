"""Several crops of one image, each augmented in its own way (iBOT, `DataAugmentationiBOT`).

Start at `MultiCropViews.__call__`: an image is decoded once, and every crop has its own part of the sample's numbers.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mim_framework import (
    NUM_CROP_RANDOM,
    ImageViews,
    ImgSize,
    Sample,
    Section,
    Share,
    Step,
    Views,
    ViewSpec,
    height_width,
    jitter_color,
    random_resized_crop_box,
)

NUM_JITTER_RANDOM = 5
NUM_AUGMENT_RANDOM = NUM_JITTER_RANDOM + 5
"""Uniform numbers that `MultiCropViews.augment` reads: those of the jitter, then whether to jitter, to take the colours
away, to blur, how wide, and whether to solarize."""

Probability = Annotated[float, Field(ge=0, le=1)]


class Crop(NamedTuple):
    """How the crops of one kind are made: (height, width), share of the image's area, chances of two augmentations."""

    size: tuple[int, int]
    scale: tuple[float, float]
    blur: float
    solarize: float


class MultiCropViews(ImageViews):
    """Two global crops `x` and `x2`, and smaller local ones `local1`, `local2`, ... of the same image."""

    name = "multi_crop"

    class Config(ImageViews.Config):
        scale: tuple[Share, Share] = (0.25, 1.0)
        """Smallest and largest share of the image's area that a global crop covers."""
        num_local: int = Field(10, ge=0)
        """Local crops of an image."""
        local_size: ImgSize = 96
        """Height and width of a local crop, in pixels: a number for a square, or [height, width]."""
        local_scale: tuple[Share, Share] = (0.05, 0.25)
        """Smallest and largest share of the image's area that a local crop covers."""
        jitter: Probability = 0.8
        """Probability that the colours of a crop are changed."""
        color_jitter: tuple[Probability, Probability, Probability, Annotated[float, Field(ge=0, le=0.5)]] = (
            0.4, 0.4, 0.2, 0.1,
        )  # fmt: skip
        """Largest relative change of brightness, contrast and saturation, and largest turn of the hue (up to 0.5)."""
        grayscale: Probability = 0.2
        """Probability that a crop loses its colours."""
        blur: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
        """Probability of a Gaussian blur: of the first global crop, of the second, of a local one."""
        blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 2.0)
        """Smallest and largest standard deviation of the blur, in pixels."""
        solarize: Probability = 0.2
        """Probability that the bright pixels of the second global crop are inverted."""

        @model_validator(mode="after")
        def _intervals(self) -> MultiCropViews.Config:
            for key in ("scale", "local_scale", "blur_sigma"):
                smallest, largest = getattr(self, key)
                if smallest > largest:
                    raise ValueError(f"'{key}' must be [smallest, largest], got [{smallest:g}, {largest:g}]")
            sides = zip(height_width(self.local_size), height_width(self.img_size), strict=True)
            if self.num_local and any(local >= whole for local, whole in sides):
                raise ValueError(f"'local_size' must be below 'img_size', {self.img_size}, got {self.local_size}")
            if len(self.mean) not in (1, 3):
                raise ValueError(f"colours are changed in grey and RGB images, 'mean' has {len(self.mean)} channels")
            return self

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        c = self.config
        first, second, local = c.blur
        local_crop = Crop(height_width(c.local_size), c.local_scale, local, 0.0)
        self.crops = {
            "x": Crop(self.size, c.scale, first, 0.0),
            "x2": Crop(self.size, c.scale, second, c.solarize),
            **{f"local{i}": local_crop for i in range(1, 1 + c.num_local)},
        }
        self.specs = {
            name: ViewSpec(name, size=crop.size, in_chans=self.in_chans, mean=c.mean, std=c.std)
            for name, crop in self.crops.items()
        }
        self.num_random = len(self.crops) * (NUM_CROP_RANDOM + 1 + NUM_AUGMENT_RANDOM)

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        image = self.open(sample)
        rows = rand.unflatten(0, (len(self.crops), -1)).tolist()
        return {name: self.crop(image, crop, row) for (name, crop), row in zip(self.crops.items(), rows, strict=True)}

    def crop(self, image: Any, crop: Crop, rand: list[float]) -> Tensor:
        """One crop of what `open` gave, uint8 (C, *size). `rand`: box, flip, augmentations."""
        c = self.config
        box = random_resized_crop_box(rand, *image.size, crop.scale, c.ratio)
        flip = rand[NUM_CROP_RANDOM] < c.flip
        pixels = image.crop(*box, crop.size, flip, c.interpolation)
        return self.augment(pixels, crop, rand[NUM_CROP_RANDOM + 1 :])

    def augment(self, pixels: Tensor, crop: Crop, rand: list[float]) -> Tensor:
        """pixels uint8 (C, H, W), in the order of the official code: jitter, grey, blur, solarize."""
        c = self.config
        jitter, gray, blur, width, solarize = rand[NUM_JITTER_RANDOM:]
        if jitter < c.jitter:
            pixels = jitter_color(pixels, rand[:NUM_JITTER_RANDOM], c.color_jitter)
        if gray < c.grayscale and self.in_chans > 1:
            pixels = F.rgb_to_grayscale(pixels, num_output_channels=3)
        if blur < crop.blur:
            pixels = gaussian_blur(pixels, c.blur_sigma[0] + (c.blur_sigma[1] - c.blur_sigma[0]) * width)
        if solarize < crop.solarize:
            pixels = F.solarize(pixels, threshold=128)
        return pixels

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """uint8 (B, C, H, W) each, whichever views there are -> normalised float32."""
        return {name: super(MultiCropViews, self).prepare(step, {"x": view})["x"] for name, view in batch.items()}


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    """Blur to three standard deviations, or as far as the reflected border of a small crop reaches."""
    reach = min(math.ceil(3 * sigma), min(pixels.shape[-2:]) - 1)
    return F.gaussian_blur(pixels, kernel_size=[2 * reach + 1] * 2, sigma=[sigma] * 2)
