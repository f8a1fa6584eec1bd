"""Two views of one crop: what the encoder sees, and what the tokenizer sees of the same pixels."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from mim_framework import (
    NUM_CROP_RANDOM,
    ImageViews,
    ImgSize,
    Interpolation,
    Sample,
    Share,
    Step,
    Views,
    ViewSpec,
    height_width,
    increasing,
    jitter_color,
    random_resized_crop_box,
)

SECOND = "tokenizer"
NUM_JITTER_RANDOM = 4


class BEiTViews(ImageViews):
    """Views "x" and "tokenizer": one random crop of the color-jittered image, resized twice (Bao et al. 2021).

    The second view is in [0, 1]. Where it has the size and the filter of the first, both are made of the same pixels,
    which travel to the device once.
    """

    name = "beit"
    num_random = NUM_CROP_RANDOM + 1 + NUM_JITTER_RANDOM

    class Config(ImageViews.Config):
        scale: Annotated[tuple[Share, Share], AfterValidator(increasing)] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        second_size: ImgSize = 112
        """Height and width of the tokenizer's view: its stride (8) times the side of the patch grid (14); a number
        for a square, or [height, width]."""
        second_interpolation: Interpolation = "lanczos"
        """Filter of the second resize: bicubic, bilinear or lanczos."""
        color_jitter: float = Field(0.4, ge=0, le=1)
        """Brightness, contrast and saturation change by factors in 1 +- this; 0 for none."""
        jitter_after_crop: bool = False
        """Jitter the crops instead of the whole image: several times cheaper, and the mean to which the contrast
        refers is then that of the crop. Officially before the crop."""

        @model_validator(mode="after")
        def _colours(self) -> BEiTViews.Config:
            if self.color_jitter and len(self.mean) not in (1, 3):
                text = f"'color_jitter' changes grey and RGB images, 'mean' has {len(self.mean)} channels"
                raise ValueError(f"{text}; use color_jitter: 0")
            return self

    config: Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        c = self.config
        self.second_size = height_width(c.second_size)
        unit: dict[str, Any] = {"mean": (0.0,) * self.in_chans, "std": (1.0,) * self.in_chans}
        self.specs = {**self.specs, SECOND: ViewSpec(SECOND, size=self.second_size, in_chans=self.in_chans, **unit)}
        self.same_pixels = (self.second_size, c.second_interpolation) == (self.size, c.interpolation)

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        c = self.config
        numbers = rand.tolist()
        jitter, strengths = numbers[NUM_CROP_RANDOM + 1 :], (c.color_jitter,) * 3
        image = self.open(sample)
        box = random_resized_crop_box(numbers, *image.size, c.scale, c.ratio)
        flip = numbers[NUM_CROP_RANDOM] < c.flip
        if c.color_jitter and not c.jitter_after_crop:
            finest = max(self.size[0], self.second_size[0]), max(self.size[1], self.second_size[1])
            adjust = lambda whole: jitter_color(whole, jitter, strengths)  # noqa: E731
            image.change(adjust, box.height, box.width, finest)
        sizes = {"x": (self.size, c.interpolation)}
        if not self.same_pixels:
            sizes[SECOND] = self.second_size, c.second_interpolation
        views = {name: image.crop(*box, size, flip, filter) for name, (size, filter) in sizes.items()}
        if c.color_jitter and c.jitter_after_crop:
            views = {name: jitter_color(view, jitter, strengths) for name, view in views.items()}
        return views

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """uint8 on the device -> x normalised, the second view in [0, 1]; both float32 (B, C, H, W)."""
        second = batch.get(SECOND, batch["x"] if self.same_pixels else None)
        views = super().prepare(step, {name: view for name, view in batch.items() if name != SECOND})
        return views if second is None else {**views, SECOND: second.float().div_(255)}

    def example(self, batch_size: int) -> dict[str, Tensor]:
        batch = super().example(batch_size)
        return {"x": batch["x"]} if self.same_pixels else batch
