"""Stochastic depth by sample position: who is dropped does not depend on ranks, micro-batches or the pass before."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from mim_framework.base.section import Section
from mim_framework.contract.components import Component
from mim_framework.contract.specs import Specs
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.nn import Block, DropPath, replace_drop_path
from mim_framework.runtime.drop_paths import DropPaths
from mim_framework.testing import run_ranks
from mim_framework.testing.runs import PLAIN_SGD, SHORT, losses_of, optimizers_of, run


class Depth(Component):
    """Two branches, of which x = 1 shows by 1 and 1000 times its factor what was kept."""

    name = "depth"

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__(Section(), Specs())
        self.first, self.second = DropPath(rate), nn.Sequential(DropPath(rate))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 1000 * self.second(x)


def step_at(positions: list[int], phase: str = "main") -> Step:
    return Step(
        index=0, total=1, epoch=0.0, epochs=1.0, positions=torch.tensor(positions), seed=0, world=World(), phase=phase
    )


def passes(module: Component, positions: list[int], count: int = 1, phase: str = "main", rows: int = 1) -> list[Tensor]:
    with DropPaths(module).drawn(step_at(positions, phase)):
        return [module(torch.ones(rows * len(positions), 1))[:, 0] for _ in range(count)]


def test_draws_belong_to_samples_in_whatever_batch_they_come():
    module, many = Depth(), list(range(64))
    (whole,) = passes(module, many)
    parts = torch.cat([passes(module, many[:20])[0], passes(module, many[20:])[0]])
    assert torch.equal(whole, parts)
    assert set(whole.tolist()) == {0.0, 2.0, 2000.0, 2002.0}  # each branch for itself, kept ones doubled


def test_passes_and_phases_have_draws_of_their_own():
    module, many = Depth(), list(range(64))
    first, second = passes(module, many, 2)
    (other,) = passes(module, many, phase="generator")
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.stack([first, second]), torch.stack(passes(module, many, 2)))


def test_rows_of_several_masks_follow_their_sample():
    module, many = Depth(), list(range(64))
    (whole,) = passes(module, many, rows=3)
    of_few = torch.cat(
        [passes(module, many[:20], rows=3)[0].view(3, 20), passes(module, many[20:], rows=3)[0].view(3, -1)], 1
    )
    assert torch.equal(whole.view(3, 64), of_few)
    assert not torch.equal(whole[:64], whole[64:128])
    samples = DropPaths(module).drawn(step_at([0, 1]))
    with samples, pytest.raises(ValueError, match="drop path of 5 rows in a step of 2 samples: no multiple"):
        module(torch.ones(5, 1))


def test_the_share_that_is_kept_and_its_size_are_those_of_timm():
    x, ours, theirs = torch.ones(20000, 1), Depth(0.2), timm.layers.DropPath(0.2)
    with DropPaths(ours).drawn(step_at(list(range(20000)))):
        kept = ours.first(x)
    torch.manual_seed(0)
    assert set(kept.unique().tolist()) == set(theirs(x).unique().tolist()) == {0.0, 1.25}
    assert kept.mean().item() == pytest.approx(1, abs=4 * 0.5 / 20000**0.5)  # four standard errors
    assert torch.equal(ours.eval().first(x), x)


def test_outside_a_step_torch_draws_anew():
    torch.manual_seed(0)
    module = Depth()
    passes(module, [0, 1])
    assert len({tuple(module(torch.ones(16, 1))[:, 0].tolist()) for _ in range(3)}) == 3
    with pytest.raises(ValueError, match="drop_prob is a share below 1, got 1"):
        DropPath(1.0)


def test_blocks_of_timm_get_it_with_their_rates():
    blocks = nn.Sequential(*(TimmBlock(8, 2, drop_path=rate) for rate in (0.0, 0.25)))
    replace_drop_path(blocks)
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    found = [blocks[1].drop_path1, blocks[1].drop_path2]
    assert [(type(each), each.drop_prob) for each in found] == [(DropPath, 0.25)] * 2
    with pytest.raises(ValueError, match="'0' of Sequential has scale_by_keep=False"):
        replace_drop_path(nn.Sequential(timm.layers.DropPath(0.1, scale_by_keep=False)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["simmim_quickstart", "mixmim_quickstart"])  # blocks of timm, and of a plugin
def test_ranks_and_micro_batches_drop_what_one_rank_drops(recipe: str, tmp_path: Path):
    options = [*SHORT, "encoder.drop_path_rate=0.6"]
    options += optimizers_of(recipe, options, PLAIN_SGD)
    alone = run(tmp_path / "alone", recipe, *options)
    run_ranks(lambda rank: run(tmp_path / "two", recipe, *options, "train.batch_size=2"))
    together = tmp_path / "two" / alone.name
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-5)


def test_a_compiled_block_has_the_same_draws_and_one_graph_for_all_passes():
    class One(Component):
        name = "one"

        def __init__(self) -> None:
            super().__init__(Section(), Specs())
            self.block = Block(8, 2, 2.0, drop_path=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)[0]

    torch.manual_seed(0)
    module, x = One(), torch.randn(8, 3, 8)

    def outputs() -> list[Tensor]:
        found = []
        for positions in (range(8), range(8, 16)):
            with DropPaths(module).drawn(step_at(list(positions))):
                found += [module(x) for _ in range(2)]
        sum(each.square().sum() for each in found).backward()
        return [*found, *(parameter.grad for parameter in module.parameters())]

    eager = outputs()  # with a backward pass before any compiler is imported: ranks cannot be forked otherwise
    module.zero_grad()
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        module.block._compiled_call_impl = torch.compile(module.block._call_impl, backend="eager", fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(outputs(), eager, strict=True))
