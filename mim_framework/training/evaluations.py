"""The evaluations of a run: which are due after a step, and what they measured. Start at `Evaluations.run_due`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from mim_framework.base.errors import DataError
from mim_framework.contract.components import Encoder, Objective, ViewBuilder
from mim_framework.contract.evaluation import Evaluation, Method
from mim_framework.contract.world import World
from mim_framework.evaluate.base import EncoderSubject
from mim_framework.evaluate.measure import Layers, measure
from mim_framework.evaluate.splits import Splits
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

MAX_SHOWN = 8
"""Numbers of an evaluation on a line of the console."""


@dataclass(frozen=True)
class Planned:
    """An evaluation of a recipe, and when it is made."""

    evaluation: Evaluation
    every_epochs: float
    forward_batch_size: int
    layers: Layers = "last"


def planned(recipe: Recipe, registry: Registry) -> list[Planned]:
    """The evaluations of a recipe, built."""
    found = []
    for choice in recipe.evaluate:
        cls, config = registry.resolve("evaluation", choice)
        found.append(Planned(cls(config), choice.every_epochs, choice.forward_batch_size, choice.layers))
    return found


class Evaluations:
    """What a run measures on the way. Evaluations that are due together share the features of one pass.

    Args:
        encoder: what is judged; None if the objective has none, so that nothing is measured.
        precision: entered around forward passes, for autocast and to gather sharded weights.
        objective: what trains the encoder, which may classify images itself.
        method: after so many steps, the method by which the encoder is trained.
    """

    def __init__(
        self,
        plan: list[Planned],
        encoder: Encoder | None,
        views: ViewBuilder,
        splits: Splits,
        *,
        device: torch.device,
        world: World = World(),
        workers: int = 0,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
        objective: Objective | None = None,
        method: Callable[[int], Method | None] = lambda done: None,
    ) -> None:
        self.plan, self.encoder, self.views, self.splits = plan, encoder, views, splits
        self.device, self.world, self.workers, self.precision = device, world, workers, precision
        self.objective, self.method = objective, method
        self._left_out: set[str] = set()

    def run_due(
        self,
        done: int,
        due: Callable[[float], bool],
        *,
        log: Callable[[int, dict[str, float]], None],
        note: Callable[[str], None],
    ) -> dict[str, float]:
        """After a step, of `done` finished ones: the numbers that were measured and logged, by name.

        Every rank calls it, as a sharded encoder needs all of them.

        Args:
            due: whether what happens every so many epochs happens now.
            log: told the numbers of each evaluation, under names that begin with its own.
            note: told one line for a person.
        """
        now = [each for each in self.plan if due(each.every_epochs) and self._possible(each.evaluation, note)]
        if self.encoder is None or not now:
            return {}
        found: dict[str, float] = {}
        subject = self.subject(done, min(each.forward_batch_size for each in now))
        for each in now:
            name = each.evaluation.name
            try:
                numbers = measure(each.evaluation, subject, each.layers).numbers
            except DataError as error:  # the images of an evaluation are not worth a run
                note(f"step {done}: no {name}: {error}")
                continue
            named = {f"{name}_{key}": value for key, value in numbers.items()}
            log(done, named)
            found |= named
            note(f"step {done}: {name} {in_short(numbers)}")
        return found

    def subject(self, done: int, batch_size: int) -> EncoderSubject:
        """What evaluations are given, `done` steps into the run.

        Raises:
            ValueError: if the objective has no encoder.
        """
        if self.encoder is None:
            raise ValueError("the objective has no part `encoder`")
        return EncoderSubject(
            self.encoder, self.views, self.splits, device=self.device, world=self.world, workers=self.workers,
            batch_size=batch_size, precision=self.precision, objective=self.objective,
            method=self.method(done),
        )  # fmt: skip

    def _possible(self, evaluation: Evaluation, note: Callable[[str], None]) -> bool:
        """Whether there is what an evaluation needs; what is missing is told once."""
        lacking = "the objective has no part `encoder`" if self.encoder is None else self.splits.lacks(evaluation)
        if lacking and evaluation.name not in self._left_out:
            self._left_out.add(evaluation.name)
            note(f"evaluation '{evaluation.name}' is left out: {lacking}")
        return not lacking


def in_short(numbers: dict[str, float]) -> str:
    """Numbers for one line on the console; of many the first ones, and where the others are."""
    shown = [f"{key} {value:.4g}" for key, value in list(numbers.items())[:MAX_SHOWN]]
    more = len(numbers) - len(shown)
    return ", ".join(shown) + (f" and {more} more in metrics.jsonl" if more else "")
