"""Positions of tokens: fixed sin-cos tables, and learned biases of relative positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mim_framework.contract.mask import Grid


def sincos_position_table(dim: int, grid: Grid, *, row_first: bool = False, num_prefix_tokens: int = 0) -> Tensor:
    """Fixed 2-D sin-cos positions (prefix + N, dim) float32, zeros for the prefix, as in MAE's `util/pos_embed.py`.

    The first half of the channels encodes the column, the second half the row; within a half all sines come first.
    Angles are in float64. `row_first` exchanges the halves, as mmpretrain has them.

    Raises:
        ValueError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos position table needs a width that is a multiple of 4, got {dim}")
    rows, columns = grid.shape
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4.0))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    halves = []
    for coordinate in (row, column) if row_first else (column, row):
        angles = coordinate.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat([torch.zeros(num_prefix_tokens, dim), torch.cat(halves, dim=1).float()])


def relative_position_index(grid: Grid) -> Tensor:
    """(1 + N, 1 + N) int64: for a query (row) and a key (column), class token first, the row of the bias table.

    Patch to patch: (dy + h - 1) * (2w - 1) + dx + w - 1. The three last rows of the table are for the class token as
    query, as key, and for itself (BEiT, `modeling_finetune.py`).
    """
    height, width = grid.shape
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
    height, width = grid.shape
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
