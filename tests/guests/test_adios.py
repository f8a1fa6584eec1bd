"""ADIOS as a guest: soft masks that a U-Net draws, and two phases that pull one loss in opposite directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mim_framework import MimError
from mim_framework.assembly.builder import build_model
from mim_framework.assembly.opened import load_run
from mim_framework.assembly.preflight import make_step
from mim_framework.base import rng
from mim_framework.base.errors import RecipeError
from mim_framework.commands.evaluate import evaluate
from mim_framework.contract.records import Sample
from mim_framework.contract.step import Step
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import PluginContract, RegistryWith, run_ranks
from mim_framework.testing.runs import SHORT, weights_of
from mim_framework.training.trainer import train

QUICKSTART = "adios_quickstart"
SIZES = [
    "views.img_size=16", "masker.num_masks=3", "encoder.patch_size=4", "encoder.embed_dim=16", "encoder.depth=1",
    "encoder.num_heads=2", "objective.hidden_dim=32", "objective.out_dim=8", "masker.hidden_dim=16",
]  # fmt: skip
TINY = [*SIZES, *SHORT]
CONSTANT = "type: momentum, lr: 0.1, shape: constant, weight_decay: 0, options: {momentum: 0.0}"
SGD = [
    f"optimizers.encoder={{{CONSTANT}, parameters: ['encoder.*', 'projector.*']}}",
    f"optimizers.masker={{{CONSTANT}, parameters: ['masker.*']}}",
]
"""Adam would turn the rounding of a gradient that is zero into a step of full size."""


@pytest.fixture(scope="module", autouse=True)
def adios(install_guest: Callable[[str], Path]) -> Iterator[ModuleType]:
    install_guest("mim-plugin-guest-adios")
    import mim_plugin_guest_adios

    assert "site" in mim_plugin_guest_adios.__file__
    return mim_plugin_guest_adios


def recipe_at(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*TINY, f"output_dir={folder}", *overrides], RegistryWith())


def run(folder: Path, *overrides: str, registry: RegistryWith | None = None) -> Path:
    return train(recipe_at(folder, *overrides), registry or RegistryWith())


def losses_of(run_dir: Path) -> list[tuple[float, float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [(line["encoder/loss"], line["masker/loss"]) for line in lines if "encoder/loss" in line]


def built(tmp_path: Path, *overrides: str) -> tuple[Any, Callable[[str], Step], dict[str, Tensor]]:
    """The objective of a small recipe, its step in a phase, and the views of four images of noise."""
    recipe = recipe_at(tmp_path, *overrides)
    model = build_model(recipe, RegistryWith())
    views = model.views.prepare(None, model.views.example(4))
    return model.objective, lambda phase: make_step(recipe, torch.arange(4), phase=phase), views


# --- masks -----------------------------------------------------------------------------------------------------------


def test_the_soft_masks_of_an_image_sum_to_one_at_every_pixel_and_differ(tmp_path):
    objective, step, views = built(tmp_path)
    soft = objective.masker(step("masker"), views).extra["soft_masks"]
    assert soft.shape == (4, 3, 16, 16)
    assert soft.dtype == torch.float32
    assert torch.allclose(soft.sum(1), torch.ones(4, 16, 16), atol=1e-6)
    assert bool(((soft > 0) & (soft < 1)).all())
    assert min((soft[i] - soft[j]).abs().max() for i in range(4) for j in range(i)) > 0.01
    assert min((soft[:, i] - soft[:, j]).abs().max() for i in range(3) for j in range(i)) > 0.01


def test_pixels_are_darkened_by_the_soft_mask_while_the_bool_mask_hides_nothing(tmp_path):
    objective, step, views = built(tmp_path)
    masked = objective.masker(step("masker"), views)
    soft, occluded = masked.extra["soft_masks"], masked.views["x2"]
    assert occluded.shape == (3 * 4, 3, 16, 16)
    for mask in range(3):
        for image in range(4):
            expected = views["x2"][image] * (1 - soft[image, mask])
            assert torch.equal(occluded[4 * mask + image], expected)
    assert masked.masks["x2"].hidden.dtype == torch.bool
    assert masked.masks["x2"].hidden.shape == (12, 16)
    assert not masked.masks["x2"].hidden.any()
    assert masked.clean("x2") is views["x2"]
    assert masked.views["x"] is views["x"]


def test_the_masks_of_an_image_do_not_depend_on_the_others_of_its_batch(tmp_path):
    objective, step, views = built(tmp_path)
    whole = objective.masker(step("masker"), views).extra["soft_masks"]
    part = objective.masker(step("masker"), {name: view[1:3] for name, view in views.items()}).extra["soft_masks"]
    assert torch.allclose(part, whole[1:3], atol=1e-6)


@pytest.mark.parametrize(
    ("num_blocks", "width", "down", "up"),
    [
        (3, 4, [(3, 8), (8, 8), (8, 8)], [(16, 8), (16, 8), (16, 4)]),
        (4, 4, [(3, 4), (4, 8), (8, 8), (8, 8)], [(16, 8), (16, 8), (16, 4), (8, 4)]),
        (
            6,
            1,
            [(3, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 2)],
            [(4, 2), (4, 2), (4, 1), (2, 1), (2, 1), (2, 1)],
        ),
    ],
)
def test_the_unet_has_the_widths_of_the_official_one(adios, num_blocks, width, down, up):
    """4 and 6 blocks are tables in `src/utils/unet.py`; 3 go on by the same rule."""
    unet = adios.UNet(3, (64, 32), width, num_blocks, 16, "none")
    assert [(block[0].in_channels, block[0].out_channels) for block in unet.down] == down
    assert [(block[0].in_channels, block[0].out_channels) for block in unet.up] == up
    smallest = (64 >> num_blocks - 1) * (32 >> num_blocks - 1) * 2 * width
    assert (unet.mlp[0].in_features, unet.mlp[-2].out_features) == (smallest, smallest)
    assert unet(torch.zeros(2, 3, 64, 32)).shape == (2, width, 64, 32)


def test_a_unet_that_does_not_fit_the_image_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match="masker: adios: num_blocks 4 halves an image 3 times, which 20x20 pixels do not"
    ):
        build_model(recipe_at(tmp_path, "masker.num_blocks=4", "views.img_size=20"), RegistryWith())
    with pytest.raises(RecipeError, match="masker: adios: width 12 is not a multiple of 8"):
        build_model(recipe_at(tmp_path, "masker.width=12"), RegistryWith())


# --- penalty and loss ------------------------------------------------------------------------------------------------


def test_the_penalty_by_hand_is_least_in_the_middle_and_huge_for_trivial_masks(adios):
    penalty = lambda share: adios.sparsity_penalty(torch.tensor([share])).item()  # noqa: E731
    assert penalty(0.5) == pytest.approx(1)
    assert [penalty(1 / 6), penalty(5 / 6)] == pytest.approx([2, 2], rel=1e-6)
    assert penalty(1 / 4) == pytest.approx(math.sqrt(2))
    assert penalty(0.0) == penalty(1.0) == pytest.approx(1e10)
    shares = torch.tensor([[0.5, 1 / 6], [1 / 6, 1 / 6]])
    assert adios.sparsity_penalty(shares).tolist() == pytest.approx([3, 4])


def test_the_penalty_pushes_masks_away_from_all_and_from_nothing(adios):
    shares = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], requires_grad=True)
    adios.sparsity_penalty(shares).backward()
    assert (-shares.grad).sign().tolist() == [1, 1, 0, -1, -1]  # the way in which a step would move each share
    assert shares.grad[0].abs() > 10 * shares.grad[1].abs()


def test_an_embedding_must_find_its_partner_among_all_others(adios):
    """Two images: the partner's similarity is 1, that of the two others 0."""
    images = torch.eye(4)[:2]
    loss = adios.contrastive_loss(images, 3 * images, temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 2)))
    equal = torch.ones(8, 4)
    assert adios.contrastive_loss(equal, equal, temperature=0.5).item() == pytest.approx(math.log(15))


def test_the_penalty_counts_in_the_phase_of_the_masker_and_with_a_minus(tmp_path, adios):
    objective, step, views = built(tmp_path, "masker.sparsity=0.5")
    for_encoder, for_masker = objective(step("encoder"), views), objective(step("masker"), views)
    assert set(for_encoder) == {"contrast"}
    assert set(for_masker) == {"contrast", "sparsity"}
    assert torch.allclose(for_encoder["contrast"], for_masker["contrast"])
    shares = objective.masker.draw(views["x2"]).mean((-2, -1))
    assert for_masker["sparsity"].item() == pytest.approx(-0.5 * adios.sparsity_penalty(shares).mean().item())


def test_a_step_is_the_sum_over_the_masks_of_the_loss_with_each(tmp_path, adios):
    objective, step, views = built(tmp_path)
    nothing = adios.Mask.none(4, objective.encoder.spec.grid)
    embed = lambda images: objective.embed(images, nothing)  # noqa: E731
    by_hand = sum(
        adios.contrastive_loss(embed(views["x"]), embed(views["x2"] * (1 - mask[:, None])), 0.2)
        for mask in objective.masker.draw(views["x2"]).unbind(1)
    )
    assert objective(step("encoder"), views)["contrast"].item() == pytest.approx(by_hand.item(), rel=1e-5)


# --- phases ----------------------------------------------------------------------------------------------------------


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts of the objective of which something changed by a bit."""
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.slow
def test_one_phase_lowers_the_loss_by_the_encoder_and_the_other_raises_it_by_the_masker(tmp_path, adios):
    states, batches = [], []

    class Watched(adios.AdversarialContrast):
        def begin_step(self, step):
            states.append({name: tensor.clone() for name, tensor in self.state_dict().items()})

        def forward(self, step, views):
            batches.append({name: view.clone() for name, view in views.items()})
            return super().forward(step, views)

        def after_step(self, step):
            self.begin_step(step)

    recipe = recipe_at(tmp_path, *SGD, "train.steps=1")
    train(recipe, RegistryWith(Watched))
    start, after_encoder, same, after_masker = states[-4:]
    assert changed(start, after_encoder) == {"encoder", "projector"}
    assert changed(after_encoder, same) == set()
    assert changed(after_encoder, after_masker) == {"masker"}
    assert all(torch.equal(batches[-2][name], view) for name, view in batches[-1].items())

    objective = build_model(recipe, RegistryWith()).objective
    step = make_step(recipe, torch.arange(8), phase="masker")
    losses = []
    for state in (start, after_encoder, after_masker):
        objective.load_state_dict(state)
        parts = objective(step, batches[-1])
        losses.append((parts["contrast"].item(), sum(parts.values()).item()))
    assert losses[1][0] < losses[0][0] - 1e-3
    assert losses[2][1] > losses[1][1] + 1e-4


def test_without_the_penalty_the_masker_drives_the_very_loss_of_the_encoder_up(tmp_path):
    objective, step, views = built(tmp_path, "masker.sparsity=0")
    before = objective(step("masker"), views)["contrast"]
    before.backward()
    with torch.no_grad():
        for parameter in objective.masker.parameters():
            parameter += 0.1 * parameter.grad
    assert objective(step("encoder"), views)["contrast"] > before


def test_the_phase_of_the_encoder_leaves_the_masker_without_gradient(tmp_path):
    objective, step, views = built(tmp_path)
    sum(objective(step("encoder"), views).values()).backward()
    assert all(parameter.grad is None for parameter in objective.masker.parameters())
    assert all(parameter.grad is not None for parameter in objective.encoder.parameters())
    objective.zero_grad()
    sum(objective(step("masker"), views).values()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.masker.parameters())


def test_a_recipe_without_the_two_phases_or_the_masker_is_refused(tmp_path):
    with pytest.raises(MimError, match="nothing to do in phase 'main'; a recipe needs the phases 'encoder' and"):
        train(recipe_at(tmp_path, "phases=[]"), RegistryWith())
    with pytest.raises(RecipeError, match="objective: adios: needs masker 'adios', masker 'none' occludes"):
        build_model(recipe_at(tmp_path, "masker=none"), RegistryWith())
    resnet = ["encoder={type: timm, model: resnet18}", "views.img_size=32", "objective.pool=cls"]
    without_class_token = recipe_at(tmp_path, *resnet)
    with pytest.raises(RecipeError, match="pool 'cls' needs a class token, which encoder 'timm' lacks; use 'mean'"):
        build_model(without_class_token, RegistryWith())


# --- views -----------------------------------------------------------------------------------------------------------


def picture() -> Sample:
    noise = rng.uniform(0, "picture", torch.arange(40), 3 * 30).view(40, 30, 3)
    return Sample((noise * 255).to(torch.uint8).numpy(), "picture")


def test_the_two_views_follow_from_the_row_of_random_numbers_and_from_nothing_else(adios):
    views = adios.TwoViews(adios.TwoViews.Config(img_size=16))
    rand = rng.uniform(0, "views", torch.arange(6), views.num_random)
    first = [views(picture(), row) for row in rand]
    torch.manual_seed(7)
    again = [views(picture(), row) for row in rand]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("x", "x2"))
        assert not torch.equal(one["x"], one["x2"])
        assert (one["x"].shape, one["x"].dtype) == ((3, 16, 16), torch.uint8)
    half = views.num_random // 2
    swapped = views(picture(), rand[0].roll(half))
    assert torch.equal(swapped["x"], first[0]["x2"])
    assert torch.equal(swapped["x2"], first[0]["x"])


def test_without_changes_of_colour_a_view_is_the_crop_of_the_builtin_views(adios):
    plain = {"img_size": 16, "jitter": 0, "grey": 0, "blur": 0}
    views = adios.TwoViews(adios.TwoViews.Config(**plain))
    crops = adios.ImageViews(adios.ImageViews.Config(img_size=16))
    rand = rng.uniform(0, "views", torch.arange(1), views.num_random)[0]
    expected = crops(picture(), rand[: crops.num_random])["x"]
    assert torch.equal(views(picture(), rand)["x"], expected)
    grey = adios.TwoViews(adios.TwoViews.Config(**{**plain, "grey": 1}))(picture(), rand)["x"]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])


def test_a_change_of_colour_by_hand(adios):
    views = adios.TwoViews(adios.TwoViews.Config(brightness=0.5, contrast=0, saturation=0, hue=0, grey=0, blur=0))
    view = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    strength = lambda number: [0.0, 0.0, number, 0.5, 0.5, 0.5, 0.9, 0.9, 0.5]  # noqa: E731
    assert views.change_colors(view, strength(0.0)).unique().tolist() == [50]
    assert views.change_colors(view, strength(0.5)).unique().tolist() == [100]
    assert views.change_colors(view, strength(0.75)).unique().tolist() == [125]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_learns(tmp_path, mode):
    alone = run(tmp_path / "alone", *SGD)
    run_ranks(lambda rank: run(tmp_path / mode, *SGD, f"train.distributed={mode}"))
    together = tmp_path / mode / alone.name
    assert losses_of(together) == [pytest.approx(pair, rel=1e-5) for pair in losses_of(alone)]
    weights, start = weights_of(together), build_model(recipe_at(tmp_path), RegistryWith()).objective.state_dict()
    for name, tensor in weights_of(alone).items():
        assert torch.allclose(weights[name], tensor, atol=2e-6), name
    assert changed(start, weights) == {"encoder", "masker", "projector"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_phases_on_two_ranks_move_their_own_parameters_only(tmp_path, mode, adios):
    class Watched(adios.AdversarialContrast):
        def after_step(self, step):
            shards = {name: getattr(p, "to_local", lambda p=p: p)() for name, p in self.named_parameters()}
            states.append({name: shard.detach().clone() for name, shard in shards.items()})

    states: list[dict[str, Tensor]] = []
    recipe = recipe_at(tmp_path, *SGD, "train.steps=2", f"train.distributed={mode}")

    def on_rank(rank: int) -> list[set[str]]:
        train(recipe, RegistryWith(Watched))
        return [changed(a, b) for a, b in pairwise(states)]

    assert run_ranks(on_rank) == 2 * [[{"masker"}, {"encoder", "projector"}, {"masker"}]]


@pytest.mark.slow
def test_a_few_epochs_on_digits_lower_the_loss_and_leave_masks_that_follow_the_image(tmp_path):
    """A quarter of the recipe's length. Masks that are the same for all images would have no deviation over them."""
    short = [f"output_dir={tmp_path}", "train.epochs=5", "train.device=cpu", "log.tensorboard=false"]
    recipe = load_recipe(QUICKSTART, [*short, "evaluate=[]", "checkpoint.every_epochs=0"], RegistryWith())
    run_dir = train(recipe, RegistryWith())
    losses = [encoder for encoder, _ in losses_of(run_dir)]
    assert losses[-1] < 0.95 * losses[0]

    trained = load_run(run_dir)
    samples = [trained.source.read(index) for index in range(0, 640, 10)]
    rand = rng.uniform(1, "views", torch.arange(64), trained.views.num_random)
    batch = trained.views.collate([trained.views(*pair) for pair in zip(samples, rand, strict=True)])
    view = trained.views.prepare(None, batch)["x2"]
    with torch.no_grad():
        soft = trained.objective.masker.draw(view)
    shares = soft.mean((-2, -1))
    assert bool(((shares.mean(0) > 0.15) & (shares.mean(0) < 0.4)).all())  # of four masks
    assert shares.min() > 0.1
    assert shares.max() < 0.5
    assert soft.std(0).mean() > 0.05  # over images, at the same pixel
    assert soft.std((-2, -1)).mean() > 0.08  # over the pixels of an image
    assert soft.max(1).values.mean() > 0.33  # even masks would have a quarter everywhere
    [judged] = evaluate(["knn"], [run_dir])
    assert judged.numbers["trained"]["knn_top1"] > judged.numbers["untrained"]["knn_top1"] + 0.03


@pytest.mark.fault(row="8")
@pytest.mark.slow
def test_an_adversary_is_no_explosion(tmp_path, figure):
    run_dir = run(tmp_path, "train.steps=300", "train.total_batch_size=32", "optimizers.masker.lr=1e-2")
    losses = losses_of(run_dir)
    assert len(losses) == 300
    assert not (run_dir / "explosions.json").exists()
    highest = max(max(pair) for pair in losses) / losses[0][0]
    figure(
        f"0 alarms in 300 steps of 2 phases with an adversarial masker (ADIOS), highest loss {highest:.1f} x the first"
    )


@pytest.mark.slow
class TestContract(PluginContract):
    plugin = "guest_adios"
    recipes = (QUICKSTART,)  # by name, as it is not installed yet when tests are collected
    overrides = tuple(SIZES)
    accumulates = False  # negatives are those of a micro-batch
