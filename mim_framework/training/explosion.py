"""A loss that explodes without ceasing to be a number: seen in the losses of the last steps. Start at `Watch.step`.

A step is *suspicious* if one of its losses stands far above those of the window before: over their median by 10 robust
standard deviations (1.4826 x the median distance from the median) and by 2 times their median size. With it a *rise*
begins, which ends after 16 steps in a row that are not suspicious: what has exploded comes back for single steps. While
a loss rises the window stands still, so that a rise does not become its own measure. It is an *explosion* once 8 of the
last 16 steps, or the last 2 of the run, are over the limit: the median by 20 standard deviations and by 10 times the
median size, or 100 times the first losses of the run (of a size of at least 0.01), which sees what begins before there
is a window and what creeps. Where a loss may rise by rights, in a warm-up, with a copied teacher, with several phases,
or where a schedule stands in a loss, a head, the masker or the objective, both factors are 1,000. A rise that has
lasted 500 steps without becoming an explosion is the new level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from mim_framework.base.schedule import Curve
from mim_framework.recipe.recipe import Recipe

WINDOW = 256
"""Losses that a new one is compared with."""
LEAST = 16
"""Losses that a window needs before anything is compared with it."""
SPAN = 16
"""Steps in which an explosion is looked for, and steps without suspicion after which a rise has ended."""
ENOUGH = 8
"""Steps over the limit, of the last `SPAN`, that are an explosion."""
AT_THE_END = 2
"""Steps over the limit that are an explosion where the run ends."""
PATIENCE = 500
"""Steps of a rise after which its level is taken for the new one."""
SMALLEST_FIRST = 0.01
"""First losses are taken to be at least of this size."""
DEVIATION = 1.4826
"""Standard deviations of a normal distribution in its median distance from the median."""


@dataclass(frozen=True)
class Limits:
    """Factors above which a loss explodes: of the window's median size, and of the first losses."""

    of_window: float
    of_first: float


FIXED = Limits(10.0, 100.0)
"""Where what is predicted stays what it is."""
MOVING = Limits(1000.0, 1000.0)
"""Where a loss may rise by rights."""


@dataclass(frozen=True)
class Rise:
    """An explosion: the loss `name` rose from `before` to `now` in the steps from `since` to `until`, from 0."""

    name: str
    since: int
    until: int
    before: float
    now: float

    def __str__(self) -> str:
        steps = f"steps {self.since} to {self.until}"
        return f"the loss ({self.name}) rose from {self.before:.4g} to {self.now:.4g} in {steps} and stayed finite"


class Level:
    """What one loss has been like: the first ones, those of the window, and how long it has been rising."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        known = state or {}
        self.first: list[float] = list(known.get("first_losses", ()))
        self.window: deque[float] = deque(known.get("window", ()), maxlen=WINDOW)
        self.rising = int(known.get("rising", 0))
        self.calm = int(known.get("calm", 0))
        self.over_limit: deque[bool] = deque(known.get("over_limit", ()), maxlen=SPAN)

    def state(self) -> dict[str, Any]:
        """What a resumed run must remember."""
        found = {"first_losses": self.first, "window": list(self.window), "rising": self.rising, "calm": self.calm}
        return {**found, "over_limit": list(self.over_limit)}

    def see(self, loss: float, limits: Limits) -> None:
        """Take in the loss of a step."""
        if not self.first:
            self.first.append(loss)
        suspicious, over = self._judge(loss, limits)
        self.over_limit.append(over)
        self.calm = 0 if suspicious else self.calm + 1
        self.rising = self.rising + 1 if suspicious or self.rising else 0
        if self.calm >= SPAN:
            self.rising = 0
        if self.rising > PATIENCE:
            self._begin_window()
        if not self.rising:
            self.window.append(loss)
            if len(self.first) < min(LEAST, len(self.window)):
                self.first.append(loss)

    def exploded(self, *, last: bool) -> bool:
        """Whether it has, at the last step of a run or at another one."""
        at_the_end = list(self.over_limit)[-AT_THE_END:]
        return sum(self.over_limit) >= ENOUGH or (last and sum(at_the_end) == AT_THE_END)

    def accept(self) -> None:
        """Take what comes for the new level, also against the first losses."""
        self.first.clear()
        self._begin_window()

    def _begin_window(self) -> None:
        self.window.clear()
        self.over_limit.clear()
        self.rising = 0

    def before(self) -> float:
        """Where the loss stood."""
        return median(self.window) if len(self.window) >= LEAST else self.first[0]

    def _judge(self, loss: float, limits: Limits) -> tuple[bool, bool]:
        """Whether a loss is suspicious, and whether it is over the limit."""
        first = self._size_at_first()
        over = loss > limits.of_first * first
        if len(self.window) < LEAST:
            return over, over
        middle = median(self.window)
        deviation = DEVIATION * median(abs(each - middle) for each in self.window)
        size = max(median(map(abs, self.window)), 1e-3 * first)
        above = loss - middle
        far = above > max(10 * deviation, 2 * size)
        over = over or above > max(20 * deviation, limits.of_window * size)
        return over or far, over

    def _size_at_first(self) -> float:
        """That of the first loss, or of those after it, as one that changes sign may begin near zero."""
        first = max(abs(self.first[0]), SMALLEST_FIRST)
        return first if len(self.first) < LEAST else max(first, median(map(abs, self.first)))


class Watch:
    """Looks at the losses of every step; the same on every rank, as losses are means over them.

    Args:
        state: that of a checkpoint.
    """

    def __init__(self, recipe: Recipe, state: Mapping[str, Any] | None = None) -> None:
        self.maximized = {phase.name for phase in recipe.phases if phase.sign < 0}
        self.warmup_epochs = max(section.warmup_epochs for section in recipe.named_optimizers().values())
        self.moving = (
            len(recipe.phases) > 1
            or any(teacher.copy_of for teacher in recipe.named_teachers().values())
            or _holds_a_curve(recipe.model_dump(include={"heads", "target", "loss", "masker", "objective"}))
        )
        self.levels = {name: Level(each) for name, each in (state or {}).items()}

    def state(self) -> dict[str, Any]:
        """What a resumed run must remember."""
        return {name: level.state() for name, level in self.levels.items()}

    def step(self, index: int, losses: Mapping[str, float], *, epoch: float, last: bool = False) -> Rise | None:
        """Take in the finite losses of a step; the explosion, if there is one."""
        limits = MOVING if self.moving or epoch < self.warmup_epochs else FIXED
        for name, loss in losses.items():
            phase, _, kind = name.rpartition("/")
            if kind != "loss" or phase in self.maximized:  # parts of a loss, or one that is meant to rise
                continue
            level = self.levels.setdefault(name, Level())
            level.see(loss, limits)
            if level.exploded(last=last):
                return Rise(name, index - level.rising + 1, index, level.before(), loss)
        return None

    @property
    def rising(self) -> int:
        """Steps for which a loss has been rising up to now."""
        return max((level.rising for level in self.levels.values()), default=0)

    def accept(self) -> None:
        """Take what comes for the new level of every loss."""
        for level in self.levels.values():
            level.accept()


def _holds_a_curve(value: Any) -> bool:
    """Whether a schedule that changes stands anywhere in the options."""
    if isinstance(value, Mapping):
        return {"shape", "from"} <= value.keys() or any(map(_holds_a_curve, value.values()))
    return isinstance(value, Curve) or (isinstance(value, list | tuple) and any(map(_holds_a_curve, value)))
