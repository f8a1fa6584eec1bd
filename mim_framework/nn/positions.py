"""Positions of tokens: fixed sin-cos tables, and learned biases of relative positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mim_framework.contract.mask import Grid


def sincos_position_table(dim: int, grid: Grid, *, row_first: bool = False, num_prefix_tokens: int = 0) -> Tensor:
    """Fixed sin-cos positions (prefix + N, dim) float32, zeros for the prefix, as in MAE's `util/pos_embed.py`.

    The first half of the channels encodes the column, the second half the row; within a half all sines come first.
    Angles are in float64. `row_first` exchanges the halves, as mmpretrain has them. With another number of axes the
    last one comes first too, and all have as many channels, but that the first one, time, takes what remains.

    Raises:
        ValueError: if `dim` is not a multiple of 4, or of 2 for every axis where there are not two.
    """
    num_axes = len(grid.shape)
    if dim % (4 if num_axes == 2 else 2):
        of = 4 if num_axes == 2 else 2
        raise ValueError(f"a {num_axes}-D sin-cos position table needs a width that is a multiple of {of}, got {dim}")
    share = dim // (2 * num_axes) * 2
    widths = [dim - (num_axes - 1) * share, *[share] * (num_axes - 1)]
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid.shape), indexing="ij")
    parts = []
    order = range(num_axes) if row_first else reversed(range(num_axes))
    for axis in order:
        half = widths[axis] // 2
        frequencies = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float64) / (widths[axis] / 2.0))
        angles = places[axis].reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat([torch.zeros(num_prefix_tokens, dim), torch.cat(parts, dim=1).float()])


def relative_position_index(grid: Grid) -> Tensor:
    """(1 + N, 1 + N) int64: for a query (row) and a key (column), class token first, the row of the bias table.

    Patch to patch: (dy + h - 1) * (2w - 1) + dx + w - 1. The three last rows of the table are for the class token as
    query, as key, and for itself (BEiT, `modeling_finetune.py`).

    Raises:
        ValueError: if the grid has other axes than rows and columns.
    """
    height, width = _plane(grid)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = row.flatten(), column.flatten()
    dy, dx = row[:, None] - row[None], column[:, None] - column[None]
    index = torch.empty(grid.num_patches + 1, grid.num_patches + 1, dtype=torch.int64)
    index[1:, 1:] = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    patches = (2 * height - 1) * (2 * width - 1)
    index[0], index[:, 0], index[0, 0] = patches, patches + 1, patches + 2
    return index


def relative_position_table(grid: Grid, num_heads: int) -> nn.Parameter:
    """(relative positions + 3, heads), zeros."""
    height, width = _plane(grid)
    return nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1) + 3, num_heads))


class RelativePositionBias(nn.Module):
    """A learned number for every relative position and head, the same in all blocks."""

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = relative_position_table(grid, num_heads)
        self.register_buffer("relative_position_index", relative_position_index(grid), persistent=False)

    def forward(self) -> Tensor:
        """(1, heads, T, T)"""
        return look_up_bias(self.relative_position_bias_table, self.relative_position_index)


def look_up_bias(table: Tensor, index: Tensor) -> Tensor:
    """table (rows, heads), index (T, T) -> biases (1, heads, T, T)."""
    return table.t()[:, index.flatten()].unflatten(1, index.shape)[None]


def _plane(grid: Grid) -> tuple[int, int]:
    if len(grid.shape) != 2:
        raise ValueError(f"biases of relative positions are for images; the grid {grid} has {len(grid.shape)} axes")
    return grid.shape
