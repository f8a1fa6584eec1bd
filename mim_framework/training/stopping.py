"""Signals that end a run after the step it is in."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mim_framework.contract.world import World
from mim_framework.runtime.launch import STOP_SIGNALS, under_launcher

STDERR = 2
"""The descriptor: a handler may run inside a write to the stream."""


class StepGivenUp(Exception):
    """A step is left before anything of it counts."""


class StopSignal:
    """SIGTERM, SIGUSR1, Ctrl-C: finish the step, save, leave with 128 + signal. A second Ctrl-C leaves at once.

    A rank whose launcher has ended, however it ended, takes it for SIGTERM. `agreed` once any rank was told; all ranks
    then leave after the same step.
    """

    def __init__(self, waits: Callable[[], str] = lambda: "") -> None:
        """`waits` says for what the run waits when a signal comes, and for how long; "" for nothing."""
        self.waits = waits
        self.received = 0
        self.agreed = False
        self.launcher = os.getppid() if under_launcher() else None

    def told(self, device: torch.device) -> Tensor:
        """1 if this rank was told, a 0-dim tensor on the device, for the reduction of the step."""
        if self.launcher is not None and os.getppid() != self.launcher and not self.received:
            self.received = signal.SIGTERM
        return torch.full((), float(self.received > 0), device=device)  # not `tensor`, which waits for the device

    def leave(self) -> None:
        """
        Raises:
            SystemExit: with 128 + signal.
        """
        raise SystemExit(128 + (self.received or signal.SIGTERM))

    @contextmanager
    def watched(self, world: World) -> Iterator[None]:
        """Take the signals inside; afterwards they mean what they did before.

        A thread that is not the main one cannot take signals: what happens to the process is its owner's business then.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.received and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not self.received and (text := self.waits()):
                os.write(STDERR, f"\nmim: {signal.Signals(number).name}: {text}\n".encode())
            self.received = number

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            # Ranks that stop leave together, and the launcher may pass its signal on once more meanwhile.
            if not (self.received and world.size > 1):
                for number, handler in previous.items():
                    signal.signal(number, handler)
