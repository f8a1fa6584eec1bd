"""Logistic regression with an L2 penalty, in float64. Start at `fit`; `choose_and_fit` chooses the penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

MAX_ITERATIONS = 1000
"""Of L-BFGS, as in DINOv2's `log_regression.py`."""
TOLERANCE, TOLERANCE_OF_CHOICE = 1e-7, 1e-5
"""L-BFGS ends where no part of the gradient of the mean loss is larger: at the end, and while a penalty is chosen."""
C_GRID = tuple(10.0 ** (-6 + 11 * step / 44) for step in range(45))
"""The 45 values that DINOv2 tries: evenly spaced in their logarithm from 1e-6 to 1e5."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """Linear scores of classes: `weight` (C, D) and `bias` (C,), float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x (m, D) -> scores (m, C), on the device of `x`."""
        return linear(x.to(self.weight), self.weight, self.bias).to(x.device)


def fit(
    x: Tensor, y: Tensor, *, c: float, num_classes: int, start: Classifier | None = None, tolerance: float = TOLERANCE
) -> Classifier:
    """x (n, D), y (n,) -> the minimum of c * (sum of cross-entropies) + |weight|^2 / 2; the bias is free.

    Args:
        start: where the search begins; it changes how long it takes, and hardly where it ends.
    """
    x = x.detach().to(_float64_device(x.device), torch.float64)
    y = y.to(x.device)
    size = num_classes, x.shape[1]
    weight = (torch.zeros(size) if start is None else start.weight).to(x).clone().requires_grad_()
    bias = (torch.zeros(num_classes) if start is None else start.bias).to(x).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, max_eval=2 * MAX_ITERATIONS, history_size=10,
        tolerance_grad=tolerance, tolerance_change=1e-14, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(linear(x, weight, bias), y) + weight.square().sum() / (2 * c * len(x))
        value.backward()
        return value

    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        optimizer.step(loss)
    return Classifier(weight.detach(), bias.detach())


def choose_and_fit(
    x: Tensor, y: Tensor, *, held_out: Tensor, num_classes: int, grid: Sequence[float] = C_GRID
) -> tuple[Classifier, float]:
    """x (n, D), y (n,) -> a classifier of all rows, and its c: that of `grid` which is right most often on `held_out`.

    Of several that are, the smallest. One fit starts where that of the next smaller c ended.

    Args:
        held_out: (n,) bool, True for rows that the choice is made on, and that what is chosen from has not seen.
    """
    x, basis = in_its_rank(x)
    learn_x, learn_y, choose_x, choose_y = x[~held_out], y[~held_out], x[held_out], y[held_out]
    best, best_right, current = grid[0], -1, None
    for c in sorted(grid):
        current = fit(learn_x, learn_y, c=c, num_classes=num_classes, start=current, tolerance=TOLERANCE_OF_CHOICE)
        right = int((current(choose_x).argmax(1) == choose_y).sum())
        if right > best_right:
            best, best_right = c, right
    found = fit(x, y, c=best, num_classes=num_classes)
    return Classifier(found.weight @ basis.t(), found.bias), best


def in_its_rank(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, D) -> coordinates (n, r) and an orthonormal basis (D, r) of what its r independent rows span, in float64.

    The best weights lie there, since anything beside it adds to the penalty alone; images that were made larger, or are
    fewer than their pixels, have far fewer such directions than columns. What is below the rounding of `x` is none.
    """
    rounding = torch.finfo(x.dtype).eps
    x = x.detach().to(_float64_device(x.device), torch.float64)
    _, values, basis = torch.linalg.svd(x, full_matrices=False)
    rank = max(1, int((values > values[0] * rounding).sum()))
    basis = basis[:rank].t()
    return x @ basis, basis


def _float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU where the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
