"""Losses that say what they were divided by and what else is worth logging; gradients that are clipped one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from methods.harness import GRID, PLUGIN, SGD, lines_of, on_two_ranks, plugin, recipe_at, run, watch

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.base.errors import RecipeError
from mim_framework.builtins.losses import align, masked_mean, num_predicted
from mim_framework.checkpoints import checkpoint
from mim_framework.contract.components import Loss, Masker
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Masked, Measured
from mim_framework.contract.specs import MaskerSpec
from mim_framework.nn.patches import unpatchify
from mim_framework.testing import RegistryWith
from mim_framework.testing.runs import state_of

BLOCKS = {"type": "block", "mask_ratio": 0.6, "min_num_patches": 6, "min_aspect": 1.0, "rule": "stop_short"}
"""Rows hide 9 or 10 patches."""
ALL_OR_NOTHING = {**BLOCKS, "mask_ratio": 0.5}
"""Rows hide 8 patches or none, where no block of 3 by 3 fits."""
OVER_POSITIONS = "train.average=over_positions"


@plugin
class HuberLoss(Loss):
    """Huber's loss over the predicted positions; says over how many, and the mean absolute error beside it."""

    name = "huber"

    def forward(self, pred, target, mask, latent):
        values, wanted = align(pred, target)
        mask, error = mask.at(pred.grid), (values.float() - wanted).abs()
        each = torch.where(error < 0.5, error.square(), error - 0.25).mean(-1)
        metrics = {"error": masked_mean(error.detach().mean(-1), pred.ids, mask)}
        return Measured(masked_mean(each, pred.ids, mask), metrics, num_predicted(pred.ids, mask))


@plugin
class UncountedLoss(HuberLoss):
    name = "uncounted"

    def forward(self, pred, target, mask, latent):
        return super().forward(pred, target, mask, latent).loss


@plugin
class DoubtfulLoss(HuberLoss):
    """A measure that is sometimes no number, such as the mean of nothing."""

    name = "doubtful"

    def forward(self, pred, target, mask, latent):
        measured = super().forward(pred, target, mask, latent)
        return measured._replace(metrics={**measured.metrics, "of_nothing": torch.zeros(0).mean()})


@plugin
class SomeHideNothing(Masker):
    """Every fourth image hides nothing, the others one to three patches."""

    name = "some_hide_nothing"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=False, num_hidden=1.5)

    def forward(self, step, views):
        patches = torch.arange(16, device=step.positions.device)
        return Masked({"x": Mask(patches < step.positions[:, None] % 4, GRID)}, views)


def huber(folder: Path, *overrides: str, **changes) -> Path:
    options = ["train.total_batch_size=8", *overrides]
    return run(folder, *options, **{"masker": BLOCKS, "loss": "huber", "optim": SGD, **changes})


def measures(run_dir: Path) -> list[float]:
    """Loss, metric and norm of the gradient of every step."""
    keys = ("loss", "heads.main.loss/error", "grad_norm")
    return [line[key] for line in lines_of(run_dir) for key in keys]


def largest_difference(a: Path, b: Path) -> float:
    first, second = (checkpoint.find_latest(each / "checkpoints").tensors("model") for each in (a, b))
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("masker", [BLOCKS, ALL_OR_NOTHING])
def test_a_division_over_positions_makes_the_split_of_a_batch_a_matter_of_rounding(tmp_path, masker):
    """8 images at once, one by one, and two by two on two ranks."""
    whole = huber(tmp_path / "whole", OVER_POSITIONS, masker=masker)
    single = huber(tmp_path / "single", OVER_POSITIONS, "train.batch_size=1", masker=masker)
    options = ["train.total_batch_size=8", "train.batch_size=2", OVER_POSITIONS]
    ranks, _ = on_two_ranks(tmp_path / "ranks", lambda trainer: None, *options, masker=masker, loss="huber", optim=SGD)
    for other in (single, ranks):
        assert measures(other) == pytest.approx(measures(whole), rel=1e-5)
        assert largest_difference(whole, other) < 1e-6


@pytest.mark.slow
def test_a_mean_of_means_depends_on_the_split_where_rows_hide_different_numbers(tmp_path):
    """The default, as official codes do; with one micro-batch both divisions are the same."""
    whole, single = (huber(tmp_path / size, f"train.batch_size={size}") for size in ("8", "1"))
    assert largest_difference(whole, single) > 1e-5
    assert measures(single) != pytest.approx(measures(whole), rel=1e-4)
    assert measures(huber(tmp_path / "over", OVER_POSITIONS)) == pytest.approx(measures(whole), rel=1e-5)


def test_the_loss_and_its_measure_by_hand_over_micro_batches_of_unequal_counts(tmp_path):
    """Six images one by one, and at once."""
    recipe = recipe_at(tmp_path / "by_hand", masker=BLOCKS, loss="huber")
    model = build_model(recipe, RegistryWith(*PLUGIN))
    head = model.objective.heads["main"]
    counts, errors = [], []
    for position in range(6):
        step = make_step(recipe, torch.tensor([position]))
        views = model.views.prepare(step, {name: each[position:][:1] for name, each in model.example(6).items()})
        masked = model.objective.masker(step, views)
        measured = head.measure(masked, model.objective.encode(masked), head.target(step, masked))
        counts.append(int(masked.masks["x"].hidden.sum()))
        errors.append(measured.metrics["error"].item())
        assert measured.count == counts[-1]
    assert len(set(counts)) > 1
    step = make_step(recipe, torch.arange(6))
    whole = model.objective(step, model.views.prepare(step, model.example(6)))
    by_hand = sum(count * error for count, error in zip(counts, errors, strict=True)) / sum(counts)
    assert whole.metrics["heads.main.loss/error"].item() == pytest.approx(by_hand)
    assert whole.counts["main"] == sum(counts)


@pytest.mark.parametrize(
    ("heads", "what"),
    [
        ({"one": "uncounted"}, "loss 'one' has none"),
        ({"one": "huber", "two": "huber"}, "there are those of one, two"),
    ],
)
def test_a_division_over_positions_needs_one_loss_that_says_its_count(tmp_path, heads, what):
    parts = {name: {"target": "pixels", "decoder": "linear", "loss": loss} for name, loss in heads.items()}
    with pytest.raises(RecipeError, match=f"over_positions, which needs one loss that says its count .*: {what}"):
        run(tmp_path, OVER_POSITIONS, heads=parts, target=None, decoder=None, loss=None)


@pytest.mark.slow
def test_a_measure_that_is_no_number_skips_no_step_and_hides_no_other(tmp_path):
    run_dir = huber(tmp_path / "doubtful", loss="doubtful")
    plain = huber(tmp_path / "plain")
    assert not (run_dir / "nonfinite.jsonl").exists()
    assert largest_difference(run_dir, plain) == 0
    assert measures(run_dir) == measures(plain)
    assert all(math.isnan(line.get("heads.main.loss/of_nothing", math.nan)) for line in lines_of(run_dir))


def test_a_step_in_which_nothing_is_predicted_does_not_count(tmp_path):
    """Nor does it end the run: it is skipped like one whose loss is not finite."""
    run_dir = run(tmp_path, OVER_POSITIONS, "train.total_batch_size=1", masker="some_hide_nothing", loss="huber")
    [skipped] = [json.loads(line) for line in (run_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert skipped["step"] == 0


@plugin
class EdgeLoss(Loss):
    """Edges of what is wrong, over the whole image: also those between predicted patches and visible ones."""

    name = "edges"
    sees_views = True

    def __init__(self, config, specs):
        super().__init__(config, specs)
        *self.patch_size, _ = specs.target.layout

    def forward(self, pred, target, mask, latent, *, masked):
        view = masked.clean("x")
        places = pred.ids[..., None].expand_as(pred.values)
        nothing = pred.values.new_zeros(len(view), pred.grid.num_patches, pred.values.shape[-1])
        image = unpatchify(nothing.scatter(1, places, pred.values - target.values), self.patch_size, pred.grid)
        edges = (image[..., 1:] - image[..., :-1]).square().mean()
        return Measured(edges, {"brightness": view.mean()})


def test_a_loss_may_see_the_whole_image(tmp_path):
    """By hand, with a prediction of zeros."""
    model = build_model(recipe_at(tmp_path / "by_hand", loss="edges"), RegistryWith(*PLUGIN))
    head, step = model.objective.heads["main"].decoder.head, make_step(model.recipe, torch.arange(2))
    views = model.views.prepare(step, model.views.example(2))
    torch.nn.init.zeros_(head.weight)
    hidden = model.objective.masker(step, views).masks["x"].hidden.reshape(2, 1, 4, 4)
    image = views["x"] * hidden.repeat_interleave(4, 2).repeat_interleave(4, 3)
    by_hand = sum(
        (image[row, c, y, x + 1] - image[row, c, y, x]).item() ** 2
        for row in range(2) for c in range(3) for y in range(16) for x in range(15)
    ) / (2 * 3 * 16 * 15)  # fmt: skip
    assert model.objective(step, views).losses["main"].item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
def test_measures_are_means_over_micro_batches_and_ranks(tmp_path):
    whole = run(tmp_path / "whole", loss="edges", optim=SGD)
    single = run(tmp_path / "single", "train.batch_size=1", loss="edges", optim=SGD)
    ranks, _ = on_two_ranks(tmp_path / "ranks", lambda trainer: None, "train.batch_size=1", loss="edges", optim=SGD)
    keys = ("loss", "heads.main.loss/brightness")
    values = [[line[key] for line in lines_of(run_dir) for key in keys] for run_dir in (whole, single, ranks)]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_every_parameter_is_clipped_by_itself_and_alike_on_two_ranks(tmp_path, mode):
    """A plain step of gradient descent moves each by its gradient, of which no norm is above the bound (iBOT)."""
    bound, lr = 0.05, SGD["lr"]
    clipped = {**SGD, "clip_grad_norm_per_parameter": bound}
    _, free = watch(tmp_path / "free", lambda model: state_of(model.objective), "train.steps=1", optim=SGD)
    alone, states = watch(tmp_path / "alone", lambda model: state_of(model.objective), "train.steps=1", optim=clipped)
    before, after, far = states[0], states[1], free[1]
    factors = {name: min(1.0, bound * lr / (far[name] - before[name]).norm().item()) for name in before}
    assert {factor < 1 for factor in factors.values()} == {True, False}
    for name, factor in factors.items():
        assert torch.allclose(after[name] - before[name], factor * (far[name] - before[name]), rtol=1e-3, atol=1e-7)
    options = ["train.steps=1", f"train.distributed={mode}"]
    ranks, _ = on_two_ranks(tmp_path / "ranks", lambda trainer: None, *options, optim=clipped)
    assert largest_difference(ranks, alone) < 1e-6
