"""What the events of a run are told about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from mim_framework.contract.components import Source
from mim_framework.contract.world import World


class Run(Protocol):
    """A run as its listeners see it; `mim_framework.training.run.Run` holds more."""

    dir: Path
    recipe: Any
    world: World
    device: torch.device
    source: Source
    steps_per_epoch: int
    total_steps: int

    @property
    def epochs(self) -> float:
        """Length of the run in epochs."""

    def epoch(self, index: int) -> float:
        """Fractional epoch at the start of an optimizer step."""

    def due(self, done: int, every_epochs: float | None) -> bool:
        """True after the last step of every so many epochs, `done` steps into the run."""
