"""The end of a run whose memory ran out or whose other ranks are gone, in a sentence with the way out."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mim_framework.runtime.metrics import peak_memory
from mim_framework.training.run import Run

_ALLOCATION = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)
_WANTED = re.compile(r"tried to allocate ([\d.]+ ?[A-Za-z]+)", re.IGNORECASE)
_CONTACT = re.compile(
    r"connection (closed|reset) by peer|gloo/transport|remote process exited|NCCL (error|communicator was aborted)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Trouble:
    """What has kept a run from a step."""

    text: str
    of_another_rank: bool = False
    """Another rank has said it, or its launcher will: this one is told by it."""


def explained(error: Exception, run: Run, index: int) -> Trouble | None:
    """What happened in a step, what was measured, and the way out; None for an error of another kind."""
    if is_out_of_memory(error):
        return Trouble(_out_of_memory(error, run, index))
    if run.world.size > 1 and is_lost_contact(error):
        return Trouble(
            f"rank {run.world.rank} of {run.world.size} lost contact with another rank in step {index}: that one has "
            "ended before. Its own message says why, or the launcher's; SIGKILL most often means that memory ran out",
            of_another_rank=not run.world.is_main,
        )
    return None


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because a rank that takes part in it is no more."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and bool(_CONTACT.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whichever device, also in a data worker."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_ALLOCATION.search(str(error)))


def _out_of_memory(error: Exception, run: Run, index: int) -> str:
    peak = peak_memory(run.device)
    measured = "" if peak is None else f", of which {peak / 1e9:.1f} GB were held at the peak"
    if run.device.type == "cuda":
        measured += f" of {torch.cuda.get_device_properties(run.device).total_memory / 1e9:.1f} GB"
    wanted = _WANTED.search(str(error))
    asked = f" (it tried to allocate {wanted[1]})" if wanted else ""
    size, smaller = run.layout.batch_size, next_batch_size(run)
    if smaller is None:
        cure = "the batch cannot be divided further: use a smaller encoder or view, or more ranks"
    else:
        steps = run.layout.total_batch_size // (smaller * run.layout.world_size)
        cure = f"use train.batch_size={smaller}, which reaches the same total batch in {steps} accumulation steps"
    return (
        f"memory of {run.device.type} ran out in step {index}{asked}, with {size} images per rank and "
        f"micro-batch{measured}; {cure}"
    )


def next_batch_size(run: Run) -> int | None:
    """The next smaller micro-batch that divides a rank's share of the total batch, and that the views can take."""
    share = run.layout.total_batch_size // run.layout.world_size
    multiple = run.model.views.batch_multiple
    sizes = (size for size in range(run.layout.batch_size - 1, 0, -1) if share % size == 0 and size % multiple == 0)
    return next(sizes, None)
