"""Schedules: numbers that change during a run, as pure functions of the step.

A schedule stands anywhere in a recipe where a component's config says `Schedule`: `0.75`, or
`{shape: cosine, from: 0.996, to: 1.0}`. The learning rate is such a schedule with a warm-up.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mim_framework.base.section import AliasedSection


class Curve(AliasedSection):
    """A value that moves from `from` to `to` over the run, after an optional linear warm-up."""

    shape: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """Form of the way from `from` to `to`: half a cosine, a line, none (stays at `from`), or jumps at `milestones`."""
    start: float = Field(alias="from")
    """Value after the warm-up."""
    end: float | None = Field(None, alias="to")
    """Value at the end of the run; not for `constant` and `step`."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs of linear warm-up from `warmup_from` to `from`."""
    warmup_from: float = 0.0
    """Value at step 0 when there is a warm-up."""
    milestones: tuple[float, ...] = ()
    """Epochs at which a `step` schedule multiplies its value by `gamma`."""
    gamma: float = 0.1
    """Factor at each milestone."""
    counted_from: Literal["warmup_end", "run_start"] = "warmup_end"
    """Where a cosine or line begins. From `run_start` the warm-up hides its first part, and the value jumps down when
    the warm-up ends (timm's cosine schedule, SimMIM)."""
    warmup_inclusive: bool = False
    """The last step of the warm-up already has the full value, and so has the next one (mmengine, BEiT)."""
    lag_steps: float = Field(0.0, ge=0)
    """Steps by which the value trails. 1 where the official loop sets it after a step from that step's own number, so
    that the first two steps share a value (SimMIM)."""
    per_epoch: bool = False
    """The value at the start of an epoch is that of all its steps (linear probes of DINO and BEiT)."""

    @model_validator(mode="after")
    def _complete(self) -> Curve:
        if self.shape in ("cosine", "linear") and self.end is None:
            raise ValueError(f"a {self.shape} schedule needs 'to', the value at the end of the run")
        if self.shape in ("constant", "step") and self.end is not None:
            raise ValueError(f"a {self.shape} schedule takes no 'to'; use shape cosine or linear to move there")
        return self


Schedule = Annotated[float | Curve, Field(union_mode="smart")]
"""A plain number or a curve."""


def extremes(schedule: Curve | float) -> tuple[float, ...]:
    """Values between which a schedule stays, its turning points."""
    if not isinstance(schedule, Curve):
        return (schedule,)
    last = schedule.start * schedule.gamma ** len(schedule.milestones) if schedule.shape == "step" else schedule.start
    found = (schedule.start, last if schedule.end is None else schedule.end)
    return (schedule.warmup_from, *found) if schedule.warmup_epochs else found


def epoch_of(index: float, steps_per_epoch: int) -> float:
    """Fractional epoch at the start of a step, rounded as in MAE's `engine_pretrain.py`."""
    return (index % steps_per_epoch) / steps_per_epoch + index // steps_per_epoch


def value_at(schedule: Curve | float, epoch: float, epochs: float, steps_per_epoch: int | None = None) -> float:
    """The value at fractional `epoch` of a run of `epochs`.

    The arithmetic, down to its order, is that of MAE's `util/lr_sched.py`: a linear warm-up, then half a cosine.

    Args:
        steps_per_epoch: without it `lag_steps` and `warmup_inclusive`, which count steps, have no effect.
    """
    if not isinstance(schedule, Curve):
        return float(schedule)
    if schedule.lag_steps and steps_per_epoch:
        index = round(epoch * steps_per_epoch, 6)
        epoch = epoch_of(max(0.0, index - schedule.lag_steps), steps_per_epoch)
    if schedule.per_epoch:
        epoch = math.floor(epoch)
    warmup = schedule.warmup_epochs
    if epoch < warmup:
        last = warmup - 1 / steps_per_epoch if schedule.warmup_inclusive and steps_per_epoch else warmup
        if epoch >= last:
            return schedule.start
        return schedule.warmup_from + (schedule.start - schedule.warmup_from) * epoch / last
    if schedule.shape == "constant":
        return schedule.start
    if schedule.shape == "step":
        return schedule.start * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    assert schedule.end is not None
    begin = warmup if schedule.counted_from == "warmup_end" else 0.0
    span = epochs - begin
    elapsed = min(epoch - begin, span)
    if schedule.shape == "linear":
        return schedule.start + (schedule.end - schedule.start) * (elapsed / span if span else 1.0)
    half_cosine = 0.5 * (1.0 + math.cos(math.pi * elapsed / span)) if span else 0.0
    return schedule.end + (schedule.start - schedule.end) * half_cosine
