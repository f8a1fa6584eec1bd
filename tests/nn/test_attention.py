"""Attention with a learned bias."""

from __future__ import annotations

import pytest
import torch

from mim_framework.nn.attention import attend


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
