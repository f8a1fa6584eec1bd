"""Starting the ranks of a run, finding the device of each, and leaving together."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta

import torch
import torch.distributed as dist

from mim_framework.base.errors import MimError
from mim_framework.contract.world import World

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1
"""A run that gets one of these finishes its step, saves and leaves with 128 + signal. SIGUSR1 is a scheduler's hint."""


def under_launcher() -> bool:
    """True in a process that torchrun or `mim run` started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` -> cuda, mps or cpu, the first that there is; `local_rank` chooses among the GPUs of the machine.

    Raises:
        MimError: if the wanted device is not there, or the machine has fewer GPUs than ranks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, there in available.items() if there) if wanted == "auto" else wanted
    if not available[kind]:
        found = ", ".join(name for name, there in available.items() if there)
        error = MimError(f"train.device is '{kind}', but this machine has only {found}; use train.device=auto")
        error.told_by_another_rank = local_rank > 0
        raise error
    return torch.device(kind, _gpu(local_rank)) if kind == "cuda" else torch.device(kind)


def _gpu(local_rank: int) -> int:
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1 and not dist.is_torchelastic_launched():
        return 0  # a launcher such as Slurm's lets every task see its own GPU only
    if local_rank >= num_gpus:
        num_ranks = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 0)))
        error = MimError(
            f"{num_ranks} ranks on this machine, but only {num_gpus} visible GPUs; "
            f"use --nproc-per-node {num_gpus}, or train.device=cpu"
        )
        error.told_by_another_rank = local_rank > num_gpus
        raise error
    return local_rank


@contextmanager
def process_group(wanted_device: str, *, timeout: float | None = None) -> Iterator[tuple[World, torch.device]]:
    """Join the ranks that the launcher started, or run alone.

    The ranks leave together at the end, and at a SystemExit, on which they must have agreed. After any other error a
    rank just leaves: the others may wait for it in a collective, where it could only join them; the launcher ends them.

    Args:
        timeout: seconds that a rank waits for the others in a collective; by default those of torch.

    Raises:
        MimError: if a variable of the launcher is missing, or as `choose_device`.
    """
    if not under_launcher():
        yield World(), choose_device(wanted_device)
        return
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(wanted_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():  # ranks that a test forked are already together
        yield World(dist.get_rank(), dist.get_world_size(), local_rank), device
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise MimError(
            f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not. A launcher such as torchrun sets RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset RANK and WORLD_SIZE to train without one"
        )
    on_gpu = device.type == "cuda"
    limit = None if timeout is None else timedelta(seconds=timeout)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None, timeout=limit)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank), device
    except SystemExit:
        _leave_together()
        raise
    _leave_together()


def _leave_together() -> None:
    dist.barrier()  # without it gloo aborts now and then when one rank leaves early
    dist.destroy_process_group()


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    arguments: list[str],
    *,
    nproc_per_node: int,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
    rdzv_id: str | None = None,
) -> None:
    """Start `python -m mim_framework ARGUMENTS` once per rank of this node under torch.distributed's elastic agent.

    Raises:
        MimError: if a rank fails; the message holds the rank's exit code, its error stands above.
        SystemExit: with 128 + signal, if a signal ended this process or stopped the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if nnodes > 1 and not rdzv_endpoint:
        raise MimError(f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT, an address that every node reaches")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc_per_node)))
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=nproc_per_node,
        run_id=rdzv_id or "mim",
        rdzv_backend="c10d",
        rdzv_endpoint=rdzv_endpoint or f"127.0.0.1:{free_port()}",
        rdzv_configs={} if node_rank is None else {"rank": node_rank},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle=_signals_to_forward(),
        # Time to finish a step and save. torch 2.11 does not know the option and kills after 30 s.
        **({"shutdown_timeout": 120} if "shutdown_timeout" in {field.name for field in fields(LaunchConfig)} else {}),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mim_framework", *arguments)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode - 128 in STOP_SIGNALS:
            raise SystemExit(failure.exitcode) from None
        killed = f", killed by {failure.signal_name()}" if failure.exitcode < 0 else ""
        raise MimError(f"rank {rank} ended with exit code {failure.exitcode}{killed}; its message is above") from None


def _signals_to_forward() -> str:
    """What the agent passes on to the ranks. A signal that is ignored stays so: SIGHUP under nohup."""
    wanted = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
    return ",".join(
        name for name in wanted if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
    )
