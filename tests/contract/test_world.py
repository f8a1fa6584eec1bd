"""Reductions over ranks, and what rank 0 does for all."""

from __future__ import annotations

import time

import pytest
import torch

from mim_framework.base.errors import CheckpointError, MimError
from mim_framework.contract.world import World
from mim_framework.runtime.launch import process_group
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
            return (
                world.rank,
                device.type,
                world.sum(x).tolist(),
                world.mean(x).tolist(),
                world.gather(x).tolist(),
                x.tolist(),
            )

    results = run_ranks(rank_main)
    assert results == [(0, "cpu", [3.0], [1.5], [1.0, 2.0], [1.0]), (1, "cpu", [3.0], [1.5], [1.0, 2.0], [2.0])]


@pytest.mark.parametrize("reduce", ["sum", "mean", "gather"])
def test_gradients_through_a_reduction_are_those_of_one_rank(reduce):
    """Every rank computes the same loss of the reduced rows; DDP will average gradients over ranks."""
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    weights = torch.tensor([[0.5, -1.0], [2.0, 4.0]])

    def loss_of(reduced):
        return (reduced * weights[: len(reduced)]).square().sum()

    def rank_main(rank):
        own = rows[rank : rank + 1].clone().requires_grad_()
        loss_of(getattr(World(rank, 2), reduce)(own)).backward()
        return own.grad / 2

    whole = rows.clone().requires_grad_()
    parts = {"sum": whole.sum(0, keepdim=True), "mean": whole.mean(0, keepdim=True), "gather": whole}
    loss_of(parts[reduce]).backward()
    assert torch.allclose(torch.cat(run_ranks(rank_main)), whole.grad)


# --- rank 0 for all --------------------------------------------------------------------------------------------------


def test_one_rank_does_the_work_of_rank_0_itself():
    assert World().on_main(lambda: 3) == 3
    assert World().share("a") == "a"


def test_rank_0_works_while_the_others_wait(tmp_path):
    def rank_main(rank: int):
        world = World(rank, 2)

        def work() -> str:
            time.sleep(0.2)
            (tmp_path / "done").write_text(str(rank))
            return "result"

        result = world.on_main(work)
        return result, (tmp_path / "done").read_text(), world.share(f"of rank {rank}")

    assert run_ranks(rank_main) == [("result", "0", "of rank 0"), (None, "0", "of rank 0")]


@pytest.mark.parametrize("error", [CheckpointError("the disk is full"), MimError("no"), KeyError("a bug")])
def test_what_fails_on_rank_0_fails_on_all(error):
    def rank_main(rank: int):
        def work() -> None:
            raise error

        try:
            World(rank, 2).on_main(work)
        except Exception as raised:
            return type(raised), str(raised), getattr(raised, "told_by_another_rank", None)

    first, second = run_ranks(rank_main)
    is_ours = isinstance(error, MimError)
    assert first == (type(error), str(error), False if is_ours else None)
    assert second == (type(error) if is_ours else MimError, str(error), True)
