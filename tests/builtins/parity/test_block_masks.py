"""Block masks against statistics of 20,000 draws of each official generator (unilm's two, SlowFast, mmpretrain).

The generators draw one mask after another from a global generator, so single masks cannot be compared.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity.harness import read_json

from mim_framework.builtins.maskers import BlockMasker
from mim_framework.contract.mask import Grid
from mim_framework.contract.specs import EncoderSpec, Specs, ViewSpec
from mim_framework.contract.step import Step

DRAWS = 20_000
RULES = {"beit": "stop_short", "beit2": "exact", "slowfast": "stop_short", "mmpretrain": "mmpretrain"}
OFFICIAL = {entry["generator"]: entry for entry in read_json("beit_mask_stats_14x14.json")["generators"]}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name == "mmpretrain" else name for name in RULES],
)
def masks(request: pytest.FixtureRequest) -> tuple[dict[str, Any], torch.Tensor]:
    """The official statistics of a generator, and as many masks of ours, (draws, 14, 14)."""
    official = OFFICIAL[request.param]
    setting = official["setting"]
    grid = Grid(tuple(setting["grid"]))
    specs = Specs(views={"x": ViewSpec("x", size=(224, 224))}, encoder=EncoderSpec(8, grid, 16, 1, 1))
    options = {"num_hidden": setting["num_masking_patches"], "min_num_patches": setting["min_num_patches"]}
    masker = BlockMasker(BlockMasker.Config(rule=RULES[request.param], **options), specs)
    step = Step(0, 1, 0.0, 1.0, torch.arange(DRAWS), seed=3, world=None)
    return official, masker(step, {}).masks["x"].hidden.reshape(-1, *grid.shape)


def test_every_cell_is_hidden_as_often(masks):
    official, hidden = masks
    wanted, found = torch.tensor(official["mean_mask"], dtype=torch.float64), hidden.double().mean(0)
    error = (wanted * (1 - wanted) * (1 / DRAWS + 1 / official["draws"])).sqrt()
    assert bool(((found - wanted).abs() <= 5 * error).all())
    assert torch.equal(found == 0, wanted == 0)  # the cells that a generator never hides


def test_the_number_of_hidden_patches_is_distributed_alike(masks):
    official, hidden = masks
    histogram = {int(count): number for count, number in official["masked_count"]["histogram"].items()}
    counts = hidden.sum((1, 2))
    assert counts.max() <= max(histogram)
    ours = theirs = 0  # rare counts are put together
    chi_square, degrees = 0.0, -1
    for count in range(max(histogram) + 1):
        ours, theirs = ours + int((counts == count).sum()), theirs + histogram.get(count, 0)
        if ours + theirs >= 20:
            chi_square += (ours - theirs) ** 2 / (ours + theirs)  # two samples of one size
            degrees += 1
            ours = theirs = 0
    assert official["draws"] == DRAWS
    assert chi_square <= degrees + 5 * math.sqrt(2 * max(1, degrees))


def test_neighbours_are_hidden_together_as_often(masks):
    """Blocks, not single patches: what the two statistics above cannot tell."""
    official, hidden = masks
    pairs = {
        "horizontal_neighbours": (hidden[:, :, 1:] & hidden[:, :, :-1]),
        "vertical_neighbours": (hidden[:, 1:] & hidden[:, :-1]),
    }
    for name, both in pairs.items():
        per_mask = both.double().mean((1, 2))
        error = per_mask.std().item() * math.sqrt(2 / DRAWS)
        assert per_mask.mean().item() == pytest.approx(official["both_masked"][name], abs=5 * error), name


def test_the_generators_differ_by_more_than_the_errors_allowed_here():
    """The negative control: masks of one rule would not pass as those of another."""
    mean = {name: entry["masked_count"]["mean"] for name, entry in OFFICIAL.items()}
    assert mean["beit2"] - mean["beit"] > 0.5
    largest_error = 5 * math.sqrt(0.25 * 2 / DRAWS)
    cells = {name: torch.tensor(entry["mean_mask"]) for name, entry in OFFICIAL.items()}
    assert (cells["slowfast"] - cells["beit"]).abs().max() > largest_error
    assert (cells["slowfast"] - cells["mmpretrain"]).abs().max() > 3 * largest_error
