"""Whether a step has changed anything yet that a checkpoint holds; if not, it can still be given up."""

from __future__ import annotations

from torch import nn


class Untouched:
    """Watches the checkpointed buffers of an objective during a step; its weights change only at the end of one."""

    def __init__(self, objective: nn.Module) -> None:
        persistent = objective.state_dict().keys()
        self._places = [
            (module, name)
            for path, module in objective.named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if f"{path}.{name}".lstrip(".") in persistent
        ]
        self._marks: list[tuple[int, int]] | None = None

    def begin(self) -> None:
        """A step begins."""
        self._marks = self._now()

    def forget(self) -> None:
        """From here on the step changes weights."""
        self._marks = None

    @property
    def yet(self) -> bool:
        """Whether the state is still that before the step."""
        return self._marks is not None and self._marks == self._now()

    def _now(self) -> list[tuple[int, int]]:
        """Which tensors the buffers are, and how often they were written."""
        buffers = [getattr(module, name) for module, name in self._places]
        return [(id(buffer), buffer._version) for buffer in buffers if buffer is not None]
