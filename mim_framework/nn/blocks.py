"""Transformer blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask
from mim_framework.nn.attention import Attention
from mim_framework.nn.drop_path import DropPath

NORM_EPS = 1e-6
"""Term under the root of the LayerNorms of vision transformers (timm, MAE, BEiT); torch has 1e-5."""


class Block(nn.Module):
    """Pre-norm transformer block with the names of timm's.

    Args:
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`.
        qkv_bias: biases of query, key and value: all, query and value only (BEiT), or none.
        layer_scale: initial value of a learned factor on every channel of both residual branches; None for no factor.
        drop_path: probability that a residual branch is left out for a sample in training.
        table_grid: grid of the patches, for a table of its own of biases by relative position.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: Literal["full", "qv", "none"] = "full",
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
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, shared_bias: Tensor | None = None, want_qkv: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), shared_bias (1, heads, T, T) -> (B, T, D), and (3, B, heads, T, d) if wanted."""
        mixed, qkv = self.attn(self.norm1(x), shared_bias)
        return self.finish(x, mixed), qkv if want_qkv else None

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x (B, M, D) and what its attention gave (B, M, D) -> (B, M, D): both residual branches."""
        x = x + self.drop_path1(mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        expanded = self.mlp(self.norm2(x))
        return x + self.drop_path2(expanded if self.gamma_2 is None else self.gamma_2 * expanded)


def drop_path_ramp(rate: float, depth: int) -> list[float]:
    """Stochastic depth of `depth` blocks: from 0 at the first linearly to `rate` at the last."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]


def run_blocks(
    blocks: Iterable[Block], x: Tensor, ask: Ask, shared_bias: Tensor | None = None
) -> tuple[Tensor, dict[str, dict[int, Tensor]]]:
    """x (B, T, D) through all blocks -> (B, T, D), and `layers`, `attn` and `qkv` of `Latent` as far as asked for.

    Args:
        shared_bias: (1, heads, T, T) added to the logits of every attention.
    """
    layers: dict[int, Tensor] = {}
    attn: dict[int, Tensor] = {}
    qkvs: dict[int, Tensor] = {}
    for i, block in enumerate(blocks):
        x, qkv = block(x, shared_bias, i in ask.qkv or i in ask.attn)
        if i in ask.layers:
            layers[i] = x
        if i in ask.qkv:
            qkvs[i] = qkv
        if i in ask.attn:
            q, k, _ = qkv
            attn[i] = block.attn.weights(q, k, shared_bias)
    return x, {"layers": layers, "attn": attn, "qkv": qkvs}
