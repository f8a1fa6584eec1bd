"""The forward of a step, in one place: trainer, preflight, cost, bench, tokenize, replay and contract tests call it.

Start at `StepEngine.forward`: it is what happens to a batch between the loader and the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mim_framework.base.precision import autocast
from mim_framework.contract.components import Encoder, Objective
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent, Outcome, Views
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.runtime.drop_paths import DropPaths
from mim_framework.runtime.sharding import whole_weights
from mim_framework.runtime.teachers import Teachers


class StepEngine:
    """Views, objective and teachers as one callable, in the precision of the run.

    Args:
        prepare: from a batch on the device to what the components see, as `ViewBuilder.prepare`.
        model: the objective as it is wrapped for several ranks; itself by default.
        bfloat16: forward passes run under bfloat16 autocast.
    """

    def __init__(
        self,
        objective: Objective,
        prepare: Callable[[Step, dict[str, Tensor]], Views],
        teachers: Teachers,
        device: torch.device,
        *,
        bfloat16: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.objective, self.prepare, self.teachers, self.device = objective, prepare, teachers, device
        self.bfloat16 = bfloat16
        self.model = objective if model is None else model
        self.components = list(objective.components())
        self.drop_paths = DropPaths(objective)

    def step(self, *, seed: int, positions: Tensor, world: World = World(), **where: Any) -> Step:
        """A step with this engine's teachers and encoder; `where` it stands is the first one of one by default."""
        place: dict[str, Any] = {"index": 0, "total": 1, "epoch": 0.0, "epochs": 1.0, **where}
        passes = {"teachers": self.teachers.session(bfloat16=self.bfloat16)}
        if self.objective.encoder is not None:
            passes["current"] = CurrentEncoder(self.objective.encoder, self.bfloat16)
        return Step(positions=positions, seed=seed, world=world, **{**passes, **place})

    def forward(self, step: Step, batch: dict[str, Tensor]) -> Outcome:
        """The losses and measures of a batch before `prepare`, on the device."""
        views = self.begin(step, batch)
        with self.autocast(), self.drop_paths.drawn(step):
            return Outcome.of(self.model(step, views))

    def begin(self, step: Step, batch: dict[str, Tensor]) -> Views:
        """What the components see, after each was told that the step begins."""
        views = self.prepare(step, batch)
        for component in self.components:
            component.begin_step(step)
        return views

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the run, for passes beside a step such as evaluations."""
        return autocast(self.device.type, self.bfloat16)

    def begins_from_data(self) -> bool:
        """Whether a component overrides `calibrate`."""
        return any(component.calibrates for component in self.components)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Step, dict[str, Tensor]]]) -> None:
        """Let components begin from the data of the first step."""
        prepared = [(step, self.prepare(step, batch)) for step, batch in batches]
        with self.autocast(), whole_weights(self.objective):
            for component in self.components:
                component.calibrate(prepared)

    def before_step(self, step: Step) -> None:
        """After the last backward and before the optimizers."""
        for component in self.components:
            component.before_step(step)

    def after_step(self, step: Step) -> None:
        """After a step that was made."""
        for component in self.components:
            component.after_step(step)


@dataclass
class CurrentEncoder:
    """Passes of the encoder that is being trained, without gradients, in the precision and mode of the run."""

    encoder: Encoder
    bfloat16: bool
    _passes: dict[tuple[Any, ...], tuple[Any, Latent]] = field(default_factory=dict)

    @torch.no_grad()
    def encode(self, views: Views, masks: dict[str, Mask], ask: Ask = Ask()) -> Latent:
        """The pass over views under masks; computed once for the same objects, however many ask for it."""
        objects = (*(views[name] for name in masks), *masks.values())
        key = (*map(id, objects), ask)
        if key not in self._passes:  # the key's objects are kept with the pass, so that no id can be used again
            self._passes[key] = (objects, self._encode(views, masks, ask))
        return self._passes[key][1]

    def _encode(self, views: Views, masks: dict[str, Mask], ask: Ask) -> Latent:
        device_type = next(iter(masks.values())).hidden.device.type
        with autocast(device_type, self.bfloat16):  # also inside a target's precision island
            return self.encoder.encode(views, masks, ask)
