"""Random numbers of a step."""

from __future__ import annotations

from dataclasses import replace

import torch

from mim_framework.contract.step import Step
from mim_framework.contract.world import World


def test_a_shared_draw_is_the_same_for_all_samples_of_a_step_and_another_in_the_next():
    step = Step(3, 10, 0.0, 1.0, torch.arange(4), seed=0, world=World())
    other_rank = replace(step, positions=torch.arange(4, 8))
    assert step.rand_batch("mask", 5).shape == (5,)
    assert torch.equal(step.rand_batch("mask", 5), other_rank.rand_batch("mask", 5))
    assert not torch.equal(step.rand_batch("mask", 5), replace(step, index=4).rand_batch("mask", 5))
