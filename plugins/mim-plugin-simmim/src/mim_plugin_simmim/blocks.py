"""Blocks of Swin and SwinV2: timm's parameters, another forward pass. Start at `mix_in_windows`."""

from __future__ import annotations

import math

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor
from torch.nn.functional import linear, normalize

from mim_framework.nn import attend, look_up_bias, split_heads


class WindowAttention(swin_transformer.WindowAttention):
    """timm's attention inside windows, through the attention that all encoders share."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (images * windows, T, D), mask (windows, T, T) to add to the logits -> (images * windows, T, D)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        bias = look_up_bias(self.relative_position_bias_table, self.relative_position_index)
        return self.proj(attend(q, k, v, with_mask(bias, mask, len(x))).transpose(1, 2).flatten(2))


class WindowAttentionV2(swin_transformer_v2.WindowAttention):
    """timm's cosine attention with position biases from a small network, the same way."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (images * windows, T, D), mask (windows, T, T) to add to the logits -> (images * windows, T, D)."""
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = split_heads(linear(x, self.qkv.weight, qkv_bias), self.num_heads)
        scale = self.logit_scale.clamp(max=math.log(100)).exp() * math.sqrt(q.shape[-1])  # `attend` divides by the root
        q, k = (normalize(q, dim=-1) * scale).to(v.dtype), normalize(k, dim=-1).to(v.dtype)
        with torch.autocast(x.device.type, enabled=False):
            # Official: 16 * sigmoid(table), which is 8 * tanh(table / 2) and a constant that no softmax sees. Around
            # zero bfloat16 is finer than around 8.
            table = 8 * (self.cpb_mlp(self.relative_coords_table).flatten(0, 2) / 2).tanh()
        bias = look_up_bias(table, self.relative_position_index)
        return self.proj(attend(q, k, v, with_mask(bias, mask, len(x))).transpose(1, 2).flatten(2))


def with_mask(bias: Tensor, mask: Tensor | None, num_windows: int) -> Tensor:
    """bias (1, heads, T, T), mask (windows of an image, T, T) or None -> bias of one window or of all."""
    return bias if mask is None else (bias + mask[:, None]).repeat(num_windows // len(mask), 1, 1, 1)


class SwinBlock(swin_transformer.SwinTransformerBlock):
    """timm's block of Swin, norms before the residual branches."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, H, W, D)."""
        x = x + self.drop_path1(mix_in_windows(self, self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """timm's block of SwinV2, norms after the residual branches."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, H, W, D)."""
        x = x + self.drop_path1(self.norm1(mix_in_windows(self, x)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


def mix_in_windows(block: SwinBlock | SwinV2Block, x: Tensor) -> Tensor:
    """Attention of a block inside its windows, which divide the map: x (B, H, W, D) -> (B, H, W, D).

    A shifted map is rolled, and the mask keeps what then meets at its border apart.
    """
    (height, width), shift = block.window_size, block.shift_size
    if block.attn_mask is not None:
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    windows = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)  # (B, rows, columns, h, w, D)
    mixed = block.attn(windows.flatten(3, 4).flatten(0, 2), block.attn_mask)
    x = mixed.view(windows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x if block.attn_mask is None else x.roll(shift, (1, 2))
