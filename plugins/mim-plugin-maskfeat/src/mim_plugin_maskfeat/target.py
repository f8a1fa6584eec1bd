"""What MaskFeat predicts: the HOG of each patch. Start at `HOGTarget.describe`."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from mim_framework import Grid, Mask, Masked, Pred, Section, Specs, Step, Target, TargetSpec
from mim_framework.nn import gather_tokens, paste
from mim_plugin_maskfeat.hog import glyphs, hog, require_whole

USUAL_CELL_SIZE = 8  # SlowFast, `MaskMViT`: pool=8
GLYPH_SIZE = 16
"""Pixels that a cell of a picture has at least on a side."""


class HOGTarget(Target):
    """Histograms of oriented gradients of each patch of the clean view (Wei et al. 2022, section 3.2).

    A patch has C * bins * cells numbers, in the order (channel, bin, cell row, cell column).
    """

    name = "hog"

    class Config(Section):
        bins: int = Field(9, gt=0)
        """Orientations, over half a circle."""
        cell_size: int | None = Field(None, gt=0)
        """Side of a cell in pixels; by default 8 (MaskFeat), or the largest smaller divisor of the patch."""
        gaussian_window: int = Field(0, ge=0)
        """Side of the windows in which a Gaussian weighs the gradients, in pixels: 16 in mmpretrain, 0 for none."""
        flat_threshold: float = Field(3e-6, ge=0)
        """Gradients up to this size are zero, in the scale of the view: the rounding of a normalised 8-bit image."""
        patch_size: int | None = Field(None, gt=0)
        """Side of a predicted patch in pixels; the encoder's output stride by default."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c, view = self.config, specs.view("x")
        patch_size = c.patch_size or specs.encoder.stride[0]
        self.cell_size = c.cell_size or largest_divisor(patch_size, USUAL_CELL_SIZE)
        if patch_size % self.cell_size:
            better = largest_divisor(patch_size, self.cell_size)
            raise ValueError(
                f"cell_size {self.cell_size} does not divide the patch of {patch_size} pixels; {better} does"
            )
        require_whole(view.height_width, "patch_size", patch_size)
        require_whole(view.img_size, "gaussian_window", c.gaussian_window)
        self.cells_per_side = patch_size // self.cell_size
        grid = Grid(tuple(size // patch_size for size in view.img_size))
        self.spec = TargetSpec("dense", view.in_chans * c.bins * self.cells_per_side**2, grid)

    def forward(self, step: Step, masked: Masked) -> Pred:
        """Values at the predicted positions only, where the mask allows it."""
        ids = masked.masks["x"].at(self.spec.grid).ids_predict
        patches = self.describe(masked.clean("x"))
        return Pred(patches if ids is None else gather_tokens(patches, ids), self.spec.grid, ids)

    def describe(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, N, C * bins * cells)."""
        c = self.config
        cells = hog(
            images,
            bins=c.bins,
            cell_size=self.cell_size,
            gaussian_window=c.gaussian_window,
            flat_threshold=c.flat_threshold,
        )
        cells = cells.unflatten(4, (-1, self.cells_per_side)).unflatten(3, (-1, self.cells_per_side))
        return cells.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)  # cells (B, C, bins, h, row, w, column)

    def draw(self, pred: Pred, mask: Mask, view: Tensor) -> Tensor:
        """(B, 1, f * H, f * W) in [0, 1]: in every cell its edges, predicted ones where hidden, the image's elsewhere.

        f enlarges small cells to `GLYPH_SIZE`. Channels are averaged.
        """
        patches = paste(pred.values.float(), pred.ids, self.describe(view), mask.at(self.spec.grid))
        size = self.cell_size * math.ceil(GLYPH_SIZE / self.cell_size)
        shape = (*self.spec.grid.shape, -1, self.config.bins, self.cells_per_side, self.cells_per_side)
        cells = patches.unflatten(2, shape[2:]).unflatten(1, shape[:2]).mean(3).clamp(min=0)
        drawn = torch.einsum("bhwkrc,kyx->bhrywcx", cells, glyphs(self.config.bins, size).to(cells.device))
        return drawn.flatten(4).flatten(1, 3)[:, None].clamp(0, 1)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
