"""One process or many: process group, modules wrapped for DDP or FSDP2, whole tensors for checkpoints, launching."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mim_framework.base.errors import MimError
from mim_framework.contract.world import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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
def process_group(wanted_device: str) -> Iterator[tuple[World, torch.device]]:
    """Join the ranks that the launcher started, or run alone.

    The ranks leave together at the end, and at a SystemExit, on which they must have agreed. After any other error a
    rank just leaves: the others may wait for it in a collective, where it could only join them; the launcher ends them.

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
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank), device
    except SystemExit:
        _leave_together()
        raise
    _leave_together()


def _leave_together() -> None:
    dist.barrier()  # without it gloo aborts now and then when one rank leaves early
    dist.destroy_process_group()


Mode = Literal["ddp", "fsdp"]


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile every block for itself.

    Blocks of one class share their graphs, one for every stage of a hierarchical encoder, with and without gradients:
    more than the eight that torch allows before it gives up and runs them uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile()


def shard(
    module: nn.Module, blocks: Iterable[nn.Module], device: torch.device, *, reshard_after_forward: bool | None = None
) -> None:
    """Shard a module over all ranks in place (FSDP2): each block is a unit, the rest another.

    Args:
        reshard_after_forward: True for a module without a backward pass, whose weights would stay gathered otherwise.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)


def wrap(
    module: nn.Module, blocks: Iterable[nn.Module], mode: Mode, world: World, device: torch.device, *, phases: int = 1
) -> nn.Module:
    """The module ready for several ranks; itself with one rank. Weights must be the same on all ranks before."""
    if world.size == 1:
        return module
    if mode == "fsdp":
        shard(module, blocks, device)
        return module
    # Stateful components reduce their own buffers. torch 2.14 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    keep_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    # A phase may leave parameters of another optimizer without gradient; with one the preflight shows that none is.
    return DistributedDataParallel(
        module, gradient_as_bucket_view=True, find_unused_parameters=phases > 1, **keep_buffers
    )


def gradient_sync(module: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
    """Reduce gradients over ranks in this backward pass, or leave it to the last micro-batch."""
    if isinstance(module, DistributedDataParallel):
        return nullcontext() if enabled else module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(enabled)
    return nullcontext()


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Weights that FSDP keeps at the root, gathered, so that parts of the module can be called outside its forward."""
    sharded = hasattr(module, "unshard")
    if sharded:
        module._get_fsdp_state()._lazy_init()  # or the first block that is called would take itself for the root
        module.unshard()
    try:
        yield
    finally:
        if sharded:
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, one at a time; an empty dict on the other ranks. All ranks must call it."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            gathered[name] = whole.detach().to("cpu", copy=True)
    return gathered


def like(reference: Tensor, whole: Tensor) -> Tensor:
    """A whole CPU tensor placed and, if the reference is sharded, sharded like it."""
    whole = whole.to(device=reference.device, dtype=reference.dtype)
    if not isinstance(reference, DTensor):
        return whole
    return distribute_tensor(whole, reference.device_mesh, reference.placements, src_data_rank=None)


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
    return ",".join(name for name in wanted if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN)
