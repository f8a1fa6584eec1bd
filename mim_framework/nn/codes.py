"""How a vocabulary of codes is used."""

from __future__ import annotations

import torch
from torch import Tensor


def perplexity(counts: Tensor) -> Tensor:
    """counts (..., K) of how often each of K codes was used -> (...): exp of the entropy; K if all are used alike."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(-1).exp()


def usage_picture(counts: Tensor, height: int = 128, width: int = 512) -> Tensor:
    """counts (K,) -> (1, height, width) in [0, 1]: a dark bar of logarithmic height for each code, longest first."""
    heights = counts.float().sort(descending=True).values.log1p()
    columns = torch.arange(width, device=counts.device) * len(counts) // width
    bars = heights[columns] / heights[0].clamp(min=1e-12) * height
    rows = torch.arange(height, 0, -1, device=counts.device)[:, None] - 0.5
    return (bars < rows).float()[None]
