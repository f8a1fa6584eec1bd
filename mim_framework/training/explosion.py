"""A loss that explodes without ceasing to be a number: seen in the losses of the last steps. Start at `Watch.step`.

A step is *suspicious* if one of its losses stands far above those of the window before: over their median by 10 robust
standard deviations (1.4826 x the median distance from the median) and by 2 times their median size. While steps are
suspicious the window stands still, so that a rise does not become its own measure. It is an *explosion* once 8 steps in
a row, or 2 at the end of the run, are over the limit: the median by 20 standard deviations and by 10 times the median
size, or 100 times the first loss of the run (of a size of at least 0.01), which sees what begins before there is a
window. Where a loss may rise by rights, in a warm-up, with a copied teacher, with several phases, or where a schedule
stands in a loss, a head, the masker or the objective, both factors are 1,000. A level that holds for 500 steps without
reaching the limit becomes the new one.
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
IN_A_ROW = 8
"""Steps over the limit that are an explosion."""
AT_THE_END = 2
"""Steps over the limit that are an explosion where the run ends."""
PATIENCE = 500
"""Suspicious steps after which a level is taken for the new one."""
SMALLEST_FIRST = 0.01
"""A first loss is taken to be at least of this size, as one that changes sign may begin near zero."""
DEVIATION = 1.4826
"""Standard deviations of a normal distribution in its median distance from the median."""


@dataclass(frozen=True)
class Limits:
    """Factors above which a loss explodes: of the window's median size, and of the first loss."""

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
    """What one loss has been like: the first one, those of the window, and how long it has been rising."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        known = state or {}
        self.first: float | None = known.get("first")
        self.window: deque[float] = deque(known.get("window", ()), maxlen=WINDOW)
        self.suspicious = int(known.get("suspicious", 0))
        self.over = int(known.get("over", 0))

    def state(self) -> dict[str, Any]:
        """What a resumed run must remember."""
        found = {"first": self.first, "window": list(self.window)}
        return {**found, "suspicious": self.suspicious, "over": self.over}

    def see(self, loss: float, limits: Limits) -> None:
        """Take in the loss of a step."""
        if self.first is None:
            self.first = loss
        far, exploded = self._judge(loss, limits)
        self.over = self.over + 1 if exploded else 0
        self.suspicious = self.suspicious + 1 if far or exploded else 0
        if self.suspicious > PATIENCE:
            self._begin_window()
        if not self.suspicious:
            self.window.append(loss)

    def accept(self) -> None:
        """Take what comes for the new level, also against the first loss."""
        self.first = None
        self._begin_window()

    def _begin_window(self) -> None:
        self.window.clear()
        self.suspicious = self.over = 0

    def before(self) -> float:
        """Where the loss stood."""
        assert self.first is not None
        return median(self.window) if len(self.window) >= LEAST else self.first

    def _judge(self, loss: float, limits: Limits) -> tuple[bool, bool]:
        """Whether a loss is suspicious, and whether it is over the limit."""
        assert self.first is not None
        exploded = loss > limits.of_first * max(abs(self.first), SMALLEST_FIRST)
        if len(self.window) < LEAST:
            return exploded, exploded
        middle = median(self.window)
        deviation = DEVIATION * median(abs(each - middle) for each in self.window)
        size = max(median(map(abs, self.window)), 1e-3 * max(abs(self.first), SMALLEST_FIRST))
        above = loss - middle
        far = above > max(10 * deviation, 2 * size)
        return far, exploded or above > max(20 * deviation, limits.of_window * size)


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
        needed = AT_THE_END if last else IN_A_ROW
        for name, loss in losses.items():
            phase, _, kind = name.rpartition("/")
            if kind != "loss" or phase in self.maximized:  # parts of a loss, or one that is meant to rise
                continue
            level = self.levels.setdefault(name, Level())
            level.see(loss, limits)
            if level.over >= needed:
                return Rise(name, index - level.suspicious + 1, index, level.before(), loss)
        return None

    @property
    def rising(self) -> int:
        """Steps in a row that have been suspicious up to now."""
        return max((level.suspicious for level in self.levels.values()), default=0)

    def accept(self) -> None:
        """Take what comes for the new level of every loss."""
        for level in self.levels.values():
            level.accept()


def _holds_a_curve(value: Any) -> bool:
    """Whether a schedule that changes stands anywhere in the options."""
    if isinstance(value, Mapping):
        return {"shape", "from"} <= value.keys() or any(map(_holds_a_curve, value.values()))
    return isinstance(value, Curve) or (isinstance(value, list | tuple) and any(map(_holds_a_curve, value)))
