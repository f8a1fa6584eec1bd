"""Tokens by position, and hidden ones."""

from __future__ import annotations

import torch

from mim_framework.contract.mask import Grid, Mask
from mim_framework.nn.masking import gather_tokens, hide_smallest, put_mask_token


def test_gather_tokens_by_hand():
    tokens = torch.tensor([[[0.0, 1], [2, 3], [4, 5]]])
    assert gather_tokens(tokens, torch.tensor([[2, 0]])).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]


def test_the_mask_token_stands_where_the_mask_hides_on_tokens_in_a_row_and_on_a_map():
    tokens, token = torch.arange(4.0).reshape(1, 4, 1), torch.full((1, 1, 1), -1.0)
    mask = Mask(torch.tensor([[True, False, False, True]]), Grid((2, 2)))
    assert put_mask_token(tokens, token, mask).flatten().tolist() == [-1, 1, 2, -1]
    assert put_mask_token(tokens.unflatten(1, (2, 2)), token, mask).tolist() == [[[[-1], [1]], [[2], [-1]]]]


def test_a_mask_token_that_stands_nowhere_has_a_gradient_only_where_it_must():
    token = torch.zeros(1, 1, 1, requires_grad=True)
    nothing = Mask.none(1, Grid((2, 2)), torch.device("cpu"))
    tokens = torch.arange(4.0).reshape(1, 4, 1)
    assert put_mask_token(tokens, token, nothing) is tokens
    assert put_mask_token(tokens, token, nothing, always=True).requires_grad


def test_the_smallest_noise_is_hidden_by_hand():
    assert hide_smallest(torch.tensor([[0.9, 0.1, 0.7, 0.3]]), 2).tolist() == [[False, True, False, True]]
