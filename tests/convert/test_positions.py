"""Position tables for another image size."""

from __future__ import annotations

import pytest
import torch

from mim_framework.convert import resize_position_table
from mim_framework.records import Grid


def test_the_same_grid_changes_nothing():
    table = torch.randn(1, 5, 4)
    assert resize_position_table(table, Grid((2, 2)), Grid((2, 2))) is table


def test_prefix_rows_are_kept_and_a_constant_stays_constant():
    table = torch.cat([torch.tensor([[[9.0, 8.0]]]), torch.full((1, 4, 2), 3.0)], dim=1)
    resized = resize_position_table(table, Grid((2, 2)), Grid((3, 5)))
    assert resized.shape == (1, 16, 2)
    assert resized[0, 0].tolist() == [9.0, 8.0]
    assert torch.allclose(resized[0, 1:], torch.tensor(3.0))


def test_rows_and_columns_keep_their_places():
    column = torch.arange(4.0).repeat(4)[None, :, None]  # the value is the column
    row = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    resized = resize_position_table(torch.cat([column, row], dim=2), Grid((4, 4)), Grid((8, 8)))[0].unflatten(0, (8, 8))
    assert torch.allclose(resized[..., 0], resized[..., 1].T, atol=1e-6)
    assert (resized[:, 1:, 0] - resized[:, :-1, 0] > 0).all()  # grows along columns,
    assert torch.allclose(resized[1:, :, 0], resized[:-1, :, 0], atol=1e-6)  # and not along rows
    assert resized[0, 2:6, 0].tolist() == pytest.approx([0.75, 1.25, 1.75, 2.25], abs=0.1)


def test_shrinking_is_bicubic_without_antialiasing():
    """Halving reads the two middle neighbours with weight 19/32 and the outer two with -3/32 (a = -0.75)."""
    table = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat(4)[None, :, None]
    resized = resize_position_table(table, Grid((4, 4)), Grid((2, 2)))[0, :, 0].unflatten(0, (2, 2))
    first = (-3 * 1 + 19 * 1 + 19 * 2 - 3 * 4) / 32  # the border value stands for what lies outside
    assert resized[0, 0].item() == pytest.approx(first)
    assert resized[0, 1].item() == pytest.approx((-3 * 2 + 19 * 4 + 19 * 8 - 3 * 8) / 32)


def test_a_table_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="a position table of 3 rows cannot be that of a grid 2x2"):
        resize_position_table(torch.zeros(1, 3, 4), Grid((2, 2)), Grid((3, 3)))
