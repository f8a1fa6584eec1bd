"""my_method: hide all patches but one of every cell, predict edges. The rest of the method is built in."""

import torch
from mim_framework import Grid, Mask, Masked, Masker, MaskerSpec, Section, Specs, Step, Target, TargetSpec, Views
from mim_framework import hookimpl, patchify
from pydantic import Field

requires_api = "2"


def one_per_cell(noise: torch.Tensor, grid: Grid, cell_size: int) -> Mask:
    """noise (B, N): of every square of cell_size x cell_size patches, the one with the most noise stays visible."""
    _, visible = torch.nn.functional.max_pool2d(noise.unflatten(1, (1, *grid.shape)), cell_size, return_indices=True)
    hidden = torch.ones_like(noise, dtype=torch.bool).scatter(1, visible.flatten(1), False)
    return Mask(hidden, grid, equal=True, num_hidden=hidden.shape[1] - visible[0].numel())


class CellMasker(Masker):
    """Hide all patches but a random one of every cell, so that the visible ones are spread evenly."""

    name = "my_method"

    class Config(Section):
        cell_size: int = Field(2, ge=2)
        """Side of a cell in patches; 2 hides three quarters of the image."""

    def __init__(self, config: Config, specs: Specs) -> None:
        super().__init__(config, specs)
        self.grid, self.cell_size = specs.encoder.grid, config.cell_size
        if any(side % self.cell_size for side in self.grid.shape):
            raise ValueError(f"cell_size {self.cell_size} does not divide the encoder's grid of {self.grid} patches")
        self.spec = MaskerSpec(self.grid, equal=True, num_hidden=self.grid.num_patches * (1 - 1 / self.cell_size**2))

    def forward(self, step: Step, views: Views) -> Masked:
        return Masked({"x": one_per_cell(step.rand("mask", self.grid.num_patches), self.grid, self.cell_size)}, views)


class EdgeTarget(Target):
    """Vertical and horizontal gradient of every pixel's brightness, which stay when the whole image gets brighter."""

    name = "my_method"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.patch_size = specs.encoder.stride
        self.spec = TargetSpec("dense", 2 * self.patch_size[0] * self.patch_size[1], specs.encoder.grid)

    def forward(self, step: Step, masked: Masked) -> torch.Tensor:
        brightness = masked.clean("x").mean(1, keepdim=True)
        return patchify(torch.cat(torch.gradient(brightness, dim=(2, 3)), dim=1), self.patch_size)


@hookimpl
def mim_maskers():
    return [CellMasker]


@hookimpl
def mim_targets():
    return [EdgeTarget]
