"""iBOT with AttMask as a guest: crops, a teacher that says what to hide and what to predict, centres over ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import interpolate, log_softmax, softmax

from mim_framework.assembly.builder import Model, build_model
from mim_framework.assembly.cost import measure_cost
from mim_framework.assembly.preflight import make_step
from mim_framework.base.errors import RecipeError
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.commands.evaluate import evaluate
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Sample
from mim_framework.contract.step import Step
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import ComponentContract, RecipeContract, RegistryWith, run_ranks
from mim_framework.testing.runs import SHORT, state_of, weights_of
from mim_framework.training.trainer import Trainer, train

QUICKSTART = "ibot_attmask_quickstart"
TINY = [
    "encoder.embed_dim=16", "encoder.depth=2", "encoder.num_heads=2",
    "objective.out_dim=12", "objective.hidden_dim=16", "objective.bottleneck_dim=8",
    *SHORT,
]  # fmt: skip
SGD = "optim={type: momentum, lr: 0.1, shape: constant, weight_decay: 0, options: {momentum: 0.0}}"
GLOBAL, LOCAL = ("x", "x2"), ("local1", "local2")
GRID = Grid((4, 4))


@pytest.fixture(scope="module", autouse=True)
def ibot(install_guest: Callable[[str], Path]) -> ModuleType:
    site = install_guest("mim-plugin-guest-ibot")
    import mim_plugin_guest_ibot

    assert mim_plugin_guest_ibot.__file__.startswith(str(site))
    return mim_plugin_guest_ibot


class TestComponents(ComponentContract):
    plugin = "guest_ibot"


def test_the_recipe_clips_every_parameter_by_itself():
    optim = load_recipe("ibot_attmask", [], RegistryWith()).optim
    assert (optim.clip_grad_norm, optim.clip_grad_norm_per_parameter) == (None, 3.0)


@pytest.mark.slow
class TestRecipes(RecipeContract):
    plugin = "guest_ibot"
    recipes = (QUICKSTART,)


def recipe_at(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*TINY, f"output_dir={folder}", *overrides], RegistryWith())


def trained(folder: Path, *overrides: str, before: Callable[[Trainer], Any] = lambda trainer: None) -> Trainer:
    """A small run that has come to its end; `before(trainer)` is called at its beginning."""
    with Trainer.opened(recipe_at(folder, *overrides), RegistryWith()) as trainer:
        before(trainer)
        trainer.fit()
        return trainer


def built(tmp_path: Path, *overrides: str, batch_size: int = 6) -> tuple[Model, Step, dict[str, Tensor]]:
    """A model whose teacher is not the student, a step, and views of noise."""
    recipe = recipe_at(tmp_path, *overrides)
    model = build_model(recipe, RegistryWith())
    torch.manual_seed(0)
    for parameter in model.teachers.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    step = make_step(recipe, torch.arange(batch_size), total=9, teachers=model.teachers.session())
    return model, step, model.views.prepare(step, model.views.example(batch_size))


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


# --- crops -----------------------------------------------------------------------------------------------------------


def views_of(ibot: ModuleType, **options: Any) -> Any:
    defaults = {"img_size": 16, "local_size": 8, "num_local": 2}
    return ibot.MultiCropViews(ibot.MultiCropViews.Config(**{**defaults, **options}))


def picture(seed: int = 0) -> Sample:
    pixels = torch.randint(0, 256, (40, 30, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Sample(pixels.numpy(), "noise")


def test_every_crop_has_its_own_size_and_its_own_part_of_the_numbers(ibot):
    views = views_of(ibot)
    generator = torch.Generator().manual_seed(1)
    rand, other = (torch.rand(views.num_random, generator=generator) for _ in range(2))
    crops = views(picture(), rand)
    assert {name: tuple(crop.shape) for name, crop in crops.items()} == {
        "x": (3, 16, 16), "x2": (3, 16, 16), "local1": (3, 8, 8), "local2": (3, 8, 8),
    }  # fmt: skip
    assert {name: spec.shape for name, spec in views.specs.items()} == {n: tuple(c.shape) for n, c in crops.items()}
    part = views.num_random // 4
    for number, changed in enumerate(crops):
        mixed = rand.clone()
        mixed[number * part : (number + 1) * part] = other[number * part : (number + 1) * part]
        again = views(picture(), mixed)
        assert {name for name in crops if not torch.equal(crops[name], again[name])} == {changed}


def test_crops_draw_nothing_from_the_global_generator(ibot):
    before = torch.get_rng_state()
    views = views_of(ibot)
    for seed in range(8):  # so that every augmentation is made once
        views(picture(seed), torch.rand(views.num_random, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(torch.get_rng_state(), before)


def plain(value: int) -> Sample:
    """A grey picture of one value."""
    return Sample(torch.full((20, 20, 3), value, dtype=torch.uint8).numpy(), "plain")


def test_only_the_second_global_crop_is_solarized(ibot):
    views = views_of(ibot, solarize=1.0, jitter=0, grayscale=0, blur=[0, 0, 0])
    crops = views(plain(200), torch.zeros(views.num_random))
    assert {name: crop.unique().tolist() for name, crop in crops.items()} == {
        "x": [200], "x2": [55], "local1": [200], "local2": [200],
    }  # fmt: skip


def test_brightness_by_hand(ibot):
    """A grey picture has no contrast, saturation or hue to change: what is left of the jitter is a factor of 1.2."""
    views = views_of(ibot, jitter=1.0, color_jitter=[0.4, 0.4, 0.2, 0.1], grayscale=0.0, blur=[0, 0, 0], solarize=0)
    part = views.num_random // 4
    rand = torch.full((views.num_random,), 0.75)
    assert views(plain(100), rand)["local1"].unique().tolist() == [120]
    rand[part - ibot.views.NUM_AUGMENT_RANDOM] = 0.0  # the factor of brightness of the first crop
    assert views(plain(100), rand)["x"].unique().tolist() == [60]
    assert views(plain(100), rand)["x2"].unique().tolist() == [120]


def test_blur_keeps_the_mean_and_takes_the_contrast_away(ibot):
    views = views_of(ibot, jitter=0, grayscale=0, blur=[1, 0, 0], blur_sigma=[2, 2], solarize=0, flip=0, scale=[1, 1])
    stripes = torch.zeros(16, 16, 3, dtype=torch.uint8)
    stripes[:, ::2] = 200
    crops = views(Sample(stripes.numpy(), "stripes"), torch.full((views.num_random,), 0.5))
    assert crops["x"].float().mean() == pytest.approx(100, abs=2)
    assert crops["x"].float().std() < 0.1 * crops["x2"].float().std()


def test_options_that_make_no_sense_are_refused(ibot):
    with pytest.raises(ValueError, match=r"'local_scale' must be \[smallest, largest\], got \[0.5, 0.2\]"):
        views_of(ibot, local_scale=[0.5, 0.2])
    with pytest.raises(ValueError, match="'local_size' must be below 'img_size', 16, got 16"):
        views_of(ibot, local_size=16)
    with pytest.raises(ValueError, match=r"'mask_ratio' must be \[smallest, largest\] in \[0, 1\), got \[0.6, 0.2\]"):
        ibot.AttMask.Config(mask_ratio=[0.6, 0.2])
    with pytest.raises(ValueError, match="'teacher_temp' must stay above 0, got 0"):
        ibot.SelfDistillation.Config(teacher_temp={"shape": "linear", "from": 0.04, "to": 0.0})


# --- encoder ---------------------------------------------------------------------------------------------------------


def test_positions_are_resized_for_a_smaller_crop(tmp_path):
    encoder = built(tmp_path)[0].objective.encoder
    cls_token, patches = encoder.pos_embed[:, :1], encoder.pos_embed[:, 1:]
    image = patches.transpose(1, 2).unflatten(2, (4, 4))
    expected = interpolate(image, (2, 2), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    found = encoder.positions(Grid((2, 2)))
    assert torch.equal(found[:, :1], cls_token)
    assert torch.allclose(found[:, 1:], expected, atol=1e-6)
    assert encoder.positions(GRID) is encoder.pos_embed


def test_local_crops_go_through_the_same_encoder_on_their_own_grid(tmp_path):
    model, _, views = built(tmp_path)
    latent = model.objective.encoder(views["local1"], Mask.none(6, Grid((3, 3))))
    assert (latent.tokens.shape, latent.grid) == ((6, 9, 16), Grid((3, 3)))


def test_the_pixels_of_a_hidden_patch_do_not_matter_and_those_of_others_do(tmp_path):
    model, _, views = built(tmp_path)
    encoder, x = model.objective.encoder, views["x"]
    hidden = torch.zeros(6, 16, dtype=torch.bool)
    hidden[:, 5] = True
    noisy, other = x.clone(), x.clone()
    noisy[:, :, 4:8, 4:8] += 1
    other[:, :, :4, :4] += 1
    mask = Mask(hidden, GRID)
    assert torch.equal(encoder(x, mask).tokens, encoder(noisy, mask).tokens)
    assert not torch.equal(encoder(x, mask).tokens, encoder(other, mask).tokens)


def test_the_attention_that_is_handed_out_is_the_one_that_is_used(tmp_path):
    attention = built(tmp_path)[0].objective.encoder.blocks[0].attn
    x = torch.randn(2, 5, 16)
    mixed, (query, key, _) = attention(x)
    value = attention.qkv(x)[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    weights = attention.weights(query, key)
    assert torch.allclose(attention.proj((weights @ value).transpose(1, 2).flatten(2)), mixed, atol=1e-6)


def test_a_crop_that_is_no_whole_number_of_patches_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="image size 10x10 is not a multiple of patch_size 4"):
        built(tmp_path, "views.local_size=10")


# --- masks -----------------------------------------------------------------------------------------------------------


def test_the_most_attended_patches_by_hand(ibot):
    attention = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.1, 0.1]])
    found = ibot.most_attended(attention, torch.tensor([[2], [1]]))
    assert found.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_some_candidates_by_hand(ibot):
    candidates = torch.tensor([[True, True, False, True], [True, False, False, True]])
    noise = torch.tensor([[0.9, 0.2, 0.0, 0.5], [0.3, 0.1, 0.2, 0.4]])
    found = ibot.some_of(candidates, noise, torch.tensor([[2], [0]]))
    assert found.tolist() == [[False, True, False, True], [False] * 4]


class HandMade:
    """A teacher with the attention that a test gives it: 2 heads, the class token's row (heads, N) for all images."""

    def __init__(self, attention: Tensor) -> None:
        self.attention = attention

    def encode(self, name: str, view: Tensor, mask: Mask | None = None) -> Any:
        full = torch.rand(len(view), 2, 17, 17)  # of other tokens, which must not matter
        full[:, :, 0, 1:] = self.attention
        return type("Latent", (), {"attn": {1: full}})()


def masks_of(tmp_path: Path, attention: Tensor, num_images: int, *overrides: str) -> tuple[Any, dict[str, Tensor]]:
    recipe = recipe_at(tmp_path, *overrides)
    masker = build_model(recipe, RegistryWith()).objective.masker
    step = make_step(recipe, torch.arange(num_images), teachers=HandMade(attention))
    views = {name: torch.zeros(num_images, 3, 16, 16) for name in GLOBAL}
    masks = masker(step, views).masks
    assert masks.keys() == set(GLOBAL)
    for mask in masks.values():
        mask.validate()
    return masker, {name: mask.hidden for name, mask in masks.items()}


def test_without_hints_exactly_the_most_attended_are_hidden_in_the_mean_over_heads(tmp_path):
    one_head, mean = torch.arange(16.0), torch.arange(16.0).flip(0)
    attention = torch.stack([one_head, 2 * mean - one_head])  # the first head alone would say the opposite
    _, masks = masks_of(tmp_path, attention, 200, "masker.show_max=0", "masker.mask_prob=1")
    for hidden in masks.values():
        counts = hidden.sum(1)
        assert torch.equal(hidden, torch.arange(16) < counts[:, None])
        assert (int(counts.min()), int(counts.max())) == (1, 7)  # 0.1 and nearly 0.5 of 16
        assert len(counts.unique()) == 7


def test_half_of_the_crops_have_no_hidden_patch(tmp_path):
    masker, masks = masks_of(tmp_path, torch.rand(2, 16), 2000, "masker.show_max=0")
    for hidden in masks.values():
        assert hidden.any(1).float().mean() == pytest.approx(0.5, abs=0.04)
        assert hidden.sum(1).float().mean() == pytest.approx(masker.spec.num_hidden, abs=0.5)
    assert not torch.equal(masks["x"], masks["x2"])


def test_hints_are_shown_among_the_very_first_and_nothing_else_is(tmp_path):
    """Of 16 patches the first 8 are candidates; as many are shown as are half of the hidden ones, by chance."""
    order = torch.arange(16.0).flip(0)
    options = ["masker.mask_prob=1", "masker.mask_ratio=[0.5, 0.75]"]
    _, without = masks_of(tmp_path, order.expand(2, 16), 200, *options, "masker.show_max=0")
    _, masks = masks_of(tmp_path, order.expand(2, 16), 200, *options, "masker.show_max=0.5")
    for name, hidden in masks.items():
        shown = without[name] & ~hidden
        assert not (hidden & ~without[name]).any()
        assert not shown[:, 8:].any()
        expected = without[name].sum(1) // 2  # int(0.5 * ratio * 16), of int(ratio * 16) hidden
        assert torch.equal(shown.sum(1), expected)
        assert len(shown.unique(dim=0)) > 50
        assert shown[:, :8].any(0).all()


def test_in_a_real_step_what_the_teacher_attends_to_is_hidden(tmp_path, monkeypatch, ibot):
    seen = []

    def recorded(self, step, name, view):
        mask = original(self, step, name, view)
        if step.total > 1:  # not in the preflight
            attention = step.teacher("teacher", view).attn[self.layer][:, :, 0, 1:].mean(1)
            seen.append((attention, mask.hidden))
        return mask

    original = ibot.AttMask.mask
    monkeypatch.setattr(ibot.AttMask, "mask", recorded)
    trained(tmp_path, "masker.show_max=0", "masker.mask_prob=1")
    assert len(seen) == 3 * len(GLOBAL)
    for attention, hidden in seen:
        assert (hidden.sum(1) >= 1).all()
        for row, mask in zip(attention, hidden, strict=True):
            assert row[mask].min() >= row[~mask].max()


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_plain_loops_over_other_crops_and_over_hidden_patches(tmp_path):
    model, step, views = built(tmp_path, "objective.student_temp=0.2", "masker.mask_ratio=[0.3, 0.6]")
    objective, teacher = model.objective, model.teachers["teacher"]
    objective.center.copy_(torch.randn(2, 12) / 10)
    losses = objective(step, views)
    masks = objective.masker(step, views).masks
    assert {bool(row.any()) for mask in masks.values() for row in mask.hidden} == {True, False}

    def scores(encoder, head, view, mask=None):
        latent = encoder(view, mask or Mask.none(len(view), Grid(tuple(n // 4 for n in view.shape[-2:]))))
        return head(latent.prefix[:, 0]), head(latent.tokens)

    cls_losses, patch_losses = [], []
    for q in GLOBAL:
        cls, patches = scores(teacher.part("encoder"), teacher.part("head"), views[q])
        cls_probs = softmax((cls - objective.center[0]) / 0.01, -1)  # the beginning of the recipe's warm-up
        patch_probs = softmax((patches - objective.center[1]) / 0.01, -1)
        for v in (*GLOBAL, *LOCAL):
            student_cls, student = scores(objective.encoder, objective.head, views[v], masks.get(v))
            if v != q:
                for image in range(6):
                    cls_losses.append(-(cls_probs[image] * log_softmax(student_cls[image] / 0.2, -1)).sum())
                continue
            for image in range(6):
                hidden = masks[v].hidden[image].nonzero().flatten().tolist()
                each = [-(patch_probs[image, n] * log_softmax(student[image, n] / 0.2, -1)).sum() for n in hidden]
                patch_losses.append(sum(each) / max(1, len(each)))
    assert len(cls_losses) == 6 * (2 * 4 - 2)
    assert losses["cls"].item() == pytest.approx(sum(cls_losses).item() / len(cls_losses), rel=1e-5)
    assert losses["patch"].item() == pytest.approx(sum(patch_losses).item() / len(patch_losses), rel=1e-5)


def test_an_image_without_hidden_patches_counts_as_zero(tmp_path):
    objective = built(tmp_path)[0].objective
    scores, probs = torch.zeros(2, 4, 12), torch.full((2, 4, 12), 1 / 12)
    where = torch.tensor([[True, True, False, False], [False] * 4])
    assert objective.patch_loss(scores, probs, where).item() == pytest.approx(math.log(12) / 2)


def test_without_masks_there_is_no_patch_loss_and_training_goes_on(tmp_path):
    lines = lines_of(trained(tmp_path, "masker.mask_prob=0").run.dir)
    assert [line["loss/patch"] for line in lines] == [0.0] * 3
    assert all(line["loss/cls"] > 0 for line in lines)


CASES = sorted((Path(__file__).parent / "data").glob("attmask-masks_*.safetensors"))
"""Masks of the official code (gkakogeorgiou/attmask at 9f62061), with the attention and the draws behind them."""


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_masks_of_attention_are_the_official_ones_for_the_official_draws(ibot, case):
    with safe_open(case, "pt") as file:
        calls = json.loads(file.metadata()["calls"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    attention = tensors["input/attention"]
    num_patches = attention.shape[1]
    for call in calls:
        key, mode = call["key"], call["mode"]
        order = -attention if mode == "low" else attention
        hidden = ibot.most_attended(order, int(call["masking_ratio"] * num_patches))
        hidden &= tensors[f"input/uniform/{key}"][:, None] < call["masking_prob"]
        if mode == "hint":
            candidates = ibot.most_attended(attention, int(call["show_max"] * num_patches))
            assert torch.equal(candidates, tensors[f"out/candidates/{key}"].bool()), key
            revealed = tensors[f"input/revealed/{key}"]
            noise = torch.full_like(attention, 0.5).scatter(1, revealed, 0.1)  # the official draws come first
            count = torch.full((len(attention), 1), call["show_ratio"] * num_patches).long()
            shown = ibot.some_of(candidates, noise, count)
            assert torch.equal(shown.nonzero()[:, 1].reshape(revealed.shape), revealed.sort(dim=1).values), key
            hidden &= ~shown
        assert torch.equal(hidden, tensors[f"out/mask/{key}"].bool()), key
    assert {call["mode"] for call in calls} == {"high", "low", "hint"}
    assert len(CASES) == 2


# --- teacher ---------------------------------------------------------------------------------------------------------


def test_the_teacher_passes_over_every_global_crop_once_for_masks_and_targets(tmp_path):
    seen = []

    def count(trainer):
        encoder = trainer.teachers["teacher"].part("encoder")
        encoder.register_forward_hook(lambda module, arguments, latent: seen.append(tuple(arguments[0].shape)))

    trained(tmp_path, "train.batch_size=4", before=count)
    micro_batches = 3 * 2
    assert seen == [(4, 3, 16, 16)] * len(GLOBAL) * micro_batches


def test_the_teacher_gets_no_gradient_and_moves_by_its_momentum_alone(tmp_path):
    states, teachers = [], []

    def watch(trainer):
        model, update = trainer.objective, trainer.teachers.update
        parts = {"encoder": model.encoder, "head": model.head}
        teachers.append(trainer.teachers["teacher"])

        def recorded(step, objective):
            update(step, objective)
            student = {path: state_of(part) for path, part in parts.items()}
            states.append((student, {path: state_of(teachers[0].part(path)) for path in parts}))

        trainer.teachers.update = recorded

    trained(tmp_path, "teachers.teacher.momentum={shape: linear, from: 0.4, to: 1.0}", before=watch)
    assert all(p.grad is None and not p.requires_grad for p in teachers[0].parameters())
    assert len(states) == 3
    for index, ((_, before), (student, after)) in enumerate(pairwise(states), start=1):
        momentum = 0.4 + 0.6 * index / 3
        for path in ("encoder", "head"):
            for name, tensor in after[path].items():
                expected = momentum * before[path][name] + (1 - momentum) * student[path][name]
                assert torch.allclose(tensor, expected, atol=1e-6), name
            assert any(not torch.equal(student[path][name], tensor) for name, tensor in after[path].items())


def test_the_teacher_is_asked_for_its_attention_alone(tmp_path):
    assert built(tmp_path)[0].teachers["teacher"].ask == Ask(attn=frozenset({1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teachers={}", "no teacher 'teacher'; the teachers of this recipe are none"),
        ("teachers.teacher.copy=[encoder]", "teacher 'teacher' copies encoder, 'head' is asked for too"),
        ("masker=random", "masker 'random' masks x of x, x2, local1, local2"),
        ("views={type: image, img_size: 16}", "masker 'attmask' masks x of x"),
        ("encoder={type: mae_vit, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}", "'attmask' and encoder"),
    ],
)
def test_a_recipe_that_lacks_what_the_method_needs_is_refused(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        trained(tmp_path, change)


# --- centre ----------------------------------------------------------------------------------------------------------


def test_the_centres_follow_the_mean_scores_of_a_whole_step(tmp_path, monkeypatch, ibot):
    """By hand, over two crops and two micro-batches; the preflight leaves no trace."""
    scores, centers = [], []

    def watch(trainer):
        head = trainer.teachers["teacher"].part("head")
        head.register_forward_hook(lambda module, arguments, output: scores.append(output.detach().clone()))

    original = ibot.SelfDistillation.after_step

    def recorded(self, step):
        original(self, step)
        centers.append(self.center.clone())

    monkeypatch.setattr(ibot.SelfDistillation, "after_step", recorded)
    trained(tmp_path, "train.batch_size=4", "objective.patch_center_momentum=0.6", before=watch)
    assert (len(scores), len(centers)) == (3 * 2 * 2, 3)
    cls, patch = torch.zeros(12), torch.zeros(12)
    for index, center in enumerate(centers):
        step = torch.cat(scores[4 * index : 4 * index + 4])
        cls = 0.9 * cls + 0.1 * step[:, 0].mean(0)
        patch = 0.6 * patch + 0.4 * step[:, 1:].mean((0, 1))
        assert torch.allclose(center, torch.stack([cls, patch]), atol=1e-6)
    assert (centers[-1].abs() > 1e-3).any(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_have_one_centre_and_it_is_that_of_one_rank(tmp_path, mode):
    """Each rank sees other images; weights and teachers agree too."""
    alone = trained(tmp_path / "alone", SGD)

    def rank_main(rank: int) -> tuple[Tensor, Tensor]:
        trainer = trained(tmp_path / "ranks", SGD, f"train.distributed={mode}", "train.batch_size=2")
        return trainer.objective.center.clone(), trainer.objective.mean_score.clone()

    (first, scores), (second, other_scores) = run_ranks(rank_main)
    assert torch.equal(first, second)
    assert not torch.allclose(scores, other_scores, atol=1e-4)
    assert torch.allclose(first, alone.objective.center, atol=1e-6)
    for group in ("model", "teachers"):
        together = weights_of(tmp_path / "ranks" / QUICKSTART, group)
        for name, tensor in weights_of(alone.run.dir, group).items():
            assert torch.allclose(together[name], tensor, rtol=0, atol=2e-6), name


@pytest.mark.slow
def test_centring_prevents_the_collapse_to_one_prototype(tmp_path):
    """The same run twice; without centres the teacher soon gives the same answer to every image."""
    options = [
        "encoder.embed_dim=32", "encoder.init_std=0.18", "objective.out_dim=32", "train.steps=120",
        "train.total_batch_size=16", "log.every_steps=20", "objective.freeze_last_layer=0",
        "objective.teacher_temp=0.04", "objective.teacher_patch_temp=0.04",
        "optim={type: adamw, lr: 5e-4, shape: constant}", "teachers.teacher.momentum=0.98",
    ]  # fmt: skip
    entropies = {}
    for name, momentum in (("centred", 0.9), ("not_centred", 1.0)):
        centres = [f"objective.center_momentum={momentum}", f"objective.patch_center_momentum={momentum}"]
        run_dir = trained(tmp_path / name, *options, *centres).run.dir
        entropies[name] = [line["ibot/entropy_of_mean"] for line in lines_of(run_dir)]
    assert min(entropies["centred"]) > 0.5 * math.log(32)
    assert entropies["centred"][-1] > entropies["centred"][0]
    assert entropies["not_centred"][-1] < 0.1


# --- schedules and training ------------------------------------------------------------------------------------------


def official_cosine(base: float, final: float, steps: int, warmup: int = 0) -> list[float]:
    """A line from 0 that ends with the full value, then half a cosine (iBOT, utils.py)."""
    line = [base * i / (warmup - 1) for i in range(warmup)]
    rest = steps - warmup
    return line + [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def test_the_schedules_of_the_full_recipe_are_the_official_ones_at_every_step():
    recipe = load_recipe("ibot_attmask", [], RegistryWith())
    epochs, per_epoch = 100, 5
    at = [epoch_of(index, per_epoch) for index in range(epochs * per_epoch)]
    values = lambda curve: [value_at(curve, epoch, epochs, per_epoch) for epoch in at]  # noqa: E731
    assert values(recipe.optim.weight_decay) == pytest.approx(official_cosine(0.04, 0.4, 500), rel=1e-9)
    assert values(recipe.teachers["teacher"].momentum) == pytest.approx(official_cosine(0.996, 1.0, 500), rel=1e-9)
    rates = official_cosine(5e-4 * 240 / 256, 1e-6, 500, warmup=50)
    assert values(recipe.optim.lr_curve(240)) == pytest.approx(rates, rel=1e-9)
    for ends, curve in (((0.04, 0.4), recipe.optim.weight_decay), ((0.996, 1), recipe.teachers["teacher"].momentum)):
        assert (value_at(curve, 0, epochs), value_at(curve, epochs, epochs)) == pytest.approx(ends)


@pytest.mark.slow
def test_the_full_recipe_fits_together_and_its_encoder_has_the_size_of_vit_small():
    """Counted on the meta device, through a step of two and ten crops."""
    cost = measure_cost(load_recipe("ibot_attmask", [], RegistryWith()), RegistryWith())
    with torch.device("meta"):
        vit_small = timm.create_model("vit_small_patch16_224", num_classes=0)
    assert cost.parameters["encoder"] == sum(p.numel() for p in vit_small.parameters()) + 384  # and a mask token
    assert cost.parameters["head"] == 385 * 2048 + 2049 * 2048 + 2049 * 256 + 8192 * 257
    assert cost.parameters["teachers"] == cost.parameters["encoder"] + cost.parameters["head"]


def test_temperatures_end_where_the_official_ones_do(ibot):
    """Officially they rise by equal amounts from epoch to epoch, and have arrived in the thirtieth."""
    config = ibot.SelfDistillation.Config()
    for curve in (config.teacher_temp, config.teacher_patch_temp):
        assert value_at(curve, 0, 100) == 0.04
        assert [value_at(curve, epoch, 100) for epoch in (30, 50, 99.9)] == [0.07] * 3
        official = [0.04 + 0.03 * min(epoch, 29) / 29 for epoch in range(100)]
        assert [value_at(curve, epoch, 100) for epoch in range(100)] == pytest.approx(official, abs=0.03 / 29)


def test_the_scheduled_values_are_in_force(tmp_path, monkeypatch, ibot):
    """Weight decay in the optimizer, temperature in the teacher's distributions."""
    decays, temps = [], []

    def watch(trainer):
        schedule = trainer.optimizers["main"].schedule

        def recorded(step):
            schedule(step)
            decays.append([group["weight_decay"] for group in trainer.optimizers["main"].optimizer.param_groups])

        trainer.optimizers["main"].schedule = recorded

    original = ibot.softmax

    def recorded_softmax(x, dim):
        temps.append(x)
        return original(x, dim)

    trainer = trained(tmp_path, before=watch)
    assert [max(each) for each in decays] == pytest.approx(official_cosine(0.04, 0.4, 3))
    assert {min(each) for each in decays} == {0.0}  # of biases and norms
    model, objective = trainer.run.model, trainer.objective
    views = model.views.prepare(None, model.views.example(4))
    monkeypatch.setattr(ibot, "softmax", recorded_softmax)
    for epoch in (0.0, 5.0, 20.0):
        step = make_step(
            trainer.run.recipe, torch.arange(4), epoch=epoch, epochs=30.0, teachers=model.teachers.session()
        )
        objective.teach(step, views["x"])
    for scores in (temps[::2], temps[1::2]):  # of class tokens, of patches
        ratios = [(scores[0] / each).nanmedian().item() for each in scores]
        assert ratios == pytest.approx([1, 0.0125 / 0.01, 0.015 / 0.01], rel=1e-4)


def test_the_prototypes_are_frozen_for_the_first_epoch_against_decay_too(tmp_path):
    def run(name: str, epochs: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        before: dict[str, Tensor] = {}
        options = [f"objective.freeze_last_layer={epochs}", "optim.warmup_epochs=0"]
        trainer = trained(tmp_path / name, *options, before=lambda trainer: before.update(state_of(trainer.objective)))
        return before, state_of(trainer.objective)

    for name, epochs, moves in (("frozen", 1, False), ("free", 0, True)):
        before, after = run(name, epochs)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert ("head.last_layer.direction" in changed) == moves
        assert "head.mlp.0.weight" in changed


def test_prototypes_have_length_one_or_one_that_is_learned(ibot):
    layer = ibot.WeightNormLinear(3, 5, learned_length=True)
    x = torch.randn(7, 3)
    directions = layer.direction / layer.direction.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x), x @ directions.T, atol=1e-6)
    layer.length.data.fill_(2.0)
    assert torch.allclose(layer(x), 2 * x @ directions.T, atol=1e-6)
    assert [name for name, _ in ibot.WeightNormLinear(3, 5, learned_length=False).named_parameters()] == ["direction"]


@pytest.mark.slow
def test_digits_are_learned(tmp_path):
    """Half of the recipe, with warm-ups of half their length; what the whole of it brings is in the README."""
    warm_ups = ["optim", "objective.teacher_temp", "objective.teacher_patch_temp"]
    options = [
        "train.epochs=15", *(f"{each}.warmup_epochs=5" for each in warm_ups), "train.device=cpu", "log.every_steps=44",
        "evaluate=[]", "checkpoint.every_epochs=0", f"output_dir={tmp_path}",
    ]  # fmt: skip
    run_dir = train(load_recipe(QUICKSTART, options, RegistryWith()), RegistryWith())
    losses = [line["loss"] for line in lines_of(run_dir)]
    assert losses[-1] < 0.8 * losses[0]
    [judged] = evaluate(["knn"], [run_dir], ["knn.pool=cls"])
    assert judged.numbers["trained"]["knn_top1"] > judged.numbers["untrained"]["knn_top1"] + 0.1


@pytest.mark.fault(row="8")
@pytest.mark.slow
def test_a_momentum_teacher_is_no_explosion(tmp_path, figure):
    trainer = trained(tmp_path, "train.steps=300", "train.total_batch_size=16")
    assert not (trainer.run.dir / "explosions.json").exists()
    losses = [line["loss"] for line in lines_of(trainer.run.dir)]
    assert len(losses) == 300
    highest = max(losses) / losses[0]
    figure(f"0 alarms in 300 steps with a momentum teacher (iBOT), highest loss {highest:.1f} x the first")
