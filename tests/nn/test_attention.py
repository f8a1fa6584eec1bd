"""Attention, its heads, and what it hands out."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.nn.attention import Attention, attend, check_heads, split_heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_a_learned_bias_is_that_of_the_formula_with_its_gradients(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8).to(dtype).requires_grad_().unbind(0)
    bias = torch.randn(1, 4, 9, 9, requires_grad=True)
    exact = (q.float() @ k.float().mT / 8**0.5 + bias).softmax(-1) @ v.float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    ours = attend(q, k, v, bias)
    assert ours.dtype == dtype
    assert torch.allclose(ours.float(), exact, atol=tolerance)
    wanted = torch.autograd.grad(exact.square().sum(), [q, k, v, bias], retain_graph=True)
    found = torch.autograd.grad(ours.float().square().sum(), [q, k, v, bias])
    assert all(torch.allclose(a.float(), b.float(), atol=10 * tolerance) for a, b in zip(found, wanted, strict=True))
    with torch.no_grad():
        assert torch.allclose(attend(q, k, v, bias).float(), exact, atol=tolerance)  # the fused kernel in float32


def test_a_width_that_is_no_whole_number_of_heads_is_refused():
    check_heads(12, 3)
    with pytest.raises(ValueError, match="embed_dim 12 is not a multiple of num_heads 5"):
        check_heads(12, 5)


def test_heads_are_split_by_hand():
    projected = torch.arange(8.0).reshape(1, 1, 8)  # query 0 to 3, key 4 to 7, two heads each
    query, key = split_heads(projected, num_heads=2, count=2)
    assert query.tolist() == [[[[0.0, 1.0]], [[2.0, 3.0]]]]
    assert key.tolist() == [[[[4.0, 5.0]], [[6.0, 7.0]]]]


def test_the_weights_of_an_attention_are_those_of_its_output():
    torch.manual_seed(0)
    attention, x = Attention(8, 2, table_grid=Grid((1, 2))), torch.randn(2, 3, 8)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    mixed, (q, k, v) = attention(x)
    weights = attention.weights(q, k)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 3))
    assert torch.allclose(attention.proj((weights @ v).transpose(1, 2).flatten(2)), mixed, atol=1e-6)
