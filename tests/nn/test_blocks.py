"""Blocks of a vision transformer, and the loop over them."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.records import Ask
from mim_framework.nn.blocks import Block, drop_path_ramp, run_blocks


def test_drop_path_grows_linearly_from_nothing():
    assert drop_path_ramp(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_ramp(0.3, 1) == [0.0]


def test_blocks_hand_out_what_is_asked_for_and_nothing_else():
    torch.manual_seed(0)
    blocks, x = [Block(8, 2, 2.0), Block(8, 2, 2.0)], torch.randn(2, 3, 8)
    out, answers = run_blocks(blocks, x, Ask(layers=frozenset({0}), attn=frozenset({1}), qkv=frozenset({0})))
    first, qkv = blocks[0](x, want_qkv=True)
    assert {name: list(found) for name, found in answers.items()} == {"layers": [0], "attn": [1], "qkv": [0]}
    assert torch.equal(answers["layers"][0], first)
    assert torch.equal(answers["qkv"][0], qkv)
    assert torch.equal(out, blocks[1](first)[0])
    assert blocks[1](first)[1] is None
