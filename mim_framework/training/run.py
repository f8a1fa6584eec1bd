"""A run, as the trainer and those who listen to it see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mim_framework.assembly.builder import Model
from mim_framework.base.schedule import epoch_of
from mim_framework.contract.components import Source
from mim_framework.contract.evaluation import Method
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.data.loader import Batch
from mim_framework.data.order import BatchLayout
from mim_framework.recipe.recipe import Recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.runtime.step import StepEngine


@dataclass
class Run:
    """What the trainer works on and the run hooks are given."""

    dir: Path
    recipe: Recipe
    world: World
    device: torch.device
    model: Model
    source: Source
    layout: BatchLayout
    steps_per_epoch: int
    total_steps: int
    engine: StepEngine

    @property
    def epochs(self) -> float:
        """Length of the run in epochs."""
        return self.recipe.train.epochs or self.total_steps / self.steps_per_epoch

    def epoch(self, index: int) -> float:
        """Fractional epoch at the start of an optimizer step."""
        return epoch_of(index, self.steps_per_epoch)

    def due(self, done: int, every_epochs: float | None) -> bool:
        """True after the last step of every so many epochs, `done` steps into the run."""
        return bool(every_epochs) and done % max(1, round(every_epochs * self.steps_per_epoch)) == 0

    def step(self, index: int, batch: Batch, phase: str) -> Step:
        """A step as the components see it."""
        return self._step_of(index, batch.positions, phase)

    def _step_of(self, index: int, positions: Tensor, phase: str) -> Step:
        """The same with the samples at `positions` (B,)."""
        return self.engine.step(
            index=index,
            total=self.total_steps,
            epoch=self.epoch(index),
            epochs=self.epochs,
            steps_per_epoch=self.steps_per_epoch,
            positions=positions,
            seed=self.recipe.seed,
            world=self.world,
            phase=phase,
        )

    def method(self, done: int) -> Method:
        """What evaluations may ask of the method, `done` steps into the run."""
        index, phase = max(0, done - 1), self.recipe.phase_names()[0]
        return Method(
            self.model.objective,
            step=lambda positions: self._step_of(index, positions, phase),
            begin=self.engine.begin,
            teachers=dict(self.model.teachers.teachers.items()),
            beside=frozenset(companion.spec.name for companion in self.model.companions),
            history=lambda: read_metrics(self.dir),
        )
