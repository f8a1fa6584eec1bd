"""The loss on images kept aside, under fixed masks, beside that of predictors that look at nothing. Start at `of`.

A model that has learned to use what it sees must beat the best constant: the mean patch for pixels, HOG and features,
the unigram for token ids. It should also beat the mean of each position, which knows where it predicts and not what is
around it. Constants are fitted to images of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mim_framework.contract.components import Head, Objective, Target
from mim_framework.contract.evaluation import Method, Split, Subject
from mim_framework.contract.mask import Mask, repeated_rows
from mim_framework.contract.records import Latent, Masked, Measured, Outcome, Pred, Views
from mim_framework.contract.step import Step
from mim_framework.evaluate.health.passes import a_choice, chunks, kept_aside, on_device, summed

FITTED = frozenset({"dense", "ids", "probs"})
"""Kinds of target for which there is a constant prediction."""
AT_ONCE = 64


@dataclass
class Result:
    """Numbers by name, and what is not among them and why."""

    numbers: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def of(subject: Subject, method: Method, count: int) -> Result:
    """`loss`, `trivial_loss`, `position_loss` and `target_spread` or `target_perplexity`; by head if there are several.

    In `frozen`, with the objective in evaluation mode.

    Args:
        count: images that are measured; as many others give the constants.
    """
    objective, result, split = method.objective, Result(), kept_aside(subject)
    places = a_choice(subject.source(split), count)
    if objective.masker is None or not objective.heads:
        return _whole(subject, method, split, places)
    skip = len(places) if split == "train" else 0
    constants = _fitted(subject, method, a_choice(subject.source("train"), count, skip), result)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in objective.heads}
    for images, step, views in _batches(subject, method, split, places):
        masked, targets = _masked(objective, step, views)
        latent = objective.encode(masked)
        if latent is None:
            return _whole(subject, method, split, places)
        for name, head in objective.heads.items():
            if images:
                sums[name] += _measured(head, masked, latent, targets[name], constants.get(name), images)
    for name, total in sums.items():
        suffix = f"/{name}" if len(sums) > 1 else ""
        loss, trivial, by_position, weight = summed(total, subject).tolist()
        if not weight:
            result.left_out["loss"] = "no image kept aside can be read"
            continue
        result.numbers[f"loss{suffix}"] = loss / weight
        if name in constants:
            result.numbers[f"trivial_loss{suffix}"] = trivial / weight
            result.numbers |= {f"{key}{suffix}": value for key, value in constants[name].facts().items()}
            if constants[name].by_position() is not None:
                result.numbers[f"position_loss{suffix}"] = by_position / weight
    return result


def _whole(subject: Subject, method: Method, split: Split, places: list[int]) -> Result:
    """Of an objective with an order of its own: the sum of its losses alone."""
    total = torch.zeros(2, dtype=torch.float64)
    for images, step, views in _batches(subject, method, split, places):
        losses = Outcome.of(method.objective(step, views)).losses
        total += images * torch.tensor([sum(loss.item() for loss in losses.values()), 1.0], dtype=torch.float64)
    loss, weight = summed(total, subject).tolist()
    why = f"objective '{method.objective.name}' has an order of its own"
    result = Result(left_out={"trivial_loss": why})
    if weight:
        result.numbers["loss"] = loss / weight
    else:
        result.left_out["loss"] = "no image kept aside can be read"
    return result


def _batches(subject: Subject, method: Method, split: Split, places: list[int]) -> Iterator[tuple[int, Step, Views]]:
    """(images, step, views): the first fixed view of training of each image, and masks by its place among them."""
    for chunk in chunks(subject, split, places, views=1, at_once=AT_ONCE):
        batch = on_device(chunk.batch, subject)
        rows = len(next(iter(batch.values())))
        step = method.step(chunk.start + torch.arange(rows, device=subject.device))
        yield chunk.images, step, method.begin(step, batch)


def _masked(objective: Objective, step: Step, views: Views) -> tuple[Masked, dict[str, Tensor | Pred]]:
    masked = objective.masker(step, views)
    return masked, {name: head.target(step, masked) for name, head in objective.heads.items()}


def _measured(
    head: Head, masked: Masked, latent: Latent, target: Tensor | Pred, constant: Constant | None, images: int
) -> Tensor:
    """(4,): the loss, that of the constant and of the mean of each position, times the weight, and the weight."""
    measured = head.measure(masked, latent, target)
    weight = float(images if measured.count is None else measured.count)
    mask, own = masked.masks[head.view], latent.of(head.view)
    extra = {"masked": masked} if head.loss.sees_views else {}
    found = [measured.loss.item(), 0.0, 0.0]
    if constant is not None:
        rows = len(mask.at(head.target.spec.grid).where)
        for place, values in enumerate((constant.everywhere(), constant.by_position()), start=1):
            if values is not None:
                pred = Pred(values.to(mask.hidden.device).expand(rows, -1, -1), head.target.spec.grid)
                found[place] = Measured.of(head.loss(pred, target, mask, own, **extra)).loss.item()
    return torch.tensor([*(value * weight for value in found), weight], dtype=torch.float64)


# --- predictors that look at nothing ---------------------------------------------------------------------------------


class Constant:
    """The best constant for a target, fitted to what it was at the predicted positions of some images."""

    def __init__(self, target: Target) -> None:
        spec = target.spec
        self.kind, self.grid, self.dim = spec.kind, spec.grid, spec.dim
        self.num_positions = spec.grid.num_patches
        rows = 1 if self.kind == "ids" else self.num_positions  # a unigram of each position would be mostly holes
        self.sums = torch.zeros(rows, self.dim, dtype=torch.float64)
        self.weights = torch.zeros(rows, 1, dtype=torch.float64)
        self.squares = torch.zeros(1, dtype=torch.float64)

    def add(self, target: Tensor | Pred, mask: Mask) -> None:
        """target (B, N, dim) or (B, N) ids, or at some positions only."""
        pred = target if isinstance(target, Pred) else Pred(target, self.grid)
        where = mask.at(self.grid).where.double().cpu()
        values = repeated_rows(pred.values, len(where)).cpu()
        ids = torch.arange(self.num_positions).expand(len(where), -1) if pred.ids is None else pred.ids.cpu()
        weights = where.gather(1, ids).flatten()
        if self.kind == "ids":
            self.sums[0] += torch.bincount(values.flatten(), weights, self.dim)
            self.weights += weights.sum()
            return
        values = values.double().flatten(0, 1) * weights[:, None]
        self.sums.index_add_(0, ids.flatten(), values)
        self.weights.index_add_(0, ids.flatten(), weights[:, None])
        self.squares += (values.square().mean(1) / weights.clamp(min=1e-300)).sum()

    def reduce(self, subject: Subject) -> None:
        """The sums of all ranks."""
        self.sums, self.weights, self.squares = (
            summed(each, subject) for each in (self.sums, self.weights, self.squares)
        )

    @property
    def mean(self) -> Tensor:
        """(dim,)"""
        return self.sums.sum(0) / self.weights.sum().clamp(min=1e-300)

    def everywhere(self) -> Tensor:
        """(1, N, dim): the same at every position; logits where there are classes."""
        return self._as_pred(self.mean.expand(self.num_positions, -1))

    def by_position(self) -> Tensor | None:
        """(1, N, dim): the mean of each position, that of all where none was seen; None of ids and of one position."""
        if self.kind == "ids" or self.num_positions == 1:
            return None
        seen = self.weights > 0
        return self._as_pred(torch.where(seen, self.sums / self.weights.clamp(min=1e-300), self.mean))

    def _as_pred(self, rows: Tensor) -> Tensor:
        if self.kind != "dense":  # a class that was never seen counts as one position
            rows = ((rows * self.weights.sum() + 1) / (self.weights.sum() + self.dim)).log()
        return rows.float()[None]

    def facts(self) -> dict[str, float]:
        """How much a target varies: 0 where it is one vector always; of classes, how many it seems to have."""
        if self.kind != "dense":
            return {"target_perplexity": torch.special.entr(self.mean).sum().exp().item()}
        mean_square = self.squares.item() / max(self.weights.sum().item(), 1e-300)
        return {"target_spread": 1 - self.mean.square().mean().item() / max(mean_square, 1e-300)}


def _fitted(subject: Subject, method: Method, places: list[int], result: Result) -> dict[str, Constant]:
    """Constants by head, of the heads that have a fixed kind of target."""
    objective = method.objective
    constants: dict[str, Constant] = {}
    for name, head in objective.heads.items():
        if head.target.spec.kind in FITTED and places:
            constants[name] = Constant(head.target)
        else:
            why = "no image is left to fit a constant to" if not places else f"its target is {head.target.spec.kind}"
            result.left_out[f"trivial_loss/{name}"] = why
    for images, step, views in _batches(subject, method, "train", places) if constants else ():
        masked, targets = _masked(objective, step, views)
        for name, constant in constants.items():
            if images:
                constant.add(targets[name], masked.masks[objective.heads[name].view])
    for constant in constants.values():
        constant.reduce(subject)
    return {name: constant for name, constant in constants.items() if constant.weights.sum() > 0}
