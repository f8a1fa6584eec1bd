"""Requests answered ahead of time by worker processes, which outlive the signals to a job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from mim_framework.runtime.launch import STOP_SIGNALS

SIGNAL_SECONDS = 10.0
"""A worker takes SIGTERM for one to the whole job until so many seconds after the first."""


def prefetch(
    reader: Any,
    requests: Iterable[Any],
    *,
    workers: int,
    remote: bool,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """`reader[request]` for every request, in order, read ahead by `workers` processes."""
    with warnings.catch_warnings(), _signals_held_back():
        # torchdata 0.11 calls this on every construction; torch has deprecated it
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
        # Python 3.12 warns of a fork beside other threads; the workers use no lock that torch's threads could hold
        warnings.filterwarnings("ignore", message=".*use of fork\\(\\)", category=DeprecationWarning)
        return iter(
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


def _context(remote: bool) -> multiprocessing.context.BaseContext:
    """Fork is fastest, but the threads and connections of a remote file system do not survive it."""
    if sys.platform == "linux" and not remote:
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Workers, and a fork server, start with the signals blocked: none can end one before it has its handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
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
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _unchanged(batch: Any) -> Any:
    return batch
