"""Maskers that hide patches without looking at the image."""

from __future__ import annotations

from math import ceil
from typing import Literal

from pydantic import Field
from torch import Tensor

from mim_framework.components import Masker, Specs
from mim_framework.config import Section
from mim_framework.records import Grid, Mask, Masked, MaskerSpec, Step, Views


def mask_from_noise(noise: Tensor, num_keep: int, grid: Grid) -> Mask:
    """noise (B, N): in every row the `num_keep` smallest stay visible, in ascending order (MAE, appendix A.1)."""
    return Mask.from_shuffle(noise.argsort(dim=1, stable=True), num_keep, grid)


class RandomMasker(Masker):
    """Hide cells uniformly at random, the same number in every image (He et al. 2021, section 3; Xie et al. 2021)."""

    name = "random"

    class Config(Section):
        mask_ratio: float = Field(0.75, gt=0, lt=1)
        """Share of the cells hidden from the encoder."""
        mask_patch_size: int | None = Field(None, gt=0)
        """Side of a mask cell in pixels; the encoder's token by default. SimMIM uses 32."""
        rounding: Literal["keep_floor", "hide_ceil"] = "keep_floor"
        """When the ratio gives no whole number: MAE rounds the visible count down, SimMIM the hidden one up."""
        shared: bool = False
        """One mask for the whole micro-batch instead of one per image."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        encoder = specs.encoder
        cell, grid = self.config.mask_patch_size or encoder.stride, encoder.grid
        if self.config.mask_patch_size is not None:
            img_size = specs.view("x").img_size
            if any(size % cell for size in img_size):
                raise ValueError(f"image size {img_size[0]}x{img_size[1]} is not a multiple of mask_patch_size {cell}")
            if cell % encoder.stride and encoder.stride % cell:
                raise ValueError(
                    f"mask_patch_size {cell} and the encoder's stride {encoder.stride} must divide one another"
                )
            grid = Grid((img_size[0] // cell, img_size[1] // cell))
        ratio, count = self.config.mask_ratio, grid.num_patches
        self.num_keep = (
            int(count * (1 - ratio)) if self.config.rounding == "keep_floor" else count - ceil(count * ratio)
        )
        if self.num_keep < 1:
            raise ValueError(f"mask_ratio {ratio} leaves none of the {count} cells of {cell} pixels visible")
        if self.num_keep == count:
            raise ValueError(f"mask_ratio {ratio} hides none of the {count} cells of {cell} pixels")
        self.spec = MaskerSpec(grid, equal=True, shared=self.config.shared, num_hidden=count - self.num_keep)

    def forward(self, step: Step, views: Views) -> Masked:
        grid = self.spec.grid
        noise = step.rand("mask", grid.num_patches)
        mask = mask_from_noise(noise[:1].expand_as(noise) if self.config.shared else noise, self.num_keep, grid)
        return Masked({"x": mask.as_shared() if self.config.shared else mask}, views)


class NoMasker(Masker):
    """Hide nothing and predict everything: for distillation (TinyMIM) and tokenizers."""

    name = "none"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.spec = MaskerSpec(specs.encoder.grid, equal=True, shared=True, num_hidden=0)

    def forward(self, step: Step, views: Views) -> Masked:
        mask = Mask.none(len(step.positions), self.spec.grid, step.positions.device)
        return Masked({"x": mask.predicting(~mask.hidden)}, views)
