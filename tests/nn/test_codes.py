"""How many codes of a codebook are used."""

from __future__ import annotations

import pytest
import torch

from mim_framework.nn.codes import perplexity, usage_picture


def test_perplexity_is_the_number_of_codes_that_are_used_alike():
    counts = torch.tensor([[3.0, 3.0, 3.0, 3.0], [8.0, 8.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert perplexity(counts).tolist() == pytest.approx([4, 2, 1, 1])


def test_the_picture_of_usage_has_a_bar_of_logarithmic_height_for_each_code():
    picture = usage_picture(torch.tensor([0.0, 1.0, 3.0, 0.0]), height=4, width=4)[0]  # log1p: 0, 1 and 2 times ln 2
    assert (1 - picture).sum(0).tolist() == [4, 2, 0, 0]
    assert picture[:2, 1].tolist() == [1, 1]
    assert usage_picture(torch.zeros(3), height=4, width=4).min() == 1
