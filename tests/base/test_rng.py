"""Position-addressed random numbers."""

from __future__ import annotations

import torch

from mim_framework.base import rng


def splitmix64(state: int) -> int:
    """The published finaliser on unsigned Python integers, as a check by another route."""
    mask = (1 << 64) - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def test_bits_agree_with_splitmix64_on_unsigned_integers():
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    key = rng.stream_key(7, "mask")
    bits = rng.random_bits(7, "mask", torch.tensor([0, 1, 123456789]), 3)
    for row, position in enumerate([0, 1, 123456789]):
        start = splitmix64((position * golden + key) & mask)
        for column in range(3):
            assert int(bits[row, column]) & mask == splitmix64((start + (column + 1) * golden) & mask)


def test_numbers_are_a_function_of_position_seed_and_stream_only():
    together = rng.uniform(0, "mask", torch.tensor([5, 9, 2]), 4)
    assert torch.equal(together[1:2], rng.uniform(0, "mask", torch.tensor([9]), 4))
    assert torch.equal(together[:, :2], rng.uniform(0, "mask", torch.tensor([5, 9, 2]), 2))
    assert not torch.equal(together, rng.uniform(1, "mask", torch.tensor([5, 9, 2]), 4))
    assert not torch.equal(together, rng.uniform(0, "crop", torch.tensor([5, 9, 2]), 4))


def test_numbers_never_change_between_releases():
    """A change here would break every resumed run."""
    assert rng.uniform(0, "mask", torch.tensor([0, 1]), 2).tolist() == FIRST_NUMBERS
    assert rng.permutation(0, "epoch 0", 8).tolist() == FIRST_ORDER


def test_numbers_are_uniform_and_independent_across_positions_and_columns():
    x = rng.uniform(3, "mask", torch.arange(50_000), 8)
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, bins=64, min=0, max=1)
    expected = x.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 110  # chi-square, 63 degrees of freedom, p = 2e-4
    across_columns = torch.corrcoef(x.T) - torch.eye(8)
    across_positions = torch.corrcoef(torch.stack([x[:-1, 0], x[1:, 0]]))[0, 1]
    assert across_columns.abs().max() < 0.02  # 4.5 standard errors
    assert abs(across_positions) < 0.02


def test_permutation_visits_everything_once_and_differs_between_epochs():
    first, second = rng.permutation(0, "epoch 0", 1000), rng.permutation(0, "epoch 1", 1000)
    assert first.sort().values.tolist() == list(range(1000))
    assert (first == second).float().mean() < 0.01


FIRST_NUMBERS = [[0.7477290034294128, 0.06546628475189209], [0.7432323098182678, 0.6894724369049072]]
FIRST_ORDER = [3, 4, 2, 0, 5, 7, 1, 6]
