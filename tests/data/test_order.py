"""Which sample stands at which position: every order is a permutation in each epoch and a function of the position."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RECIPE

from mim_framework.assembly.builder import build_source
from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.base.section import Choice
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data.loader import DataSection, Loader
from mim_framework.data.order import BatchLayout, BlockOrder, SampleOrder, SequentialOrder, sample_order
from mim_framework.data.views import ImageViews
from mim_framework.recipe.recipe import Recipe
from mim_framework.testing import RegistryWith
from mim_framework.training.directory import changed_keys


class Shards(Source):
    """Sample i is a picture of the colour i, in blocks of some lengths."""

    name = "shards"

    class Config(Source.Config):
        blocks: tuple[int, ...] | None = (3, 1, 4)
        """Lengths of the blocks."""
        num_samples: int = 8
        """How many there are."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.blocks = config.blocks

    def __len__(self) -> int:
        return self.config.num_samples

    def read(self, index: int) -> Sample:
        return Sample(np.full((8, 8, 3), index, np.uint8), str(index))


def shards(**options) -> Shards:
    return Shards(Shards.Config(**options))


def read(workers: int = 0, start_step: int = 0, layout: BatchLayout = BatchLayout(8, 4), **options) -> dict[int, int]:
    """Position -> sample, of four steps."""
    loader = Loader(
        DataSection(source=Choice(type="shards"), workers=workers, **options), shards(blocks=(3, 1, 4, 2, 6, 4),
        num_samples=20), ImageViews(ImageViews.Config(img_size=8)), seed=5, layout=layout, start_step=start_step,
        total_steps=8, device=torch.device("cpu"),
    )  # fmt: skip
    return {
        position: int(picture.flatten()[0])
        for batch in loader
        for position, picture in zip(batch.positions.tolist(), batch.views["x"], strict=True)
    }


def test_blocks_of_one_window_by_hand():
    """Two windows of two blocks: the blocks in the order of their draw, then the samples of each window in theirs."""
    order = BlockOrder(seed=3, blocks=[2, 1, 3, 2], window=2)
    members = [[0, 1], [2], [3, 4, 5], [6, 7]]
    for epoch in range(2):
        blocks = rng.permutation(3, f"blocks of epoch {epoch}", 4).tolist()
        expected = []
        for window in range(2):
            inside = [sample for block in blocks[2 * window : 2 * window + 2] for sample in members[block]]
            drawn = rng.permutation(3, f"window {window} of epoch {epoch}", len(inside))
            expected += [inside[i] for i in drawn]
        assert order.indices(range(8 * epoch, 8 * epoch + 8)) == expected


@settings(max_examples=60, deadline=None)
@given(blocks=st.lists(st.integers(0, 9), min_size=1, max_size=12), window=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_epoch_of_blocks_holds_every_sample_once_and_stays_within_its_windows(blocks, window, seed):
    count = sum(blocks)
    if not count:
        return
    drawn = BlockOrder(seed, blocks, window).indices(range(3 * count))
    block_of = [block for block, length in enumerate(blocks) for _ in range(length)]
    for epoch in range(3):
        once = drawn[count * epoch : count * (epoch + 1)]
        assert sorted(once) == list(range(count))
        opened = [block_of[sample] for sample in once]
        for block in set(opened):  # while a block is being read, at most `window` blocks are open
            first, last = opened.index(block), count - 1 - opened[::-1].index(block)
            assert len(set(opened[first : last + 1])) <= window
    other = BlockOrder(seed, blocks, window)
    assert other.indices([2 * count, 0, count - 1]) == [drawn[2 * count], drawn[0], drawn[count - 1]]


def test_a_window_over_all_blocks_mixes_all_samples():
    drawn = BlockOrder(0, [50] * 20, window=20).indices(range(1000))
    distances = [abs(a - b) for a, b in pairwise(drawn)]
    assert 300 < sum(distances) / len(distances) < 366  # a third of the whole, as of two uniform draws


def test_the_order_of_ten_million_samples_is_never_held():
    order = BlockOrder(0, [10_000] * 1000, window=8)
    order.indices(range(79_990, 80_010))  # over the end of the first window
    assert sum(len(samples) for samples in order._drawn.values()) == 160_000


def test_epochs_of_blocks_differ():
    order = BlockOrder(0, [4] * 8, window=2)
    assert order.indices(range(32)) != order.indices(range(32, 64))


def test_sequential_repeats_the_order_of_the_source():
    assert SequentialOrder(7, 3).indices(range(7)) == [0, 1, 2, 0, 1, 2, 0]
    assert list(read(order="sequential").values())[:24] == [*range(20), 0, 1, 2, 3]


def test_the_recipe_chooses_the_order():
    assert type(sample_order("shuffled", shards(), 0, 2)) is SampleOrder
    assert type(sample_order("blocks", shards(), 0, 2)) is BlockOrder
    assert DataSection(source="shards").order == "shuffled"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_blocks_are_the_same_on_any_ranks_and_workers_and_after_a_resume():
    options = {"order": "blocks", "order_window": 2}
    one = read(**options)
    assert list(one.values()) == BlockOrder(5, (3, 1, 4, 2, 6, 4), 2).indices(range(64))
    assert read(workers=2, **options) == one
    ranks = [read(layout=BatchLayout(8, 2, rank, 2), **options) for rank in (0, 1)]
    assert {**ranks[0], **ranks[1]} == one
    assert read(start_step=5, **options) == {position: one[position] for position in range(40, 64)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": None}, r"data.order: blocks, but data.source 'shards' has none: .* use data.order=shuffled"),
        ({"blocks": (3, 1)}, r"its 2 blocks hold 4 samples, but it has 8"),
        ({"blocks": (9, -1)}, r"data.source 'shards' says that it has a block of -1 samples"),
    ],
)
def test_an_order_of_blocks_that_cannot_be_is_refused_when_the_source_is_built(options, message):
    data = {"source": {"type": "shards", **options}, "order": "blocks"}
    recipe = Recipe.model_validate({**RECIPE, "data": data})
    with pytest.raises(DataError, match=message):
        build_source(recipe, RegistryWith(Shards))


def test_a_resumed_run_may_not_change_its_order():
    before, after = (Recipe.model_validate({**RECIPE, "data": {**RECIPE["data"], "order": order}})
                     for order in ("shuffled", "sequential"))  # fmt: skip
    assert changed_keys(before, after) == ["data.order: shuffled -> sequential"]
