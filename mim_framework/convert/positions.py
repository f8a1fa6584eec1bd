"""Position tables for another image size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mim_framework.records import Grid


def resize_position_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """table (1, prefix + N, D) of a token grid -> the table of another; rows of prefix tokens are kept.

    Bicubic, without antialiasing, as MAE's `util/pos_embed.py` does it when fine-tuning.

    Raises:
        ValueError: if the table is too short for the old grid.
    """
    num_prefix_tokens = table.shape[1] - old.num_patches
    if num_prefix_tokens < 0:
        raise ValueError(f"a position table of {table.shape[1]} rows cannot be that of a grid {old}")
    if old == new:
        return table
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = patches.unflatten(1, old.shape).permute(0, 3, 1, 2)
    resized = interpolate(image.float(), size=new.shape, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
