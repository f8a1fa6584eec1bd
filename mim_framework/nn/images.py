"""Images in the normalisation that a network was made for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mim_framework.contract.specs import ViewSpec


class Renormalize(nn.Module):
    """A view (B, C, H, W) normalised as `view` says, in another normalisation; mean 0 and std 1 is [0, 1].

    It leaves images as they are, to the bit, where both are the same or one of the two is not known.
    """

    def __init__(self, view: ViewSpec, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        scale = shift = None
        if None not in (view.mean, view.std, mean, std) and (view.mean, view.std) != (tuple(mean), tuple(std)):
            old_mean, old_std, mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (view.mean, view.std, mean, std))
            scale, shift = old_std / std, (old_mean - mean) / std
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, view: Tensor) -> Tensor:
        """view (B, C, H, W) -> the same images in the other normalisation."""
        return view if self.scale is None else view * self.scale + self.shift
