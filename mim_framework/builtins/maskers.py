"""Maskers that hide patches without looking at the image: one by one, or in rectangular blocks."""

from __future__ import annotations

import math
from abc import abstractmethod
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
from mim_framework.nn.masking import cell_grid, hide_smallest, mask_from_noise
from mim_framework.nn.patches import shown


class CellMasker(Masker):
    """A masker that hides cells of one view or of several, each by itself, on grids of any number of axes."""

    class Config(Section):
        mask_patch_size: int | None = Field(None, gt=0)
        """Side of a mask cell in pixels, along height and width; the encoder's token by default. SimMIM uses 32."""
        tube: bool = False
        """Hide a cell of a clip at all times at once (VideoMAE)."""
        views: tuple[str, ...] = Field(("x",), min_length=1)
        """The views to mask, each by draws of its own."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c = self.config
        self.cells = {view: cell_grid(specs, c.mask_patch_size, view, tube=c.tube) for view in c.views}

    def forward(self, step: Step, views: Views) -> Masked:
        masks = {view: self.mask(step, view, f"mask {view}".removesuffix(" x")) for view in self.config.views}
        return Masked(masks, views)

    @abstractmethod
    def mask(self, step: Step, view: str, stream: str) -> Mask:
        """The mask of one view, from random numbers of a stream whose name begins so."""

    def publish(self, num_hidden: dict[str, int], *, equal: bool, shared: bool = False) -> None:
        """Set the spec; `num_hidden` of every view."""
        grids = {view: grid for view, (_, grid) in self.cells.items()}
        first, *others = self.config.views
        self.spec = MaskerSpec(
            grids[first],
            equal=equal,
            shared=shared,
            num_hidden=num_hidden[first],
            views=self.config.views,
            grids=grids if others else {},
        )


class RandomMasker(CellMasker):
    """Hide cells uniformly at random, the same number in every image (He et al. 2021, section 3; Xie et al. 2021)."""

    name = "random"

    class Config(CellMasker.Config):
        mask_ratio: float = Field(0.75, gt=0, lt=1)
        """Share of the cells hidden from the encoder."""
        rounding: Literal["keep_floor", "hide_ceil", "hide_floor"] = "keep_floor"
        """When the ratio gives no whole number: MAE rounds the visible count down, SimMIM the hidden one up, Point-MAE
        the hidden one down."""
        shared: bool = False
        """One mask for the whole micro-batch instead of one per image."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.kept = {view: self.keep(*each) for view, each in self.cells.items()}
        self.num_keep = self.kept[self.config.views[0]]
        hidden = {view: grid.num_patches - self.kept[view] for view, (_, grid) in self.cells.items()}
        self.publish(hidden, equal=True, shared=self.config.shared)

    def keep(self, cell: tuple[int, ...], grid: Grid) -> int:
        """How many of the cells of a grid stay visible."""
        ratio, count = self.config.mask_ratio, grid.num_patches
        num_keep = {
            "keep_floor": int(count * (1 - ratio)),
            "hide_ceil": count - ceil(count * ratio),
            "hide_floor": count - int(count * ratio),
        }[self.config.rounding]
        if num_keep < 1:
            raise ValueError(f"mask_ratio {ratio} leaves none of the {count} cells of {shown(cell)} pixels visible")
        if num_keep == count:
            raise ValueError(f"mask_ratio {ratio} hides none of the {count} cells of {shown(cell)} pixels")
        return num_keep

    def mask(self, step: Step, view: str, stream: str) -> Mask:
        grid = self.cells[view][1]
        noise = step.rand(stream, grid.num_patches)
        if not self.config.shared:
            return mask_from_noise(noise, self.kept[view], grid)
        return mask_from_noise(noise[:1].expand_as(noise), self.kept[view], grid).as_shared()


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
    return hide_smallest(noise.masked_fill(hidden, -1.0), num_hidden)


class BlockMasker(CellMasker):
    """Hide rectangular blocks until a given number of patches is hidden (BEiT, MaskFeat, BEiT v2)."""

    name = "block"

    class Config(CellMasker.Config):
        mask_ratio: float = Field(0.4, gt=0, lt=1)
        """Share of the patches to hide, rounded to the nearest number."""
        num_hidden: int | None = Field(None, gt=0)
        """Number of patches to hide, instead of `mask_ratio` (BEiT: 75 of 196)."""
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
        self.counts = {view: self.count(grid) for view, (_, grid) in self.cells.items()}
        self.publish(self.counts, equal=self.config.rule != "stop_short")

    def count(self, grid: Grid) -> int:
        """How many patches of a grid are to be hidden."""
        c = self.config
        if grid.shape[:-2] not in ((), (1,)) or len(grid.shape) < 2:
            raise ValueError(f"masker 'block' draws rectangles, the grid is {grid}; of a clip give tube: true")
        num_hidden = round(grid.num_patches * c.mask_ratio) if c.num_hidden is None else c.num_hidden
        if not 0 < num_hidden < grid.num_patches:
            key = f"mask_ratio {c.mask_ratio}" if c.num_hidden is None else f"num_hidden {c.num_hidden}"
            raise ValueError(f"{key} hides {num_hidden} of the {grid.num_patches} patches of the mask")
        if self.smallest(num_hidden) > num_hidden:
            raise ValueError(f"min_num_patches {c.min_num_patches} is more than the {num_hidden} to hide")
        return num_hidden

    def smallest(self, num_hidden: int) -> int:
        """Area of the smallest block, in patches."""
        return max(1, num_hidden // 5) if self.config.min_num_patches is None else self.config.min_num_patches

    def mask(self, step: Step, view: str, stream: str) -> Mask:
        c, grid, num_hidden = self.config, self.cells[view][1], self.counts[view]
        keep_trying = c.rule == "mmpretrain"
        attempts = MAX_ATTEMPTS * (8 if keep_trying else 1)  # mmpretrain: 1 in 2,000 needs over 128
        hidden = draw_blocks(
            step.rand(stream, NUMBERS_PER_ATTEMPT * attempts),
            Grid(grid.shape[-2:]),
            num_hidden,
            min_num_patches=self.smallest(num_hidden),
            max_num_patches=c.max_num_patches,
            min_aspect=c.min_aspect,
            give_up=not keep_trying,
            last_edge=not keep_trying,
        )
        if c.rule == "stop_short":
            return Mask(hidden, grid, max_hidden=num_hidden)
        noise = step.rand(stream.replace("mask", "mask completion", 1), grid.num_patches)
        return Mask(complete(hidden, noise, num_hidden), grid, equal=True, num_hidden=num_hidden)


class NoMasker(Masker):
    """Hide nothing and predict everything: for distillation (TinyMIM) and tokenizers."""

    name = "none"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        views = specs.encoder.views
        self.grids = {view: specs.encoder.of(view).grid for view in views}
        grids = self.grids if len(views) > 1 else {}
        self.spec = MaskerSpec(self.grids[views[0]], equal=True, shared=True, views=views, grids=grids)

    def forward(self, step: Step, views: Views) -> Masked:
        masks = {view: Mask.none(len(step.positions), grid, step.positions.device) for view, grid in self.grids.items()}
        return Masked({view: mask.predicting(~mask.hidden) for view, mask in masks.items()}, views)
