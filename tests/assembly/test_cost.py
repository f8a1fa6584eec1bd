"""What a step costs, counted."""

from __future__ import annotations

import torch

from mim_framework.assembly.cost import matmul_peak, measure_cost
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry


def test_cost_of_vit_base_matches_the_fact_sheet():
    """9.78 G multiply-adds an image forward, of which we save the prediction head and part of a block."""
    cost = measure_cost(load_recipe("mae", ["data.source=digits"]), Registry())
    assert cost.parameters == {"encoder": 85_798_656 - 197 * 768, "heads": 26_109_184 - 197 * 512}  # tables are buffers
    assert 0.96 < cost.forward_flops / (2 * 9.78e9) < 1.0
    assert 2.9 < cost.train_flops / cost.forward_flops < 3.05
    assert (cost.tokens, cost.positions) == (49, 196)


def test_matmul_peak_is_of_this_machine():
    assert matmul_peak(torch.device("cpu"), torch.float32, seconds=0.1) > 1e8
