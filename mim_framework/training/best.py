"""The best evaluation of a run: which step it was, and that its checkpoint stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mim_framework.base.files import replace_file
from mim_framework.checkpoints.checkpoint import BEST


class Best:
    """The highest value of one number of the evaluations, and the step of it; nothing without `metric`.

    Every rank keeps it. A checkpoint holds what was known when it was written, itself included.
    """

    def __init__(self, metric: str | None, directory: Path, state: dict[str, Any] | None = None) -> None:
        self.metric, self.directory = metric, directory
        same = state is not None and state.get("metric") == metric
        self.state: dict[str, Any] | None = state if same else None

    def take(self, done: int, numbers: dict[str, float]) -> bool:
        """Whether the numbers measured after `done` steps are the best so far."""
        if self.metric is None or self.metric not in numbers:
            return False
        value = float(numbers[self.metric])
        if self.state is not None and not value > self.state["value"]:
            return False
        self.state = {"metric": self.metric, "value": value, "step": done}
        return True

    def write(self) -> None:
        """`best.json` of the run, for people and scripts; on rank 0."""
        if self.state is not None:
            name = f"checkpoints/step_{self.state['step']:08d}"
            content = {**self.state, "checkpoint": name}
            replace_file(self.directory / BEST, (json.dumps(content, indent=1) + "\n").encode())
