"""Requests answered ahead of time by worker processes, which outlive the signals to a job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from mim_framework.base.errors import WorkerKilled
from mim_framework.runtime.launch import STOP_SIGNALS

SIGNAL_SECONDS = 10.0
"""A worker takes SIGTERM for one to the whole job until so many seconds after the first."""

DYING_SECONDS = 2.0
"""The connections of a process that is killed are closed some time before its end can be seen."""


def prefetch(
    reader: Any,
    requests: Iterable[Any],
    *,
    workers: int,
    remote: bool,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """`reader[request]` for every request, in order, read ahead by `workers` processes.

    Raises:
        WorkerKilled: where the answer of a process that is gone would be due.
    """
    before = set(multiprocessing.active_children())
    with warnings.catch_warnings(), _signals_held_back():
        # torchdata 0.11 calls this on every construction; torch has deprecated it
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
        # Python 3.12 warns of a fork beside other threads; the workers use no lock that torch's threads could hold
        warnings.filterwarnings("ignore", message=".*use of fork\\(\\)", category=DeprecationWarning)
        answers = iter(
            StatefulDataLoader(
                reader,
                batch_size=None,  # one request is one batch already
                sampler=requests,
                num_workers=workers,
                collate_fn=_unchanged,
                prefetch_factor=prefetch_factor if workers else None,
                multiprocessing_context=_context(remote) if workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_outlive_the_signals_to_the_job,
                generator=torch.Generator(),  # it draws a seed that nothing uses: leave the global generator alone
                snapshot_every_n_steps=None,
            )
        )
    return _while_alive(answers, [each for each in multiprocessing.active_children() if each not in before])


def _while_alive(answers: Iterator[Any], processes: list[BaseProcess]) -> Iterator[Any]:
    """`answers`, with one clear error where a process has died under them."""
    try:
        yield from answers
    except (RuntimeError, OSError, EOFError) as error:  # which of them depends on where the death is noticed
        if "Caught " in str(error):  # raised in a worker, and brought here by torch
            raise
        ending = set(wait([process.sentinel for process in processes], timeout=DYING_SECONDS) if processes else ())
        dead = [process for process in processes if process.sentinel in ending]
        for process in dead:
            process.join()  # its sentinel is ready a moment before its exit code
        if not dead and not isinstance(error, ConnectionError | EOFError) and "DataLoader worker" not in str(error):
            raise
        text = _how_it_died(dead[0] if dead else None, len(processes))
    else:
        return
    finally:
        del answers  # ends the workers, also where the traceback of an error would keep them alive
    raise WorkerKilled(text)  # here, as torch's error would keep the other workers alive


def _how_it_died(process: BaseProcess | None, workers: int) -> str:
    """`process` is None where only its connection is known to be gone."""
    if process is None:
        return f"a data worker is gone; data.workers={workers // 2} needs less memory, 0 shows other faults"
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    cure = f"data.workers={workers // 2} needs less memory, as does a smaller data.prefetch_factor or train.batch_size"
    if code != -signal.SIGKILL:
        return f"a data worker (process {process.pid}) {how}; with data.workers=0 the fault shows itself. Or {cure}"
    text = "most often by the system when memory runs out (`dmesg` says so)"
    return f"a data worker (process {process.pid}) {how}, {text}; {cure}"


def _context(remote: bool) -> multiprocessing.context.BaseContext:
    """Fork is fastest, but the threads and connections of a remote file system do not survive it."""
    if sys.platform == "linux" and not remote:
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Workers, and a fork server, start with the signals blocked: none can end one before it has its handlers.

    The handler by which torch would raise the death of a worker anywhere in the main thread is not kept: the death is
    noticed where the worker's answer is due.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    on_death = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_the_signals_to_the_job(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of a job, SIGTERM often twice, as a launcher passes it on.

    They are for the training process, which still wants batches until it has saved. A later SIGTERM is for the worker.
    """
    first: float | None = None

    def on_sigterm(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        first = now if first is None else first
        if now - first > SIGNAL_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _unchanged(batch: Any) -> Any:
    return batch
