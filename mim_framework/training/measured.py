"""What a step measures: losses and measures of its micro-batches, reduced over them and over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_framework.contract.records import Outcome, common_count
from mim_framework.contract.world import World
from mim_framework.data.loader import Batch


@dataclass(frozen=True)
class Summary:
    """A step or one of its phases, over micro-batches and ranks.

    `stop`: a rank was told to. `unread`: a rank could not read its images, so that the step does not count.
    """

    losses: dict[str, float]
    metrics: dict[str, float]
    grad_norms: dict[str, float]
    stop: bool
    unread: bool = False

    @property
    def finite(self) -> bool:
        """Whether the step counts: a loss or gradient that is not finite forbids it, a measure does not."""
        return all(math.isfinite(value) for value in (*self.losses.values(), *self.grad_norms.values()))

    @property
    def nonfinite_losses(self) -> list[str]:
        """The losses, "loss" for their sum, that are not finite."""
        return [name for name, value in self.losses.items() if not math.isfinite(value)]

    def named(self) -> dict[str, float]:
        """Everything by name."""
        return {**self.losses, **self.grad_norms, **self.metrics}

    @classmethod
    def of_phases(cls, phases: Mapping[str, Summary]) -> Summary:
        """That of a whole step; of several phases, names begin with that of the phase."""
        if len(phases) == 1:
            return next(iter(phases.values()))
        merged = [
            {f"{phase}/{name}": value for phase, each in phases.items() for name, value in getattr(each, kind).items()}
            for kind in ("losses", "metrics", "grad_norms")
        ]
        return cls(*merged, stop=any(each.stop for each in phases.values()))


class History:
    """The micro-batches of one phase of a step on this rank.

    Args:
        accum_steps: how many there will be.
        over_positions: divide once, by what all micro-batches and ranks count, instead of by the mean of their means.
    """

    def __init__(self, accum_steps: int, *, over_positions: bool = False) -> None:
        self.accum_steps, self.over_positions = accum_steps, over_positions
        self.positions: list[Tensor] = []
        self.values: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, Tensor]] = []
        self.counts: list[Tensor] = []

    def add(self, batch: Batch, outcome: Outcome) -> Tensor:
        """Keeps what was measured; returns what to go backward from."""
        loss = sum(outcome.losses.values())
        parts = {f"loss/{name}": part.detach() for name, part in outcome.losses.items()}
        self.values.append({"loss": loss.detach(), **parts})
        self.metrics.append({name: value.detach() for name, value in outcome.metrics.items()})
        self.positions.append(batch.positions)
        if not self.over_positions:
            return loss / self.accum_steps
        count = common_count(outcome)
        if not isinstance(count, Tensor):
            count = torch.full((), float(count), device=loss.device)  # a copy of a number would wait for the device
        self.counts.append(count.to(loss.device, torch.float32))
        return loss * count / len(batch.positions)  # of a size that accumulates well; `divide` takes it back

    @torch.no_grad()
    def divide(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        """Divide the gradients by what was counted, where the recipe says so. Ranks have been averaged before."""
        if self.over_positions:
            factor = world.size * len(self.positions[0]) / world.sum(torch.stack(self.counts).sum())
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def reduce(self, world: World, grad_norms: Mapping[str, Tensor], told: Tensor, *, unread: bool = False) -> Summary:
        """Means over micro-batches and ranks, and whether any rank was `told` to stop or has images `unread`.

        The one wait for the device.
        """
        weights = torch.stack(self.counts) if self.over_positions else None
        losses, metrics = (averaged(entries, weights) for entries in (self.values, self.metrics))
        single = len(grad_norms) == 1
        norms = {"grad_norm" if single else f"grad_norm/{name}": norm.float() for name, norm in grad_norms.items()}
        total = told.new_ones(()) if weights is None else weights.sum()
        columns = [*losses.values(), *metrics.values(), total, *norms.values(), told.new_full((), float(unread)), told]
        means = world.mean(torch.stack(columns)).tolist()
        num_averaged = len(losses) + len(metrics)
        divisor = means[num_averaged] or math.nan  # no position of the whole step was predicted: it does not count
        shares = iter(value / divisor for value in means)
        return Summary(
            losses={name: next(shares) for name in losses},
            metrics={name: next(shares) for name in metrics},
            grad_norms=dict(zip(norms, means[num_averaged + 1 : -2], strict=True)),
            stop=means[-1] > 0,
            unread=means[-2] > 0,
        )


def averaged(entries: list[dict[str, Tensor]], weights: Tensor | None) -> dict[str, Tensor]:
    """Of every name the mean over micro-batches, or their sum by weights (micro-batches,), still to be divided."""
    columns = {name: torch.stack([entry[name].float() for entry in entries]) for name in entries[0]}
    return {name: column.mean() if weights is None else (column * weights).sum() for name, column in columns.items()}
