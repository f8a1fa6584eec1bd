"""Patches and position tables."""

from __future__ import annotations

import math

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.nn.attention import attend
from mim_framework.nn.codes import perplexity, usage_picture
from mim_framework.nn.masking import gather_tokens
from mim_framework.nn.patches import patchify, unpatchify
from mim_framework.nn.positions import sincos_position_table


def test_patchify_by_hand_has_channels_fastest():
    image = torch.arange(2 * 2 * 4).reshape(1, 2, 2, 4)  # two channels, two rows, four columns
    assert patchify(image, 2)[0, 1].tolist() == [2, 10, 3, 11, 6, 14, 7, 15]


def test_unpatchify_inverts_patchify_on_rectangles():
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, Grid((2, 3))), images)


def test_an_image_of_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="image size 10x8 is not a multiple of patch_size 4"):
        patchify(torch.rand(1, 3, 10, 8), 4)


def test_gather_tokens_by_hand():
    tokens = torch.tensor([[[0.0, 1], [2, 3], [4, 5]]])
    assert gather_tokens(tokens, torch.tensor([[2, 0]])).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]


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


def test_perplexity_is_the_number_of_codes_that_are_used_alike():
    counts = torch.tensor([[3.0, 3.0, 3.0, 3.0], [8.0, 8.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert perplexity(counts).tolist() == pytest.approx([4, 2, 1, 1])


def test_the_picture_of_usage_has_a_bar_of_logarithmic_height_for_each_code():
    picture = usage_picture(torch.tensor([0.0, 1.0, 3.0, 0.0]), height=4, width=4)[0]  # log1p: 0, 1 and 2 times ln 2
    assert (1 - picture).sum(0).tolist() == [4, 2, 0, 0]
    assert picture[:2, 1].tolist() == [1, 1]
    assert usage_picture(torch.zeros(3), height=4, width=4).min() == 1
