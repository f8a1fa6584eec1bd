"""Reductions, wrapping and whole tensors over two ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mim_framework.distributed import World, choose_device, gather_full, launch, like, process_group, shard, wrap
from mim_framework.errors import MimError
from mim_framework.testing import run_ranks


def test_one_rank_reduces_to_itself():
    world, x = World(), torch.tensor([1.0, 2.0])
    assert torch.equal(world.mean(x), x)
    assert torch.equal(world.gather(x), x)
    assert world.is_main


def test_two_ranks_sum_mean_and_gather():
    def rank_main(rank: int):
        with process_group("cpu") as (world, device):
            x = torch.tensor([float(rank + 1)])
            return world.rank, device.type, world.sum(x).tolist(), world.mean(x).tolist(), world.gather(x).tolist(), x.tolist()

    results = run_ranks(rank_main)
    assert results == [(0, "cpu", [3.0], [1.5], [1.0, 2.0], [1.0]), (1, "cpu", [3.0], [1.5], [1.0, 2.0], [2.0])]


def test_a_failing_rank_is_reported_with_its_traceback():
    def rank_main(rank: int):
        raise ValueError(f"no luck on {rank}")

    with pytest.raises(RuntimeError, match="no luck on 0"):
        run_ranks(rank_main)


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


def test_a_device_that_is_not_there_is_named():
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(MimError, match=r"train.device is 'cuda', but this machine has only"):
            choose_device("cuda")


def test_several_nodes_need_a_meeting_point():
    with pytest.raises(MimError, match="--nnodes 2 needs --rdzv-endpoint HOST:PORT"):
        launch([], nproc_per_node=1, nnodes=2)
