"""Stochastic depth whose draws follow from the positions of the samples, as everything random of a run does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mim_framework.base import rng


class DropPath(nn.Module):
    """Leave a residual branch out for some rows in training, and divide what is kept by its share (Huang et al. 2016).

    In a step of a run the core draws, by the positions of the samples, so that ranks, micro-batches and a resumed run
    agree; every pass of the component around it has draws of its own. Elsewhere torch's generator does. Give every
    place in a block a module of its own, as those of one module are the same within a pass. Several rows of a sample
    stand as in `Mask.per_mask`. A pass that is made once more for its gradients has other draws: no checkpointing.

    Args:
        drop_prob: share of rows that lose the branch, in [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob is a share below 1, got {drop_prob}")
        self.drop_prob = drop_prob
        self.draw(None)

    def draw(self, bits: Tensor | None, noise: Tensor | None = None) -> None:
        """For the next pass: random patterns (B,) int64 and uniform numbers (B,) of the samples; None ends it."""
        self._bits, self._noise = bits, noise

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, ...) -> the same shape.

        Raises:
            ValueError: if the rows are no multiple of the samples of the step.
        """
        if not self.training or not self.drop_prob:
            return x
        kept = (self._noise_of(len(x), x.device) >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)
        return x * kept.view(-1, *[1] * (x.ndim - 1))

    def _noise_of(self, num_rows: int, device: torch.device) -> Tensor:
        if self._noise is None:
            return torch.rand(num_rows, device=device)
        repeats, rest = divmod(num_rows, len(self._noise))
        if rest:
            raise ValueError(f"drop path of {num_rows} rows in a step of {len(self._noise)} samples: no multiple")
        return self._noise if repeats == 1 else rng.uniform_of(self._bits, repeats).T.flatten()

    def extra_repr(self) -> str:
        """The rate, in a printed model."""
        return f"drop_prob={self.drop_prob:g}"
