"""Two images exchange the cells of one mask. Start at `MixMasker.forward`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mim_framework import Mask, Masked, Masker, MaskerSpec, RecipeError, Section, Specs, Step, Views
from mim_framework.nn import cell_grid, hide_smallest, shown


class MixMasker(Masker):
    """Two images exchange the cells of one random mask: what either hides, the other one's row shows.

    The partner of the image at the run's position 2k is the one at 2k + 1, however a step is divided among ranks and
    micro-batches. Mixing pixels is exactly mixing tokens, as every token lies inside one cell.
    """

    name = "mixmim"

    class Config(Section):
        mask_ratio: float = Field(0.5, gt=0, lt=1)
        """Share of the cells that an image takes from its partner, rounded down."""
        mask_patch_size: int | None = Field(None, gt=0)
        """Side of a cell in pixels; the encoder's output stride by default."""
        scope: Literal["batch", "pair"] = "batch"
        """One mask for all images of an optimizer step, as officially, or one for every pair."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.cell, grid = cell_grid(specs, self.config.mask_patch_size)
        self.num_hidden = int(grid.num_patches * self.config.mask_ratio)
        if not self.num_hidden:
            ratio, count = self.config.mask_ratio, grid.num_patches
            raise ValueError(f"mask_ratio {ratio} hides none of the {count} cells of {shown(self.cell)} pixels")
        self.spec = MaskerSpec(
            grid,
            equal=True,
            shared=self.config.scope == "batch",
            num_hidden=self.num_hidden,
            rewrites=("x",),
            mixes=True,
        )

    def forward(self, step: Step, views: Views) -> Masked:
        images, grid = views["x"], self.spec.grid
        if self.training and len(images) % 2:
            raise RecipeError(
                f"masker 'mixmim' mixes images in pairs, a micro-batch of {len(images)} leaves one alone; "
                "use an even train.batch_size"
            )
        partner = partner_rows(step.positions)
        hidden = hide_smallest(self.noise(step), self.num_hidden).expand(len(images), -1)
        mask = Mask(
            hidden,
            grid,
            predict=torch.ones_like(hidden),  # the two rows of a pair together show every position of both images
            equal=True,
            shared=self.spec.shared,
            num_hidden=self.num_hidden,
            partner=partner,
        )
        pixels = hidden.unflatten(1, grid.shape).repeat_interleave(self.cell[0], 1).repeat_interleave(self.cell[1], 2)
        mixed = torch.where(pixels[:, None], images[partner], images)
        return Masked({"x": mask}, views | {"x": mixed}, originals={"x": images})

    def noise(self, step: Step) -> Tensor:
        """(1 or B, N): one draw for the step, or in both rows of a pair that of its first image."""
        count = self.spec.grid.num_patches
        if self.spec.shared:
            return step.rand_batch("mask", count)[None].to(step.positions.device, non_blocking=True)
        return replace(step, positions=step.positions - step.positions % 2).rand("mask", count)


def partner_rows(positions: Tensor) -> Tensor:
    """positions (B,) of the run -> the row of each one's partner (B,); its own row if the partner is not next to it."""
    rows = torch.arange(len(positions), device=positions.device)
    neighbour = (rows + 1 - 2 * (positions % 2)).clamp(0, len(positions) - 1)
    return torch.where(positions[neighbour] == positions ^ 1, neighbour, rows)
