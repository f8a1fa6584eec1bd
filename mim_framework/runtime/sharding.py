"""A model on several ranks: replicated or sharded, compiled, gathered again."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mim_framework.contract.world import World

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


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, one at a time; an empty dict on the other ranks. All ranks must call it."""
    gathered = {}
    for name, tensor in tensors.items():
        gathered_one = whole(tensor)
        if world.is_main:
            gathered[name] = gathered_one.detach().to("cpu", copy=True)
    return gathered


def like(reference: Tensor, whole: Tensor) -> Tensor:
    """A whole CPU tensor placed and, if the reference is sharded, sharded like it."""
    whole = whole.to(device=reference.device, dtype=reference.dtype)
    if not isinstance(reference, DTensor):
        return whole
    return distribute_tensor(whole, reference.device_mesh, reference.placements, src_data_rank=None)
