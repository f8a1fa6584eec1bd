"""Attention, with or without learned biases of relative positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from mim_framework.contract.mask import Grid
from mim_framework.nn.positions import look_up_bias, relative_position_index, relative_position_table


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: q (B, heads, M, d), k and v (B, heads, T, d) -> (B, heads, M, d).

    `bias` (1 or B, heads or 1, M, T), floating point and perhaps learned, is added to the logits. On a GPU the fused
    kernel does it all. On a CPU two cases are faster as batched products: bfloat16, where the fused backward pass is
    slow, and a learned bias, for which torch has no fused CPU kernel and falls back to one four times as slow.
    """
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if q.device.type != "cpu" or not (learned or q.dtype == torch.bfloat16):
        return scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    q, k, v, scale = q.contiguous(), k.contiguous(), v.contiguous(), q.shape[-1] ** -0.5
    logits = q * scale @ k.mT
    if bias is not None:
        logits += bias.to(q.dtype)
    return logits.softmax(-1) @ v


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Refuse a width that is not a whole number of heads.

    Raises:
        ValueError: naming both.
    """
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")


def split_heads(projected: Tensor, num_heads: int, count: int = 3) -> Tensor:
    """projected (B, T, count * D), of query, key and value or of some of them -> (count, B, heads, T, d)."""
    return projected.unflatten(-1, (count, num_heads, -1)).permute(2, 0, 3, 1, 4)


class Attention(nn.Module):
    """Self-attention in steps that a block can use one by one.

    Args:
        qkv_bias: biases of query, key and value: all, query and value only (BEiT), or none.
        table_grid: grid of the patches, for a table of its own of biases by relative position, class token first.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: Literal["full", "qv", "none"] = "full",
        table_grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "full")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if table_grid is not None:
            self.relative_position_bias_table = relative_position_table(table_grid, num_heads)
            self.register_buffer("relative_position_index", relative_position_index(table_grid), persistent=False)

    def forward(self, x: Tensor, shared_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), shared_bias as in `bias` -> (B, T, D), and query, key and value (3, B, heads, T, d)."""
        qkv = self.project(x)
        return self.output(*qkv, self.bias(shared_bias)), qkv

    def project(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> query, key and value, (3, B, heads, T, d)."""
        bias = self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return split_heads(linear(x, self.qkv.weight, bias), self.num_heads)

    def output(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q (B, heads, M, d), k and v (B, heads, T, d), bias as in `attend` -> (B, M, D)."""
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def weights(self, q: Tensor, k: Tensor, shared_bias: Tensor | None = None) -> Tensor:
        """q and k (B, heads, T, d) -> (B, heads, T, T): the share of each key in the output of each query."""
        logits, bias = q @ k.mT * self.scale, self.bias(shared_bias)
        return (logits if bias is None else logits + bias).softmax(-1)

    def bias(self, shared: Tensor | None) -> Tensor | None:
        """(1, heads, T, T): `shared`, which all blocks have, or the bias of this one if it has a table."""
        if self.relative_position_bias_table is None:
            return shared
        return look_up_bias(self.relative_position_bias_table, self.relative_position_index)
