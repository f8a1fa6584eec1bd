"""Random numbers as a pure function of (seed, stream name, sample position).

Crops, flips, masks and the order of the data come from here, so that a run resumed on another number of ranks or data
workers sees the same samples, the same crops and the same masks. Nothing has a state that could be lost.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64 (Steele, Lea, Flood 2014)
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch accepts."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 bit patterns; a bijection with full avalanche."""
    x = (x ^ _logical_shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _logical_shift(x, 27)) * _signed(_MIX_2)
    return x ^ _logical_shift(x, 31)


@lru_cache(maxsize=4096)
def stream_key(seed: int, stream: str) -> int:
    """64-bit key of one stream of one run, as a signed integer."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8, key=str(seed).encode()).digest()
    return _signed(int.from_bytes(digest, "little"))


def random_bits(seed: int, stream: str, positions: Tensor, n: int) -> Tensor:
    """positions (B,) int64 -> (B, n) int64, uniform over all 64-bit patterns, the same on every device."""
    rows = _mix(positions.to(torch.int64) * _signed(_GOLDEN) + stream_key(seed, stream))
    columns = torch.arange(1, n + 1, dtype=torch.int64, device=positions.device) * _signed(_GOLDEN)
    return _mix(rows[:, None] + columns)


def uniform(seed: int, stream: str, positions: Tensor, n: int) -> Tensor:
    """positions (B,) int64 -> (B, n) float32 in [0, 1), on a grid of 2^-24 as `torch.rand` has it."""
    return uniform_from(random_bits(seed, stream, positions, n))


def uniform_from(bits: Tensor) -> Tensor:
    """Random int64 patterns -> as many uniform float32 in [0, 1), on a grid of 2^-24."""
    return _logical_shift(bits, 40).to(torch.float32) * 2.0**-24


def uniform_of(bits: Tensor, n: int) -> Tensor:
    """Random patterns (B,) int64 -> (B, n) uniform float32 in [0, 1), more draws for each; can be compiled."""
    columns = torch.arange(1, n + 1, dtype=torch.int64, device=bits.device) * _signed(_GOLDEN)
    return uniform_from(_mix(bits[:, None] + columns))


def permutation(seed: int, stream: str, n: int) -> Tensor:
    """A uniformly random order of 0..n-1, int64. The sort is stable, so that ties cannot depend on the machine."""
    return random_bits(seed, stream, torch.arange(n), 1)[:, 0].argsort(stable=True)
