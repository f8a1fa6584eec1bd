"""Transformer blocks."""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from mim_framework.contract.mask import Grid
from mim_framework.nn.attention import Attention, attend

NORM_EPS = 1e-6


class Block(nn.Module):
    """Pre-norm transformer block, with layer scale if asked for."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: str = "full",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        table_grid: Grid | None = None,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, table_grid)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, shared_bias: Tensor | None = None, want_qkv: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), shared_bias (1, heads, T, T) -> (B, T, D), and (3, B, heads, T, d) if wanted."""
        qkv = self.attn.project(self.norm1(x))
        mixed = self.attn.proj(attend(*qkv, self.attn.bias(shared_bias)).transpose(1, 2).flatten(2))
        x = x + self.drop_path(mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        expanded = self.mlp(self.norm2(x))
        x = x + self.drop_path(expanded if self.gamma_2 is None else self.gamma_2 * expanded)
        return x, qkv if want_qkv else None
