"""Transformer blocks on windows that are never shifted, which MixMIM's encoder and decoder share. Start at `Block`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from mim_framework import Grid, Mask
from mim_framework.nn import DropPath, attend, trunc_normal


class Attention(nn.Module):
    """Self-attention inside windows, with learned biases by relative position if `window` is given."""

    def __init__(self, dim: int, num_heads: int, window: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
            trunc_normal(self.relative_position_bias_table)

    def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        """x (B, W, T, D), W windows of T tokens -> (B, W, T, D), before the output projection.

        apart (1 or B, W, 1, T, T) bool: tokens that must not see one another.
        """
        num_windows = x.shape[1]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        mixed = attend(*qkv, self.bias(num_windows, apart))  # windows stand beside heads, so that images share biases
        return mixed.unflatten(1, (num_windows, self.num_heads)).transpose(2, 3).flatten(3)

    def bias(self, num_windows: int, apart: Tensor | None) -> Tensor | None:
        """(1 or B, W * heads, T, T): what is added to the logits."""
        if self.window is None:
            return None
        bias = relative_position_bias(self.relative_position_bias_table, self.window)
        if apart is None:
            return bias.expand(num_windows, -1, -1, -1).flatten(0, 1)[None]
        return bias.masked_fill(apart, -torch.inf).flatten(1, 2)


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """table ((2w - 1)^2, heads) -> (heads, w^2, w^2), the same as Swin's `table[relative_position_index]`.

    For query (y, x) and key (y', x') it reads place (y + w - 1 - y', x + w - 1 - x') of the table. Overlapping views
    with the key reversed say so without an index, whose gradient would take longer.
    """
    places = table.t().unflatten(1, (2 * window - 1, 2 * window - 1))
    pairs = places.unfold(1, window, 1).unfold(2, window, 1).flip(3, 4)
    return pairs.flatten(3, 4).flatten(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block on windows; LayerNorm with torch's eps of 1e-5, unlike MAE's."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        window: int | None = None,
        *,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        """x (B, W, T, D) -> the same shape; `apart` as in `Attention`."""
        return self.finish(x, self.attn(self.norm1(x), apart))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn.proj(mixed))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Half the grid, twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, cells: Tensor) -> Tensor:
        """cells (..., 4 D) of `merge_places` -> (..., 2 D)."""
        return self.reduction(self.norm(cells)).to(cells.dtype)  # under autocast the residual stream stays float32


def merge_places(x: Tensor, grid: Grid) -> Tensor:
    """x (B, N, D) on `grid` -> (B, N / 4, 4 D): the places of a cell in the order (0, 0), (1, 0), (0, 1), (1, 1)."""
    rows, columns = grid.shape
    cells = x.unflatten(1, (rows // 2, 2, columns // 2, 2)).permute(0, 1, 3, 4, 2, 5)
    return cells.flatten(3).flatten(1, 2)


class Stage(nn.Module):
    """Blocks on one grid. All have the same windows, never shifted, so tokens are put in window order only once."""

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_heads: int,
        window: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        *,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.grid, self.window = grid, window
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, window, drop_path=rate) for rate in drop_path)
        self.downsample = PatchMerging(dim) if downsample else None

    def to_windows(self, x: Tensor) -> Tensor:
        """x (B, N, D) in raster order -> (B, W, T, D)."""
        (rows, columns), w = self.grid.shape, self.window
        return x.unflatten(1, (rows // w, w, columns // w, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def from_windows(self, x: Tensor) -> Tensor:
        """The inverse."""
        (rows, columns), w = self.grid.shape, self.window
        x = x.unflatten(2, (w, w)).unflatten(1, (rows // w, columns // w))
        return x.transpose(2, 3).flatten(1, 4)

    def apart(self, mask: Mask) -> Tensor:
        """(1 or B, W, 1, T, T) bool: pairs of tokens in a window that come from two images."""
        hidden = mask.at(self.grid).hidden
        hidden = self.to_windows((hidden[:1] if mask.shared else hidden)[..., None])
        return (hidden != hidden.mT)[:, :, None]
