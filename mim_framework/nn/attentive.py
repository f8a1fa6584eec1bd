"""Learned pooling of patch tokens, the trained part of attentive probes: EP, CAE, V-JEPA, AIM. (B, N, D) -> (B, D).

An `AttentiveHead` is such a pooling with the norm and the classifier that follow it officially; `attentive_head` makes
one by name, with its first weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from mim_framework.nn.attention import attend, check_heads, split_heads
from mim_framework.nn.init import init_linear, trunc_normal

HeadName = Literal["ep", "cae", "vjepa", "aim"]
"""Efficient probing (Psomas et al. 2025), CAE (Chen et al. 2022), V-JEPA (Bardes et al. 2024), AIM (El-Nouby 2024)."""


class EfficientPooling(nn.Module):
    """Queries look at the tokens as they are, each for its own part of one value projection (efficient probing).

    Raises:
        ValueError: if the width is no multiple of the number of queries.
    """

    def __init__(self, dim: int, num_queries: int = 32) -> None:
        super().__init__()
        check_queries(dim, num_queries)
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.v = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, D): the part of query i has the places i*D/Q to (i+1)*D/Q."""
        num_queries, dim = self.queries.shape
        weights = (x @ (self.queries * dim**-0.5).t()).softmax(1)  # (B, N, Q)
        values = self.v(x).unflatten(-1, (num_queries, -1))  # (B, N, Q, D / Q)
        return torch.einsum("bnq,bnqd->bqd", weights, values).flatten(1)


class CAEPooling(nn.Module):
    """One query, zero at first, in a cross-attention with norms before query, keys and values (CAE).

    No residual: the norm makes of the zero query its bias, so that attention starts uniform.
    """

    def __init__(self, dim: int, num_heads: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(3))
        self.q, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, D)."""
        q = self.q(self.norm_q(self.query)).expand(len(x), -1, -1)
        k, v = self.k(self.norm_k(x)), self.v(self.norm_v(x))
        q, k, v = (split_heads(each, self.num_heads, 1)[0] for each in (q, k, v))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))[:, 0]


class VJEPAPooling(nn.Module):
    """One query in a transformer block whose attention looks at the tokens (V-JEPA).

    The query has no norm and the attention no output projection; the official module holds one and never uses it.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-5) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=norm_eps), nn.LayerNorm(dim, eps=norm_eps)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, D)."""
        query = self.query.expand(len(x), -1, -1)
        [q] = split_heads(self.q(query), self.num_heads, 1)
        k, v = split_heads(self.kv(self.norm1(x)), self.num_heads, 2)
        query = query + attend(q, k, v).transpose(1, 2).flatten(2)
        return (query + self.mlp(self.norm2(query)))[:, 0]


class AIMPooling(nn.Module):
    """Queries in a cross-attention over batch-normalised tokens, and their mean (AIM)."""

    def __init__(self, dim: int, num_heads: int, num_queries: int = 1) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.k, self.v = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, D)."""
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        [q] = split_heads(self.queries.expand(len(x), -1, -1), self.num_heads, 1)
        [k], [v] = (split_heads(each(x), self.num_heads, 1) for each in (self.k, self.v))
        return attend(q, k, v).transpose(1, 2).flatten(2).mean(1)


class AttentiveHead(nn.Module):
    """Tokens to classes: a pooling, the norm that follows it, a linear classifier."""

    def __init__(self, pool: nn.Module, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.pool, self.norm, self.linear = pool, norm, linear

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> scores (B, C)."""
        return self.linear(self.norm(self.pool(x)))


def check_queries(dim: int, num_queries: int) -> None:
    """Refuse a width that is not a whole number of queries.

    Raises:
        ValueError: naming both, and the next smaller number of queries that would do.
    """
    if dim % num_queries:
        fitting = next(each for each in range(min(num_queries, dim), 0, -1) if dim % each == 0)
        raise ValueError(f"width {dim} is not a multiple of num_queries {num_queries}; use num_queries={fitting}")


def attentive_head(
    name: HeadName, dim: int, num_classes: int, *, num_heads: int, num_queries: int = 32
) -> AttentiveHead:
    """A head with its official norm and first weights, drawn from the global generator.

    Args:
        num_heads: of the attention; `ep` has one for each query.
        num_queries: of `ep` alone.

    Raises:
        ValueError: if the width is no multiple of the heads or queries.
    """
    make: dict[HeadName, Callable[[], AttentiveHead]] = {
        "ep": lambda: _with_batch_norm(EfficientPooling(dim, num_queries), dim, num_classes, eps=1e-6),
        "aim": lambda: _with_batch_norm(AIMPooling(dim, num_heads), dim, num_classes, eps=1e-6),
        "cae": lambda: _with_batch_norm(CAEPooling(dim, num_heads), dim, num_classes, eps=1e-5),
        "vjepa": lambda: AttentiveHead(VJEPAPooling(dim, num_heads), nn.Identity(), nn.Linear(dim, num_classes)),
    }
    head = make[name]()
    if name in ("cae", "vjepa"):
        for module in (head if name == "cae" else head.pool).modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
    if isinstance(head.pool, VJEPAPooling):
        trunc_normal(head.pool.query)
        with torch.no_grad():
            head.pool.mlp.fc2.weight.div_(math.sqrt(2))
    return head


def _with_batch_norm(pool: nn.Module, dim: int, num_classes: int, eps: float) -> AttentiveHead:
    return AttentiveHead(pool, nn.BatchNorm1d(dim, affine=False, eps=eps), nn.Linear(dim, num_classes))
