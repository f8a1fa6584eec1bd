"""What a method draws once for a whole step: the sizes of I-JEPA's blocks, on every rank and micro-batch alike.

The masks are held against statistics of the official collator: 4000 batches of 4 (1000 at 28x28). It seeds the sizes
with the number of the step and draws places from a global generator, so single masks cannot be compared.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from methods.harness import EMA, SGD, assert_same_weights, on_two_ranks, plugin, run
from parity.harness import read_json
from torch import Tensor

from mim_framework.contract.components import Masker
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Masked
from mim_framework.contract.specs import EncoderSpec, MaskerSpec, Specs, ViewSpec
from mim_framework.contract.step import Step

OFFICIAL = read_json("ijepa_mask_stats.json")
BATCH_SIZE = 4
IJEPA = {
    "masker": "ijepa",
    "encoder": {"type": "vit", "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "position": "sincos"},
    "target": {"type": "features", "teacher": "ema"},
    "teachers": EMA,
    "optim": SGD,
}


def block_size(grid: Grid, draw: float, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
    """Height and width of a block in patches: one draw decides about both area and form (official)."""
    area = int(grid.num_patches * (scale[0] + draw * (scale[1] - scale[0])))
    ratio = aspect[0] + draw * (aspect[1] - aspect[0])
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return tuple(min(side, length - 1) for side, length in zip(sides, grid.shape, strict=True))


def place(grid: Grid, size: tuple[int, int], draws: Tensor) -> Tensor:
    """draws (B, 2) -> bool (B, N): the patches of a block; never the last row or column (official)."""
    (height, width), (rows, columns) = size, (torch.arange(n, device=draws.device) for n in grid.shape)
    top, left = ((draws[:, axis, None] * (grid.shape[axis] - size[axis])).long() for axis in (0, 1))
    down, right = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    return (down[:, :, None] & right[:, None]).flatten(1)


@plugin
class MultiBlockMasker(Masker):
    """Shows a large block without the four small ones that are to be predicted (I-JEPA, section 3).

    Officially every batch is cut to its smallest context; here rows vary, so that a mask belongs to its sample alone.
    """

    name = "ijepa"
    sizes: list[tuple[int, tuple[int, int], tuple[int, int]]] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        grid = specs.encoder.grid
        self.spec = MaskerSpec(grid, equal=False, num_hidden=0.6 * grid.num_patches)

    def forward(self, step, views):
        grid = self.spec.grid
        of_target, of_context = step.rand_batch("block sizes", 2).tolist()
        size = block_size(grid, of_target, (0.15, 0.2), (0.75, 1.5))
        shown = block_size(grid, of_context, (0.85, 1.0), (1.0, 1.0))
        if step.total > 1:
            self.sizes.append((step.index, size, shown))
        targets = torch.cat([place(grid, size, step.rand(f"target {number}", 2)) for number in range(4)])
        of_sample = targets.unflatten(0, (4, -1)).any(0)
        context = place(grid, shown, step.rand("context", 2)) & ~of_sample
        return Masked({"x": Mask(~context, grid).predicting(targets, size[0] * size[1])}, views)


def test_the_sizes_of_a_step_are_those_of_every_micro_batch_and_change_from_step_to_step(tmp_path):
    MultiBlockMasker.sizes = []
    run(tmp_path, "train.batch_size=1", "train.steps=6", **IJEPA)
    sizes = MultiBlockMasker.sizes
    assert [index for index, *_ in sizes] == [index for index in range(6) for _ in range(4)]
    assert len(set(sizes)) == 6
    assert len({size for _, size, _ in sizes}) > 1


@pytest.mark.slow
def test_ranks_and_micro_batches_draw_the_same_sizes_and_train_alike(tmp_path):
    MultiBlockMasker.sizes = []
    alone = run(tmp_path / "alone", "train.total_batch_size=8", **IJEPA)
    one_batch, MultiBlockMasker.sizes = MultiBlockMasker.sizes, []
    options = ["train.total_batch_size=8", "train.batch_size=2"]
    ranks, seen = on_two_ranks(tmp_path / "ranks", lambda trainer: MultiBlockMasker.sizes, *options, **IJEPA)
    for of_rank in seen:
        assert of_rank == [each for each in one_batch for _ in range(2)]
    assert_same_weights(ranks, alone, atol=1e-6)


@pytest.mark.parametrize("setting", OFFICIAL)
def test_block_sizes_are_the_official_ones_for_the_official_draws(setting):
    official = OFFICIAL[setting]
    grid = Grid((official["grid"],) * 2)
    for seed, sizes in enumerate(official["block_sizes_of_steps_0_to_19_target_then_context"]):
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.rand(1, generator=generator).item() for _ in range(2)]
        ours = block_size(grid, draws[0], (0.15, 0.2), (0.75, 1.5)), block_size(grid, draws[1], (0.85, 1.0), (1.0, 1.0))
        assert [list(size) for size in ours] == sizes


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL])
def drawn(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Official statistics; our contexts, cut to the smallest of a batch, (batches, 4, N), and sets (batches, 16, N)."""
    official = OFFICIAL[request.param]
    grid = Grid((official["grid"],) * 2)
    specs = Specs(views={"x": ViewSpec("x", size=(224, 224))}, encoder=EncoderSpec(8, grid, 16, 1, 1))
    masker = MultiBlockMasker(MultiBlockMasker.Config(), specs)
    masks = []
    for index in range(official["batches"]):
        positions = torch.arange(BATCH_SIZE) + BATCH_SIZE * index
        masks.append(masker(Step(index, 1, 0.0, 1.0, positions, seed=5, world=None), {}).masks["x"])
    visible = torch.stack([~mask.hidden for mask in masks])
    smallest = visible.sum(2).amin(1)
    return official, visible & (visible.cumsum(2) <= smallest[:, None, None]), torch.stack([m.predict for m in masks])


def assert_alike(of_batches: Tensor, official: Tensor, num_official: int) -> None:
    """of_batches (batches, ...): means of single batches, whose mean is the official one within 5 standard errors.

    Images of a batch share the sizes of blocks, so that only batches are independent.
    """
    error = of_batches.std(0) * math.sqrt(1 / len(of_batches) + 1 / num_official)
    mean = of_batches.mean(0)
    assert bool(((mean - official).abs() <= 5 * error + 1e-4).all())  # the official means have four decimals
    assert torch.equal(mean == 0, official == 0)  # what is never used: the last row and column


def test_every_patch_is_shown_and_predicted_as_often(drawn):
    official, contexts, targets = drawn
    for ours, name in ((contexts, "context_probability"), (targets, "target_probability_per_block")):
        wanted = torch.tensor(official[name], dtype=torch.float64).flatten()
        assert_alike(ours.double().mean(1), wanted, official["batches"])


def test_contexts_and_sets_are_as_large(drawn):
    official, contexts, targets = drawn
    counts = contexts.sum(2)
    assert bool((counts == counts[:, :1]).all())
    assert_alike(counts[:, 0].double(), torch.tensor(official["context_count_mean"]), official["batches"])
    areas = targets.sum(2)
    assert bool((areas == areas[:, :1]).all())
    assert_alike(areas[:, 0].double(), torch.tensor(official["target_count_mean"]), official["batches"])
    for ours, name in ((counts[:, 0], "context_count_histogram"), (areas[:, 0], "target_count_histogram")):
        histogram = {int(count): number for count, number in official[name].items()}
        values = range(max(*histogram, int(ours.max())) + 1)
        shares = [torch.bincount(ours, minlength=len(values)) / len(ours)]
        shares.append(torch.tensor([histogram.get(value, 0) for value in values]) / official["batches"])
        mine, theirs = (torch.tensor(list(accumulate(each.tolist()))) for each in shares)
        assert (mine - theirs).abs().max() < 2.2 * math.sqrt(2 / official["batches"])  # 1 in 8000 by chance
