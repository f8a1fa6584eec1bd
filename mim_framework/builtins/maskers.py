"""Maskers that hide patches without looking at the image: one by one, or in rectangular blocks."""

from __future__ import annotations

import math
from math import ceil
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mim_framework.base.section import Section
from mim_framework.contract.components import Masker
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Masked, Views
from mim_framework.contract.specs import MaskerSpec, Specs
from mim_framework.contract.step import Step
from mim_framework.nn.masking import cell_grid, mask_from_noise


class RandomMasker(Masker):
    """Hide cells uniformly at random, the same number in every image (He et al. 2021, section 3; Xie et al. 2021)."""

    name = "random"

    class Config(Section):
        mask_ratio: float = Field(0.75, gt=0, lt=1)
        """Share of the cells hidden from the encoder."""
        mask_patch_size: int | None = Field(None, gt=0)
        """Side of a mask cell in pixels; the encoder's token by default. SimMIM uses 32."""
        rounding: Literal["keep_floor", "hide_ceil", "hide_floor"] = "keep_floor"
        """When the ratio gives no whole number: MAE rounds the visible count down, SimMIM the hidden one up, Point-MAE
        the hidden one down."""
        shared: bool = False
        """One mask for the whole micro-batch instead of one per image."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        cell, grid = cell_grid(specs, self.config.mask_patch_size)
        ratio, count = self.config.mask_ratio, grid.num_patches
        self.num_keep = {
            "keep_floor": int(count * (1 - ratio)),
            "hide_ceil": count - ceil(count * ratio),
            "hide_floor": count - int(count * ratio),
        }[self.config.rounding]
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


ATTEMPTS_PER_BLOCK = 10
MAX_ATTEMPTS = 64
"""Rectangles tried for one mask. Of 20,000 masks of 75 (BEiT), 120 or 150 of 196 patches none needed more."""
NUMBERS_PER_ATTEMPT = 4


def draw_blocks(
    rand: Tensor,
    grid: Grid,
    num_hidden: int,
    *,
    min_num_patches: int,
    max_num_patches: int | None = None,
    min_aspect: float = 0.3,
    give_up: bool = True,
    last_edge: bool = True,
) -> Tensor:
    """Rectangles that together hide at most `num_hidden` patches: (B, N) bool, all images of the batch at once.

    A rectangle has a uniform area between `min_num_patches` and what is still missing (also where these bounds cross),
    a log-uniform aspect ratio and a uniform place. It is accepted if it is smaller than the grid on both axes and hides
    between one and the missing number of new patches (Bao et al. 2021, algorithm 1; `masking_generator.py`).

    Args:
        rand: (B, attempts * 4) uniform numbers: area, aspect ratio, top and left of each attempt.
        give_up: an image is finished when ten rectangles in a row did not fit; otherwise it goes on with the next one.
        last_edge: False keeps the last row and column visible, as mmpretrain's generator does.
    """
    height, width = grid.shape
    numbers = rand.unflatten(1, (-1, NUMBERS_PER_ATTEMPT))
    rows = torch.arange(height, device=rand.device)[None, :, None]
    columns = torch.arange(width, device=rand.device)[None, None, :]
    hidden = torch.zeros(len(rand), height, width, dtype=torch.bool, device=rand.device)
    missing = torch.full((len(rand),), num_hidden, device=rand.device)
    failures = torch.zeros_like(missing)
    log_aspect = math.log(min_aspect)
    for area_draw, aspect_draw, top_draw, left_draw in numbers.permute(1, 2, 0):
        unfinished = (missing > 0) & (failures < ATTEMPTS_PER_BLOCK)
        if rand.device.type == "cpu" and not unfinished.any():
            break
        limit = missing if max_num_patches is None else missing.clamp(max=max_num_patches)
        area = min_num_patches + area_draw * (limit - min_num_patches)
        aspect = (log_aspect * (2 * aspect_draw - 1)).exp()
        block_height, block_width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (block_height < height) & (block_width < width)
        top = (top_draw * (height - block_height + last_edge)).floor()
        left = (left_draw * (width - block_width + last_edge)).floor()
        block = (
            (rows >= top[:, None, None])
            & (rows < (top + block_height)[:, None, None])
            & (columns >= left[:, None, None])
            & (columns < (left + block_width)[:, None, None])
        )
        added = (block & ~hidden).sum((1, 2))
        accepted = unfinished & fits & (added > 0) & (added <= limit)
        hidden |= block & accepted[:, None, None]
        missing = missing - added * accepted
        failures = (failures + 1) * ~accepted if give_up else failures
    return hidden.flatten(1)


def complete(hidden: Tensor, noise: Tensor, num_hidden: int) -> Tensor:
    """hidden (B, N) bool with at most `num_hidden` each -> exactly that many: visible patches of least noise (B, N)."""
    order = noise.masked_fill(hidden, -1.0).argsort(dim=1, stable=True)
    return torch.zeros_like(hidden).scatter(1, order[:, :num_hidden], True)


class BlockMasker(Masker):
    """Hide rectangular blocks until a given number of patches is hidden (BEiT, MaskFeat, BEiT v2)."""

    name = "block"

    class Config(Section):
        mask_ratio: float = Field(0.4, gt=0, lt=1)
        """Share of the patches to hide, rounded to the nearest number."""
        num_hidden: int | None = Field(None, gt=0)
        """Number of patches to hide, instead of `mask_ratio` (BEiT: 75 of 196)."""
        mask_patch_size: int | None = Field(None, gt=0)
        """Side of a patch of the mask in pixels; the encoder's token by default."""
        min_num_patches: int | None = Field(None, gt=0)
        """Smallest area of a block in patches; a fifth of all to hide by default (MaskFeat). BEiT has 16."""
        max_num_patches: int | None = Field(None, gt=0)
        """Largest area of a block in patches; by default what is still missing."""
        min_aspect: float = Field(0.3, gt=0, le=1)
        """Smallest ratio of a block's sides; the largest is its inverse."""
        rule: Literal["exact", "stop_short", "mmpretrain"] = "exact"
        """When ten blocks in a row did not fit: hide random single patches up to the exact number (BEiT v2), stop with
        fewer (BEiT, MaskFeat), or go on trying, with the last row and column always visible (mmpretrain)."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c = self.config
        _, grid = cell_grid(specs, c.mask_patch_size)
        self.num_hidden = round(grid.num_patches * c.mask_ratio) if c.num_hidden is None else c.num_hidden
        if not 0 < self.num_hidden < grid.num_patches:
            key = f"mask_ratio {c.mask_ratio}" if c.num_hidden is None else f"num_hidden {c.num_hidden}"
            raise ValueError(f"{key} hides {self.num_hidden} of the {grid.num_patches} patches of the mask")
        self.min_num_patches = max(1, self.num_hidden // 5) if c.min_num_patches is None else c.min_num_patches
        if self.min_num_patches > self.num_hidden:
            raise ValueError(f"min_num_patches {self.min_num_patches} is more than the {self.num_hidden} to hide")
        equal = c.rule != "stop_short"
        self.spec = MaskerSpec(grid, equal=equal, num_hidden=self.num_hidden)

    def forward(self, step: Step, views: Views) -> Masked:
        c, grid = self.config, self.spec.grid
        keep_trying = c.rule == "mmpretrain"
        num_numbers = (
            NUMBERS_PER_ATTEMPT * MAX_ATTEMPTS * (8 if keep_trying else 1)
        )  # mmpretrain: 1 in 2,000 needs over 128
        hidden = draw_blocks(
            step.rand("mask", num_numbers),
            grid,
            self.num_hidden,
            min_num_patches=self.min_num_patches,
            max_num_patches=c.max_num_patches,
            min_aspect=c.min_aspect,
            give_up=not keep_trying,
            last_edge=not keep_trying,
        )
        if c.rule == "stop_short":
            return Masked({"x": Mask(hidden, grid, max_hidden=self.num_hidden)}, views)
        hidden = complete(hidden, step.rand("mask completion", grid.num_patches), self.num_hidden)
        return Masked({"x": Mask(hidden, grid, equal=True, num_hidden=self.num_hidden)}, views)


class NoMasker(Masker):
    """Hide nothing and predict everything: for distillation (TinyMIM) and tokenizers."""

    name = "none"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.spec = MaskerSpec(specs.encoder.grid, equal=True, shared=True, num_hidden=0)

    def forward(self, step: Step, views: Views) -> Masked:
        mask = Mask.none(len(step.positions), self.spec.grid, step.positions.device)
        return Masked({"x": mask.predicting(~mask.hidden)}, views)
