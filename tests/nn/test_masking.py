"""Tokens by position."""

from __future__ import annotations

import torch

from mim_framework.nn.masking import gather_tokens


def test_gather_tokens_by_hand():
    tokens = torch.tensor([[[0.0, 1], [2, 3], [4, 5]]])
    assert gather_tokens(tokens, torch.tensor([[2, 0]])).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]
