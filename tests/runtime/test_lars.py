"""LARS of official linear probes, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.runtime.lars import LARS, trust_ratio
from mim_framework.runtime.optim import Optimizer, OptimSection


def test_two_steps_by_hand():
    """A matrix of norm 5 under a gradient of norm 10 moves by 0.001 * 5 / 10 of it; a bias by all of it."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([weight, bias], lr=2.0)
    weight.grad, bias.grad = torch.tensor([[6.0, 8.0]]), torch.tensor([0.5])
    optimizer.step()
    assert weight.tolist()[0] == pytest.approx([3 - 2 * 0.0005 * 6, 4 - 2 * 0.0005 * 8])
    assert bias.item() == pytest.approx(1 - 2 * 0.5)
    optimizer.param_groups[0]["lr"] = 1.0  # not folded into the momentum
    bias.grad = torch.tensor([0.0])
    optimizer.step()
    assert bias.item() == pytest.approx(0.0 - 0.9 * 0.5)


def test_decay_is_added_to_the_gradient_of_matrices_before_the_trust_ratio():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([weight, bias], lr=1.0, weight_decay=2.0)
    weight.grad, bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.step()
    assert weight.tolist()[0] == pytest.approx([3 - 0.003, 4 - 0.004])  # 0.001 of its norm, whatever the decay
    assert bias.item() == 1.0


def test_a_norm_of_zero_means_a_ratio_of_one():
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    assert trust_ratio(zeros, ones, 0.001).item() == 1.0
    assert trust_ratio(ones, zeros, 0.001).item() == 1.0


def test_a_recipe_chooses_it_and_follows_its_schedule():
    section = OptimSection(type="lars_mocov3", lr=1.0, shape="constant", weight_decay=0, options={"momentum": 0.0})
    optimizer = Optimizer("main", section, [("w", nn.Parameter(torch.ones(2, 2)))], (), 1)
    optimizer.schedule(Step(0, 1, 0.0, 1.0, torch.arange(1), 0, World()))
    assert [(group["lr"], group["momentum"]) for group in optimizer.optimizer.param_groups] == [(1.0, 0.0)]


@pytest.mark.parametrize(
    ("wrong", "text"), [({"eps": 1e-8}, "takes no eps"), ({"options": {"nesterov": True}}, "nesterov")]
)
def test_what_it_does_not_take_is_refused(wrong, text):
    section = OptimSection(type="lars_mocov3", lr=1.0, shape="constant", **wrong)
    with pytest.raises(ValueError, match=text):
        Optimizer("main", section, [("w", nn.Parameter(torch.ones(2, 2)))], (), 1)
