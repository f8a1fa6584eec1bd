"""Many linear classifiers trained at once on shared features, each by a rate of its own. Start at `Sweep`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

BETAS, EPS = (0.9, 0.999), 1e-8
"""Of AdamW, torch's own."""


class Sweep:
    """Linear classifiers of one feature: all their scores are one product of matrices.

    Their losses are summed, which is the same as training each by itself. `weight` (H, C, D) and `bias` (H, C).

    Args:
        rates: of the H classifiers, before the schedule.
        optimizer: `sgd` with a momentum of 0.9, or `adamw`.
        weight_decay: of `adamw`; `sgd` has none.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        rates: Sequence[float],
        *,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        weight_decay: float = 0.0,
    ) -> None:
        self.weight, self.bias = weight.clone(), bias.clone()
        self.rates = torch.tensor(rates, dtype=torch.float64)
        self.optimizer, self.weight_decay = optimizer, weight_decay
        self.num_steps = 0
        self._moments = [[torch.zeros_like(each) for each in (self.weight, self.bias)] for _ in range(2)]

    @classmethod
    def begin(
        cls, dim: int, num_classes: int, rates: Sequence[float], *, generator: torch.Generator, device: torch.device
    ) -> Sweep:
        """Weights of standard deviation 0.01 and biases of 0, as officially in DINO, DINOv2 and BEiT."""
        weight = torch.randn(len(rates), num_classes, dim, generator=generator) * 0.01
        return cls(weight.to(device), torch.zeros(len(rates), num_classes, device=device), rates)

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, D) -> scores (H, B, C)."""
        return _scores(x, self.weight, self.bias)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, D), y (B,) -> mean losses (H,), and gradients of `weight` and `bias`."""
        with torch.enable_grad():
            weight, bias = self.weight.requires_grad_(), self.bias.requires_grad_()
            scores = _scores(x, weight, bias)
            losses = cross_entropy(scores.flatten(0, 1), y.repeat(len(scores)), reduction="none")
            losses = losses.unflatten(0, scores.shape[:2]).mean(1)
            of_weight, of_bias = torch.autograd.grad(losses.sum(), [weight, bias])
        self.weight, self.bias = weight.detach(), bias.detach()
        return losses.detach(), of_weight, of_bias

    def step(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """One step on x (B, D), y (B,), with rates times `scale` -> the losses before it, (H,)."""
        losses, *gradients = self.gradients(x, y)
        self.num_steps += 1
        rates = (self.rates * scale).to(self.weight)
        update = self._sgd if self.optimizer == "sgd" else self._adamw
        for parameter, gradient, first, second in zip((self.weight, self.bias), gradients, *self._moments, strict=True):
            update(parameter, gradient, first, second, rates.view(-1, *[1] * (parameter.ndim - 1)))
        return losses

    def _sgd(self, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor) -> None:
        parameter.sub_(rates * first.mul_(0.9).add_(gradient))

    def _adamw(self, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Tensor) -> None:
        parameter.mul_(1 - rates * self.weight_decay)
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        mean, square = (1 - beta**self.num_steps for beta in BETAS)
        parameter.sub_(rates / mean * first / ((second / square).sqrt_().add_(EPS)))


def half_cosine(done: float, total: float) -> float:
    """The factor on a rate after `done` of `total` steps or epochs: from 1 down to 0."""
    return (1 + math.cos(math.pi * done / total)) / 2


def batches(num_rows: int, batch_size: int, num_steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of every step, (batch_size,): a new random order of all rows again and again, without a gap in between."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(num_steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(num_rows, generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        yield rows


def _scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scores = linear(x, weight.flatten(0, 1), bias.flatten())
    return scores.unflatten(1, bias.shape).transpose(0, 1)
