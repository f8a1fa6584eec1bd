"""LARS as the official linear probes of MoCo v3 and MAE have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step of every tensor is as long as its norm says (You et al. 2017; MAE, `util/lars.py`).

    Weight decay, added to the gradient, and the trust ratio are for tensors of more than one dimension only: a bias
    moves by its plain gradient. The learning rate is not folded into the momentum: p -= lr * m, m = momentum * m + d.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        """`trust_coefficient`: share of the norm of a tensor that a step of rate 1 has."""
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step; nothing waits for the device.

        Raises:
            ValueError: if there is a closure, which it does not evaluate.
        """
        if closure is not None:
            raise ValueError("LARS takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    update = update * trust_ratio(parameter, update, group["trust_coefficient"])
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.add_(momentum, alpha=-group["lr"])


def trust_ratio(parameter: Tensor, update: Tensor, coefficient: float) -> Tensor:
    """coefficient * |parameter| / |update|, 1 where one of the two norms is 0; a 0-dim tensor."""
    size, length = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
    both = (size > 0) & (length > 0)
    return torch.where(both, coefficient * size / torch.where(both, length, 1.0), 1.0)
