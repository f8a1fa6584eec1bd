"""One training step as the components see it: where the run stands, and all randomness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.schedule import Curve, value_at
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent, Views
from mim_framework.contract.world import World


class TeacherPasses(Protocol):
    """The teachers during one step."""

    def encode(self, name: str, view: Tensor, mask: Mask | None = None) -> Latent:
        """The named teacher's pass over a view of the recipe, computed once however many ask for it."""


class EncoderPasses(Protocol):
    """The encoder that is being trained, during one step, for passes without gradients."""

    def encode(self, views: Views, masks: dict[str, Mask], ask: Ask = Ask()) -> Latent:
        """The pass over some views, computed once for the same views and masks however many ask for it."""


@dataclass(frozen=True, eq=False)
class Step:
    """One training step as the components see it.

    `index` counts optimizer steps from 0, `total` is their planned number, `epoch` the fractional epoch,
    `steps_per_epoch` None outside of a run.
    `positions` (B,): global positions of this micro-batch's samples; everything random is a function of them.
    """

    index: int
    total: int
    epoch: float
    epochs: float
    positions: Tensor
    seed: int
    world: World
    steps_per_epoch: int | None = None
    phase: str = "main"
    teachers: TeacherPasses | None = field(default=None, repr=False)
    current: EncoderPasses | None = field(default=None, repr=False)

    def rand(self, stream: str, n: int) -> Tensor:
        """(B, n) uniform float32 in [0, 1): the same for the same sample position on any rank, worker and device."""
        return rng.uniform(self.seed, stream, self.positions, n)

    def rand_batch(self, stream: str, n: int) -> Tensor:
        """(n,) uniform float32 in [0, 1), one draw for all samples of an optimizer step: on every rank and micro-batch.

        On the CPU, so that a size can be read from it (`int(...)`) without waiting for the device.
        """
        return rng.uniform(self.seed, f"{stream} of a step", torch.tensor([self.index]), n)[0]

    def detached(self, view: Tensor, mask: Mask, ask: Ask = Ask(), name: str = "x") -> Latent:
        """A pass of the encoder that is being trained, without gradients, over another view or mask than its own.

        In the precision and mode of the run, also for a target, whose own arithmetic is full precision (CAE).

        Raises:
            ValueError: if the objective declares no encoder.
        """
        if self.current is None:
            raise ValueError("this step has no encoder: the objective keeps no part as `self.encoder`")
        return self.current.encode({name: view}, {name: mask}, ask)

    def teacher(self, name: str, view: Tensor, mask: Mask | None = None) -> Latent:
        """The named teacher's pass over `view`, computed once per step however many components ask for it.

        It answers the union of what all components declared at build time (`Component.teacher_asks`).
        """
        if self.teachers is None:
            raise ValueError(f"this step has no teachers, '{name}' was asked for")
        return self.teachers.encode(name, view, mask)

    def value(self, schedule: Curve | float) -> float:
        """The value of a schedule (or plain number) at this step."""
        return value_at(schedule, self.epoch, self.epochs, self.steps_per_epoch)
