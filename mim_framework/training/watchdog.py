"""Ends a run whose step does not come to an end, and says which rank hangs. Start at `Watchdog.watched`."""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mim_framework.contract.world import World

STDERR = 2
"""The descriptor, which is there whatever has become of `sys.stderr`."""
GATHERING_SECONDS = 5.0
"""How long the ranks that hang wait for each other's stacks before one of them tells."""
LAST_RESORT_SECONDS = 60.0
"""So much later the process is ended even if no Python code of it can run."""


class Watchdog:
    """One on every rank. A thread looks whether the main thread has come to a new place in time.

    Args:
        seconds: the time that a step may take; None for no limit.
    """

    def __init__(self, run_dir: Path, world: World, seconds: float | None) -> None:
        self.run_dir, self.world, self.seconds = run_dir, world, seconds
        self.step, self.place, self.number = 0, "", 0
        self._deadline: float | None = None
        self._over = threading.Event()

    def at(self, place: str) -> None:
        """The main thread has come to the next place of its step; who came least far is the one that hangs."""
        self.place, self.number = place, self.number + 1

    @contextmanager
    def over_a_step(self, step: int) -> Iterator[None]:
        """The step inside must end in time."""
        self.step, self.place, self.number = step, "before its images", 0
        if self.seconds is not None:
            self._deadline = time.monotonic() + self.seconds
            faulthandler.dump_traceback_later(self.seconds + LAST_RESORT_SECONDS, exit=True, file=STDERR)
        try:
            yield
        finally:
            self._deadline = None
            if self.seconds is not None:
                faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the steps that are made inside."""
        if self.seconds is None:
            yield
            return
        thread = threading.Thread(target=self._watch, name="mim watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._over.wait(min(1.0, self.seconds / 10)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end()

    def _end(self) -> None:
        """Write the stacks of this rank down, let one rank say which one hangs, and leave."""
        self._write()
        until = time.monotonic() + GATHERING_SECONDS
        while time.monotonic() < until and len(self._written()) < self.world.size:
            time.sleep(0.1)
        written = self._written()
        if min(written, default=self.world.rank) == self.world.rank:
            os.write(STDERR, f"mim: {self._verdict(written)}\n".encode())
        else:
            time.sleep(GATHERING_SECONDS)  # the launcher ends the one that tells with the first that leaves
        os._exit(1)

    def _write(self) -> None:
        with suppress(OSError):  # a full disk must not keep the run from ending
            state = {"rank": self.world.rank, "pid": os.getpid(), "at": time.time()}
            state |= {"step": self.step, "place": self.place, "number": self.number}
            with self._file(self.world.rank).open("w") as file:
                file.write(json.dumps(state) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _written(self) -> dict[int, dict[str, object]]:
        """What the ranks have written down just now."""
        found = {}
        for rank in range(self.world.size):
            with suppress(OSError, ValueError):
                state = json.loads(self._file(rank).read_text().partition("\n")[0])
                if time.time() - state["at"] < 60 + 2 * GATHERING_SECONDS:
                    found[rank] = state
        return found

    def _verdict(self, written: dict[int, dict[str, object]]) -> str:
        silent = [rank for rank in range(self.world.size) if rank not in written]
        reached = {rank: (state["step"], state["number"]) for rank, state in written.items()}
        behind = [rank for rank, place in reached.items() if place == min(reached.values())]
        if silent:
            ranks, where = silent, "and could not even write its stacks"
        else:
            state = written[behind[0]]
            ranks, where = behind, f"at step {state['step']}, {state['place']}"
        if len(ranks) == self.world.size > 1:
            named = "all ranks hang"
        else:
            named = f"rank {', '.join(map(str, ranks))} hangs"
        return (
            f"a step took longer than train.step_timeout={self.seconds:g} seconds: {named} {where}. The stacks of the "
            f"ranks are in {self._file('N')}. The same command goes on from the last checkpoint; if steps "
            "do take so long, raise train.step_timeout"
        )

    def _file(self, rank: int | str) -> Path:
        return self.run_dir / f"stacks.rank{rank}.txt"
