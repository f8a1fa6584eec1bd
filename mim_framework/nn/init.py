"""How weights begin."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mim_framework.nn.blocks import Block

ONE_STD = 0.02
"""Normal weights of 0.02 are cut at one standard deviation, as officially in pre-training of SimMIM and BEiT."""
FAR = 2.0
"""Normal weights of 0.02 are cut so far out that it makes no difference, as by default in timm and torch."""


def trunc_normal(tensor: Tensor, cut: float = FAR) -> None:
    """Standard deviation 0.02 before it is cut at -cut and cut."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-cut, b=cut)


def init_linear(layer: nn.Linear | nn.Conv2d, cut: float = FAR) -> None:
    """Truncated normal weights, zero biases."""
    trunc_normal(layer.weight, cut)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def xavier_if_linear(module: nn.Module) -> None:
    """For `module.apply`: Xavier-uniform weights and zero biases of linear layers, fused ones as one (MAE, MixMIM)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def rescale_by_depth(blocks: Iterable[Block], first: int = 1) -> None:
    """Divide what block i, counted from `first`, adds to the residual stream by sqrt(2i) (BEiT, `fix_init_weight`)."""
    for number, block in enumerate(blocks, start=first):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))
