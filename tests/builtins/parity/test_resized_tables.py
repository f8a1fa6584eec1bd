"""Tables of positions and biases for another image size, against numbers of the official fine-tunings.

Every `eval-resize_*` file in `MIM_PARITY_DIR` is one case; by default that beside this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.harness import cases, of_committed_cases
from parity.protocols import read_protocol

from mim_framework.contract.mask import Grid
from mim_framework.layouts.tables import resize_bias_table, resized_table

CASES = cases("eval-resize_*.safetensors")
POSITION, BIAS = 2e-6, 1e-5


@of_committed_cases
def test_a_case_of_resizing_is_committed():
    assert CASES


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_position_tables_of_another_grid_are_the_official_ones(path: Path):
    tensors, metadata = read_protocol(path)
    for number, (_, side, _) in enumerate(metadata["config"]["pos_embed"]):
        wanted = tensors[f"out/pos_embed_{number}"]
        table = resized_table(
            "pos_embed", tensors[f"input/pos_embed_{number}"], wanted, Grid((side, side)), "geometric"
        )
        assert (table - wanted).abs().max() <= POSITION


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_bias_tables_of_another_grid_are_the_official_ones(path: Path):
    tensors, metadata = read_protocol(path)
    for number in range(len(metadata["config"]["rel_bias"])):
        wanted, table = tensors[f"out/rel_bias_{number}"], tensors[f"input/rel_bias_{number}"]
        assert (resize_bias_table(table, len(wanted), "geometric") - wanted).abs().max() <= BIAS, number
        assert (resize_bias_table(table, len(wanted), "bicubic") - wanted).abs().max() > 100 * BIAS


def test_a_table_of_another_width_or_of_no_square_is_not_resized():
    wanted = torch.zeros(1, 17, 8)
    assert resized_table("encoder.pos_embed", torch.zeros(1, 10, 4), wanted, Grid((4, 4)), "geometric") is None
    assert resized_table("encoder.pos_embed", torch.zeros(1, 11, 8), wanted, Grid((4, 4)), "geometric") is None
    assert resized_table("encoder.norm.weight", torch.zeros(3), torch.zeros(4), Grid((4, 4)), "geometric") is None
