"""Runs that something happens to: `mim` in a fork of this process, with a fault put in from outside. Start at `mim`."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mim_framework.checkpoints.checkpoint import list_checkpoints, step_of
from mim_framework.commands.cli import main
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.training.trainer import Trainer

SHORT = (
    "train.epochs=null",
    "train.total_batch_size=16",
    "train.device=cpu",
    "optim.warmup_epochs=0",
    "log.every_steps=1",
    "checkpoint.every_epochs=0",
    "log.tensorboard=false",
    "log.num_images=0",
    "evaluate=[]",
)
"""A quickstart recipe, short."""
OF_TIME = ("images_per_s", "step_s", "wait_share", "peak_memory_gb")
FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
Fault = Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), what it printed, and its seconds."""

    code: int
    said: str
    seconds: float

    @property
    def in_a_sentence(self) -> bool:
        return self.code == 1 and "mim: " in self.said and "Traceback" not in self.said


def mim(*arguments: object, fault: Fault | None = None, timeout: float = 180) -> Ended:
    """`mim ARGUMENTS` to its end; `fault` is called in its process before."""
    _import_what_a_run_imports()
    began = time.monotonic()
    with tempfile.TemporaryFile("w+b") as said:
        pid = os.fork()
        if not pid:
            _command([str(each) for each in arguments], said.fileno(), fault)
        code = _waited(pid, began + timeout)
        said.seek(0)
        return Ended(code, said.read().decode(errors="replace"), time.monotonic() - began)


@cache
def _import_what_a_run_imports() -> None:
    """Once, so that a fork of this process begins at once."""
    Registry().load_all()
    for module in ("commands.tokenize", "commands.check", "training.trainer"):
        importlib.import_module(f"mim_framework.{module}")


def _command(arguments: list[str], output: int, fault: Fault | None) -> None:
    code = 99
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.resetwarnings()  # pytest makes errors of them
        logging.getLogger().handlers.clear()  # those of pytest keep what a person would see
        if fault is not None:
            fault()
        try:
            main(arguments, prog_name="mim")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _waited(pid: int, until: float) -> int:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError("the command did not end in time")
        time.sleep(0.01)


def started(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """`python -m mim_framework ARGUMENTS`, in the background and in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mim_framework", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def wait_for(there: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


# --- faults ----------------------------------------------------------------------------------------------------------


def at_step(step: int, action: Fault) -> Fault:
    """`action` before a step of training."""

    def install() -> None:
        train_step = Trainer.train_step

        def faulty(self: Trainer, index: int, batches: Iterable[Any]) -> Any:
            if index == step:
                action()
            return train_step(self, index, batches)

        Trainer.train_step = faulty

    return install


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_file(number: int, action: Fault, of: str) -> Fault:
    """`action` before the file operation of that number among those on paths that hold `of`; counted from 1."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_OPERATIONS and of in str(arguments[0]):
            seen += 1
            if seen == number:
                action()

    return lambda: sys.addaudithook(watch)


def read_only(folder: Path) -> Fault:
    """A folder of a file system that is mounted for reading: whatever would change it fails."""
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and not (arguments[2] or 0) & changing
        if event in FILE_OPERATIONS and not reads and str(arguments[0]).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    return lambda: sys.addaudithook(watch)


def poisoned(steps: Iterable[int]) -> Fault:
    """Views that are not finite at some steps."""
    steps = set(steps)

    def install() -> None:
        train_step = Trainer.train_step

        def faulty(self: Trainer, index: int, batches: Iterable[Any]) -> Any:
            batches = list(batches)
            for batch in batches if index in steps else ():
                for name, view in batch.views.items():
                    batch.views[name] = view.float() * float("nan")
            return train_step(self, index, batches)

        Trainer.train_step = faulty

    return install


# --- what a run leaves -----------------------------------------------------------------------------------------------


def hashes(run: Path) -> dict[str, str]:
    """Of every file of the newest checkpoint: tensors, optimizer, state."""
    files = json.loads((list_checkpoints(run / "checkpoints")[-1] / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in OF_TIME} for line in read_metrics(run)]


def steps(run: Path) -> list[int]:
    return [step_of(each) for each in list_checkpoints(run / "checkpoints")]
