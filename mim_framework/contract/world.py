"""The ranks of a run, and reductions over them through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mim_framework.base import errors
from mim_framework.base.errors import MimError

T = TypeVar("T")


def _summed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor)
    return tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        parts = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad).chunk(ctx.size)[ctx.rank], None, None


@dataclass(frozen=True)
class World:
    """The ranks of a run. Its reductions work on any device and do nothing with one rank.

    Gradients flow through them: what every rank computes from the result reaches the ranks that it came from, summed.
    All ranks must then go backward through it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; the argument is left as it is."""
        return tensor if self.size == 1 else _Sum.apply(tensor)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks."""
        return self.sum(tensor) / self.size

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks (the same shape everywhere), concatenated along dimension 0 in rank order."""
        return tensor if self.size == 1 else _Gather.apply(tensor, self.rank, self.size)

    def share(self, value: T) -> T:
        """Rank 0's value, a small plain one, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, function: Callable[[], T]) -> T | None:
        """Call `function` on rank 0 while the others wait. Returns its result there and None on the others.

        Raises:
            MimError: on every rank, if it fails on rank 0, so that no rank waits for one that has left.
        """
        if self.size == 1:
            return function()
        result, raised = None, None
        if self.is_main:
            try:
                result = function()
            except Exception as error:
                raised = error
        failure = self.share(None if raised is None else (type(raised).__name__, str(raised)))
        if raised is not None:
            raise raised
        if failure is not None:
            kind, text = failure
            error = getattr(errors, kind, MimError)(text)
            error.told_by_another_rank = True
            raise error
        return result
