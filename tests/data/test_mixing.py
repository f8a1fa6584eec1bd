"""Mixup and CutMix against timm's, and by hand; the draws belong to the step."""

from __future__ import annotations

from statistics import fmean, pvariance
from unittest.mock import patch

import pytest
import torch
from timm.data.mixup import Mixup

from mim_framework.base import rng
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import ViewSpec
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.data.mixing import BETA_TRIES, Mix, Mixing, MixOfEach, beta, cut_mix, neighbours, uniform_of_step
from mim_framework.data.views import ImageViews

IMAGES = torch.rand(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))


def timm_mix(share: float, *, cut: bool, smoothing: float, centre: tuple[int, int] = (0, 0)):
    """What timm makes of two images, whose partners are each other's neighbours too, and of the labels 0 and 2."""
    mixup = Mixup(0.8, 1.0, label_smoothing=smoothing, num_classes=4)
    mixup._params_per_batch = lambda: (share, cut)
    with patch("numpy.random.randint", side_effect=centre):
        return mixup(IMAGES.clone(), torch.tensor([0, 2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_that_of_timm(smoothing: float):
    images, labels = timm_mix(0.3, cut=False, smoothing=smoothing)
    mix = Mix(0.3)
    assert torch.allclose(mix.images(IMAGES), images, atol=1e-7)
    assert torch.allclose(mix.labels(torch.tensor([0, 2]), 4, smoothing), labels, atol=1e-7)


@pytest.mark.parametrize("centre", [(0, 0), (6, 9), (3, 5), (6, 1)])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_cutmix_is_that_of_timm_also_at_the_border(share: float, centre: tuple[int, int]):
    images, labels = timm_mix(share, cut=True, smoothing=0.1, centre=centre)
    mix = cut_mix(share, (centre[0] + 0.5) / 7, (centre[1] + 0.5) / 10, 7, 10)
    assert torch.equal(mix.images(IMAGES), images)
    assert torch.allclose(mix.labels(torch.tensor([0, 2]), 4, 0.1), labels, atol=1e-7)


def test_cutmix_by_hand():
    """A box of half the sides around the corner: only its last quarter lies in the image, one pixel of 16."""
    mix = cut_mix(0.75, 0.0, 0.0, 4, 4)
    assert mix == Mix(15 / 16, (0, 1), (0, 1))
    ones = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    mixed = mix.images(ones)
    assert mixed[0].flatten().tolist() == [1.0] + [0.0] * 15
    assert mixed[1].flatten().tolist() == [0.0] + [1.0] * 15
    assert mix.labels(torch.tensor([0, 1]), 2, 0.0).tolist() == [[15 / 16, 1 / 16], [1 / 16, 15 / 16]]


def test_neighbours_are_exchanged():
    assert neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_a_mix_of_nothing_is_no_change():
    assert Mix().images(IMAGES) is IMAGES
    assert Mix().labels(torch.tensor([1]), 2, 0.5).tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_shares_have_the_mean_and_variance_of_the_beta_distribution(alpha: float):
    rows = rng.uniform(0, "test", torch.arange(4000), 2 * BETA_TRIES).tolist()
    shares = [beta(alpha, row) for row in rows]
    assert fmean(shares) == pytest.approx(0.5, abs=0.02)
    assert pvariance(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_probabilities_decide_between_mixup_cutmix_and_nothing():
    def counts(**options):
        drawn = [Mixing(0.8, 1.0, **options).draw(0, step, 8, 8) for step in range(400)]
        cut = sum(mix.rows is not None for mix in drawn)
        return cut, sum(mix == Mix() for mix in drawn), len(drawn) - cut

    assert counts(switch_prob=1.0)[0] == 400
    assert counts(switch_prob=0.0)[0] == 0
    assert counts(mixup_prob=0.0)[1] == 400
    cut, unmixed, _ = counts(mixup_prob=0.5, switch_prob=0.25)
    assert unmixed == pytest.approx(200, abs=40)
    assert cut == pytest.approx(50, abs=25)
    assert Mixing(cutmix=1.0).draw(0, 0, 8, 8).rows is not None
    assert Mixing(mixup=1.0, switch_prob=1.0).draw(0, 0, 8, 8).rows is None


def test_a_step_draws_the_same_on_any_rank_and_others_draw_anew():
    assert uniform_of_step(3, 7) == uniform_of_step(3, 7)
    assert len({tuple(uniform_of_step(3, step)) for step in range(10)}) == 10
    assert uniform_of_step(4, 7) != uniform_of_step(3, 7)


# --- views -----------------------------------------------------------------------------------------------------------


def views_of(num_classes: int = 4, **options) -> ImageViews:
    views = ImageViews(ImageViews.Config(img_size=8, mean=(0, 0, 0), std=(1, 1, 1), **options))
    if views.mixes_labels:
        views.label_spec(ViewSpec.of_kind("labels", "label", num_classes=num_classes))
    return views


def step(index: int, positions: torch.Tensor) -> Step:
    return Step(index, 10, 0.0, 1.0, positions, 0, World())


def test_views_mix_in_training_and_only_there():
    views = views_of(mixup=0.8, cutmix=1.0)
    batch = {"x": (IMAGES[..., :7] * 255).byte(), "label": torch.tensor([0, 3])}
    plain = views_of().prepare(None, batch)
    assert torch.equal(views.prepare(None, batch)["x"], plain["x"])
    assert torch.equal(views.prepare(None, batch)["label"], batch["label"])
    unlabelled = views.prepare(step(1, torch.arange(2)), {"x": batch["x"]})
    assert torch.equal(unlabelled["x"], plain["x"])
    mixed = views.prepare(step(1, torch.arange(2)), batch)
    mix = views.mixing.draw(0, 1, 7, 7)
    assert torch.equal(mixed["x"], mix.images(plain["x"]))
    assert mixed["label"].sum(1).tolist() == pytest.approx([1, 1])
    assert mixed["label"][0, 0] == pytest.approx(mix.share)


def test_any_even_micro_batch_gives_the_same_mixed_images():
    views = views_of(mixup=1.0)
    batch = {"x": torch.randint(256, (8, 3, 8, 8)).byte(), "label": torch.arange(8) % 4}
    whole = views.prepare(step(2, torch.arange(8)), batch)
    for start in range(0, 8, 2):
        part = {name: tensor[start : start + 2] for name, tensor in batch.items()}
        prepared = views.prepare(step(2, torch.arange(start, start + 2)), part)
        assert all(torch.equal(prepared[name], whole[name][start : start + 2]) for name in part)


def test_smoothing_alone_makes_labels_soft_and_takes_any_batch():
    views = views_of(label_smoothing=0.2)
    assert views.mixes_labels
    assert views.batch_multiple == 1
    prepared = views.prepare(step(0, torch.arange(1)), {"x": IMAGES[:1].byte(), "label": torch.tensor([1])})
    assert prepared["label"].tolist() == [pytest.approx([0.05, 0.85, 0.05, 0.05])]


def test_a_builder_of_several_views_refuses_to_mix_one_of_them():
    class Two(ImageViews):
        def __init__(self, config):
            super().__init__(config)
            self.specs = {**self.specs, "y": ViewSpec("y", size=(8, 8))}

        def __call__(self, sample: Sample, rand):
            raise NotImplementedError

    views = Two(ImageViews.Config(mixup=0.8))
    with pytest.raises(ValueError, match="are for builders of one view 'x'; there is y beside it"):
        views.label_spec(ViewSpec.of_kind("labels", "label", num_classes=2))


def test_mixing_of_each_image_is_that_of_its_own_draw():
    images, labels = torch.rand(4, 3, 6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    draws = [Mix(0.3), cut_mix(0.5, 0.4, 0.6, 6, 8), Mix(), Mix(0.9)]
    each = MixOfEach.of(draws, 6, 8)
    mixed, soft = each.images(images), each.labels(labels, 3, 0.1)
    for number, mix in enumerate(draws):
        assert torch.allclose(mixed[number], mix.images(images)[number], atol=1e-7)
        assert torch.allclose(soft[number], mix.labels(labels, 3, 0.1)[number], atol=1e-7)


def test_each_image_has_the_draw_of_its_position():
    views = ImageViews(ImageViews.Config(img_size=8, mixup=0.8, cutmix=1.0, mix_mode="element"))
    views.label_spec(ViewSpec.of_kind("labels", "label", num_classes=5))
    batch = {"x": (torch.rand(6, 3, 8, 8) * 255).to(torch.uint8), "label": torch.arange(6) % 5}

    def prepared(rows: slice) -> dict:
        step = Step(3, 9, 0.0, 1.0, torch.arange(6)[rows], 0, World())
        return views.prepare(step, {name: each[rows] for name, each in batch.items()})

    whole, part = prepared(slice(0, 6)), prepared(slice(2, 6))
    for name in ("x", "label"):
        assert torch.equal(whole[name][2:], part[name])
    shares = whole["label"].max(1).values
    assert len(shares.unique()) > 2
