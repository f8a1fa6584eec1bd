"""RandAugment against timm's, random erasing by hand, and both by position."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from mim_framework.base import rng
from mim_framework.contract.records import Sample
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.data.augment import (
    ERASE_TRIES,
    NUM_ERASE_RANDOM,
    OPERATIONS,
    RandAugment,
    arguments_of,
    erase,
    erased_regions,
    standard_normal,
)
from mim_framework.data.views import NUM_CROP_RANDOM, ImageViews

POLICY = "rand-m9-mstd0.5-inc1"
OFFICIAL = rand_augment_transform(POLICY, {"img_mean": (124, 116, 104), "interpolation": 3})
IMAGE = (torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0)) * 256).to(torch.uint8)


def test_the_policy_has_the_operations_of_timm_in_its_order():
    ours = RandAugment.parse(POLICY)
    assert ours == RandAugment(9, 2, 0.5, 0.5, increasing=True)
    names = [
        name
        for number in range(len(OPERATIONS))
        for name, _ in RandAugment.parse("rand-n1-p1-inc1").drawn([(number + 0.5) / len(OPERATIONS), 0, 0, 0, 0])
    ]
    assert names == [op.name for op in OFFICIAL.ops]  # fmt: skip
    assert (OFFICIAL.num_layers, OFFICIAL.ops[0].prob, OFFICIAL.ops[0].magnitude) == (2, 0.5, 9)


@pytest.mark.parametrize("level", [0.0, 0.3, 5.0, 8.6, 9.9, 10.0])
@pytest.mark.parametrize("negative", [False, True])
def test_strengths_are_those_of_timm(level: float, negative: bool):
    for name in [op.name for op in OFFICIAL.ops] + [op for op in OPERATIONS if op in LEVEL_TO_ARG]:
        with patch("random.random", return_value=0.9 if negative else 0.1):
            official = LEVEL_TO_ARG[name](level, {}) if LEVEL_TO_ARG[name] else ()
        assert arguments_of(name, level, negative=negative) == pytest.approx(official), name


@pytest.mark.parametrize("number", range(15))
def test_pixels_are_those_of_timm(number: int):
    rand = [(number + 0.5) / 15, 0.2, 0.3, 0.1, 0.9]
    fill = (124, 116, 104)
    ours = RandAugment(9, 1, 0.5, 0.5, increasing=True)(IMAGE, rand, fill)
    magnitude = min(10, 9 + 0.5 * standard_normal(0.3, 0.1))
    with patch("random.random", side_effect=[0.2, 0.9]), patch("random.gauss", return_value=magnitude):
        official = OFFICIAL.ops[number](to_pil_image(IMAGE))
    assert torch.equal(ours, pil_to_tensor(official))


def test_no_bit_left_is_a_black_image():
    """timm hands Pillow a number of bits that it has refused since version 12."""
    image = RandAugment(10, 1, 1.0, increasing=True)(IMAGE, [4.5 / 15, 0, 0, 0, 0], (0, 0, 0))
    assert not image.any()


@pytest.mark.parametrize("text", ["rand", "augmix-m3", "rand-x3", "rand-m", "rand--m3", ""])
def test_what_is_no_policy_is_refused(text: str):
    if text == "rand":
        assert RandAugment.parse(text) == RandAugment()
        return
    with pytest.raises(ValueError, match="is no RandAugment such as rand-m9-mstd0.5-inc1"):
        RandAugment.parse(text)


def test_grey_images_are_refused_by_name():
    with pytest.raises(ValidationError, match="'rand_augment' needs RGB images, 'mean' has 1 channels"):
        ImageViews.Config(rand_augment=POLICY, mean=(0.5,), std=(0.5,))


def test_magnitudes_are_normal():
    rows = rng.uniform(0, "test", torch.arange(20_000), 2).tolist()
    values = torch.tensor([standard_normal(*row) for row in rows])
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.02


def numbers(*tries: tuple[float, float, float, float], whether: float = 0.0) -> torch.Tensor:
    row = [whether, *(number for each in tries for number in each)]
    return torch.tensor([row + [0.5] * (NUM_ERASE_RANDOM - len(row))])


def test_a_region_by_hand():
    """The middle of the areas, a square: sqrt((0.02 + 0.1567) * 100) = 4.2 pixels of 10, at the start."""
    regions = erased_regions(numbers((0.5, 0.5, 0.0, 0.0)), 0.25, 10, 10)
    assert regions[0].sum() == 16
    assert regions[0, :4, :4].all()
    last = erased_regions(numbers((0.5, 0.5, 0.999, 0.999)), 0.25, 10, 10)
    assert last[0, 6:, 6:].all()
    assert not erased_regions(numbers((0.5, 0.5, 0.0, 0.0), whether=0.25), 0.25, 10, 10).any()


def test_a_region_that_does_not_fit_is_drawn_again():
    tall = (1.0, 0.9999, 0.0, 0.0)  # 10.5 rows of 10
    assert erased_regions(numbers(tall, (0.5, 0.5, 0.0, 0.0)), 1.0, 10, 10)[0].sum() == 16
    assert not erased_regions(numbers(*[tall] * ERASE_TRIES), 1.0, 10, 10).any()


def test_what_is_erased_becomes_standard_normal_and_the_rest_stays():
    images = torch.full((2, 3, 64, 64), 5.0)
    regions = torch.zeros(2, 64, 64, dtype=torch.bool)
    regions[0] = True
    out = erase(images, regions, rng.uniform(0, "noise", torch.arange(2), 3 * 64 * 64))
    assert abs(out[0].mean()) < 0.05
    assert abs(out[0].std() - 1) < 0.05
    assert torch.equal(out[1], images[1])


def test_augmentation_belongs_to_the_position_and_evaluation_has_none():
    views = ImageViews(ImageViews.Config(img_size=16, erase=1.0))
    batch = {"x": (torch.rand(4, 3, 16, 16) * 255).to(torch.uint8)}

    def step(positions: torch.Tensor) -> Step:
        return Step(0, 1, 0.0, 1.0, positions, 0, World())

    whole = views.prepare(step(torch.arange(4)), batch)["x"]
    part = views.prepare(step(torch.arange(2, 4)), {"x": batch["x"][2:]})["x"]
    plain = views.prepare(None, batch)["x"]
    assert torch.equal(whole[2:], part)
    assert not torch.equal(whole, plain)


def test_a_view_is_augmented_by_the_numbers_behind_those_of_its_crop(tmp_path):
    to_pil_image(IMAGE).save(tmp_path / "a.png")
    sample = Sample((tmp_path / "a.png").read_bytes(), "a.png")
    plain, augmented = (
        ImageViews(ImageViews.Config(img_size=16, rand_augment=each)) for each in (None, "rand-n1-p1-m9")
    )
    assert augmented.num_random == plain.num_random + 5
    rand = torch.full((augmented.num_random,), 0.5)
    rand[NUM_CROP_RANDOM + 1] = 2.5 / 15  # invert
    assert torch.equal(augmented(sample, rand)["x"], 255 - plain(sample, rand[:-5])["x"])
