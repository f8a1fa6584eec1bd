"""Position tables."""

from __future__ import annotations

import math

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.nn.positions import sincos_position_table


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
