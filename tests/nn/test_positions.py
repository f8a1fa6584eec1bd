"""Position tables."""

from __future__ import annotations

import math

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.nn.positions import relative_position_index, sincos_position_table


def test_position_table_encodes_the_column_first():
    table = sincos_position_table(8, Grid((2, 3)))
    column_1, row_1 = table[1], table[3]
    assert column_1.tolist() == pytest.approx([math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1])
    assert row_1.tolist() == pytest.approx([0, 0, 1, 1, math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)])
    swapped = sincos_position_table(8, Grid((2, 3)), row_first=True)
    assert torch.equal(swapped, torch.cat([table[:, 4:], table[:, :4]], dim=1))


def test_position_table_refuses_odd_widths():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_position_table(6, Grid((2, 2)))


def test_positions_of_prefix_tokens_are_zero():
    table = sincos_position_table(8, Grid((2, 3)), num_prefix_tokens=2)
    assert torch.equal(table[:2], torch.zeros(2, 8))
    assert torch.equal(table[2:], sincos_position_table(8, Grid((2, 3))))


def test_positions_of_a_clip_give_time_what_the_other_axes_leave():
    """Width 14 on three axes: four channels for column and row, six for time, which is the slowest."""
    table = sincos_position_table(14, Grid((2, 3, 4)))
    assert table.shape == (24, 14)
    column, row, time = table[:, :4], table[:, 4:8], table[:, 8:]
    assert torch.equal(column[:4], column[4:8])
    assert torch.equal(row[0], row[3])
    assert not torch.equal(row[0], row[4])
    assert torch.equal(time[:12], time[:1].expand(12, -1))
    angles = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)])
    assert torch.allclose(time[12], torch.cat([angles.sin(), angles.cos()]))


def test_relative_positions_are_for_images():
    with pytest.raises(ValueError, match="biases of relative positions are for images; the grid 2x3x4 has 3 axes"):
        relative_position_index(Grid((2, 3, 4)))
