"""Losses: one number from a prediction and its target, taken where the mask says."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss

from mim_framework.base.section import Section
from mim_framework.contract.components import Loss
from mim_framework.contract.mask import Mask, repeated_rows
from mim_framework.contract.records import Latent, Measured, Pred


def align(pred: Pred, target: Tensor | Pred) -> tuple[Tensor, Tensor]:
    """Prediction and target at the same positions: those that both hold.

    A target that has one row for each sample stands for all of its masks and sets of positions.
    """
    ids = common_ids(pred, target)
    if not isinstance(target, Pred):
        target = Pred(target, pred.grid)
    values = pred.at(ids)
    return values, repeated_rows(target.at(ids), len(values))


def common_ids(pred: Pred, target: Tensor | Pred | Any) -> Tensor | None:
    """The positions that prediction and target both hold; None for all."""
    return pred.ids if pred.ids is not None or not isinstance(target, Pred) else target.ids


def num_predicted(ids: Tensor | None, mask: Mask) -> Tensor | float:
    """What `masked_mean` divides by: positions to predict in the micro-batch, or the sum of their weights."""
    if mask.equal and mask.predict is None:
        return float(len(mask.hidden) * mask.num_hidden)
    weights = mask.where if ids is None else mask.where.gather(1, ids)
    return weights.sum()


def masked_mean(per_position: Tensor, ids: Tensor | None, mask: Mask) -> Tensor:
    """Mean over the positions to predict, 0 if there are none. per_position (B, M) holds `ids` (None = all N)."""
    weights = mask.where
    if ids is not None:
        if mask.equal and mask.predict is None:  # the positions are exactly the hidden ones
            return per_position.mean()
        weights = weights.gather(1, ids)
    weights = weights.to(per_position.dtype)
    return (per_position * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


class PositionLoss(Loss):
    """A loss that is a mean over the predicted positions of the whole micro-batch."""

    def forward(self, pred: Pred, target: Tensor | Pred | Any, mask: Mask, latent: Latent) -> Measured:
        values, wanted = align(pred, target)
        ids = common_ids(pred, target)
        values, mask = values.float(), mask.at(pred.grid)
        metrics = self.measures(values.detach(), wanted, ids, mask)
        loss = masked_mean(self.per_position(values, wanted), ids, mask)
        return Measured(loss, metrics, num_predicted(ids, mask))

    def measures(self, values: Tensor, wanted: Tensor, ids: Tensor | None, mask: Mask) -> dict[str, Tensor]:
        """Scalars worth logging beside the loss; arguments as in `per_position` and `masked_mean`."""
        return {}

    @abstractmethod
    def per_position(self, values: Tensor, wanted: Tensor) -> Tensor:
        """values (B, M, C) float32 -> (B, M)."""


class MSELoss(PositionLoss):
    """Squared error, mean over the values of a position, then over positions (MAE)."""

    name = "mse"

    def per_position(self, values: Tensor, wanted: Tensor) -> Tensor:
        return mse_loss(values, wanted.float(), reduction="none").mean(-1)


class L1Loss(PositionLoss):
    """Absolute error, mean over the values of a position, then over positions."""

    name = "l1"

    def per_position(self, values: Tensor, wanted: Tensor) -> Tensor:
        return (values - wanted.float()).abs().mean(-1)


class CosineLoss(PositionLoss):
    """One minus the cosine of the angle between prediction and target, mean over positions (BEiT v2's tokenizer)."""

    name = "cosine"

    def per_position(self, values: Tensor, wanted: Tensor) -> Tensor:
        return 1 - cosine_similarity(values, wanted.float(), dim=-1, eps=1e-12)


class CrossEntropyLoss(PositionLoss):
    """Cross-entropy of logits against token ids or probabilities (BEiT).

    Metric `accuracy`: share of the predicted positions whose likeliest class is the target's. BEiT's stays near 5 %,
    that is no fault.
    """

    name = "cross_entropy"
    accepts = frozenset({"ids", "probs"})

    class Config(Section):
        label_smoothing: float = Field(0.0, ge=0, lt=1)
        """Share of the probability spread over all classes."""

    config: Config

    def measures(self, values: Tensor, wanted: Tensor, ids: Tensor | None, mask: Mask) -> dict[str, Tensor]:
        likeliest = wanted if wanted.ndim == 2 else wanted.argmax(-1)
        return {"accuracy": masked_mean((values.argmax(-1) == likeliest).float(), ids, mask)}

    def per_position(self, values: Tensor, wanted: Tensor) -> Tensor:
        flat = cross_entropy(  # one long batch is twice as fast as classes along dimension 1
            values.flatten(0, 1), wanted.flatten(0, 1), reduction="none", label_smoothing=self.config.label_smoothing
        )
        return flat.reshape(values.shape[:2])
