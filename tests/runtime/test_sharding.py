"""Wrapping, sharding and whole tensors over two ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mim_framework.contract.world import World
from mim_framework.runtime.sharding import gather_full, like, shard, wrap
from mim_framework.testing import run_ranks


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_over_two_ranks_are_those_of_the_whole_batch(mode):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    batch = torch.randn(4, 3)
    whole(batch).square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}

    def rank_main(rank: int):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        model.load_state_dict(start)
        wrapped = wrap(model, [model[0]], mode, World(rank, 2), torch.device("cpu"))
        wrapped(batch[rank * 2 : rank * 2 + 2]).square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return gather_full(gradients, World(rank, 2))

    gathered, nothing = run_ranks(rank_main)
    assert nothing == {}
    for name, gradient in wanted.items():
        assert torch.allclose(gathered[name], gradient, atol=1e-6), name


def test_a_whole_tensor_is_sharded_like_its_reference():
    def rank_main(rank: int):
        model = nn.Linear(3, 4)
        shard(model, [], torch.device("cpu"))
        placed = like(model.weight, torch.arange(12.0).reshape(4, 3))
        return placed.to_local().flatten().tolist()

    assert run_ranks(rank_main) == [[0.0, 1, 2, 3, 4, 5], [6.0, 7, 8, 9, 10, 11]]
