from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image as pil
from pydantic import ValidationError
from torchvision import transforms
from torchvision.transforms import v2

from mim_framework.base.errors import DataError
from mim_framework.contract.records import Sample
from mim_framework.data.decode import jpeg_decoder, open_image
from mim_framework.data.views import (
    NUM_CROP_RANDOM,
    Box,
    ImageViews,
    central_crop_box,
    crop_box_drawn_once,
    random_resized_crop_box,
    resize_and_center,
    resized_center_crop,
)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1).astype(np.uint8)


def image_views(**options) -> ImageViews:
    return ImageViews(ImageViews.Config(**options))


def test_random_resized_crop_box_by_hand():
    # a quarter of 100 x 200 as a square: side sqrt(5000) = 71, in the middle of the 30 x 130 possible positions
    assert random_resized_crop_box([0.5] * NUM_CROP_RANDOM, 100, 200, (0.25, 0.25), (1, 1)) == Box(15, 65, 71, 71)


def test_a_try_that_does_not_fit_falls_to_the_next_pair_of_numbers():
    rand = [0.0] * NUM_CROP_RANDOM
    rand[0] = 0.99  # area 0.99 at aspect 3/4 is too high for a square image
    assert random_resized_crop_box(rand, 100, 100, (0.04, 1.0), (0.75, 1.0)) == Box(0, 0, 23, 17)


@pytest.mark.parametrize(
    ("size", "box"),
    [((100, 1000), Box(0, 433, 100, 133)), ((900, 30), Box(430, 0, 40, 30)), ((50, 60), Box(0, 0, 50, 60))],
)
def test_the_fallback_is_the_largest_central_crop(size, box):
    assert central_crop_box(*size, RATIO) == box
    too_large = (1.0, 1.0)
    if size != (50, 60):
        assert random_resized_crop_box([0.5] * NUM_CROP_RANDOM, *size, too_large, RATIO) == box


def test_the_box_lies_within_the_image_for_any_numbers():
    generator = torch.Generator().manual_seed(0)
    for size in [(1, 1), (8, 8), (3, 500), (500, 3), (375, 500)]:
        for rand in torch.rand(200, NUM_CROP_RANDOM, generator=generator).tolist():
            top, left, height, width = random_resized_crop_box(rand, *size, SCALE, RATIO)
            assert top >= 0
            assert left >= 0
            assert 0 < height <= size[0] - top
            assert 0 < width <= size[1] - left


@pytest.mark.parametrize("size", [(375, 500), (60, 300)])
def test_boxes_are_distributed_as_torchvision_draws_them(size):
    height, width = size
    draws = 3000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(draws)])
    rand = torch.rand(draws, NUM_CROP_RANDOM, generator=torch.Generator().manual_seed(1)).tolist()
    ours = np.array([random_resized_crop_box(row, height, width, SCALE, RATIO) for row in rand])
    for name, value in {
        "top": lambda b: b[:, 0] / height,
        "left": lambda b: b[:, 1] / width,
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width),
        "aspect": lambda b: np.log(b[:, 3] / b[:, 2]),
    }.items():
        a, b = np.sort(value(ours)), np.sort(value(theirs))
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / draws
        assert distance < 1.95 * math.sqrt(2 / draws), name  # Kolmogorov-Smirnov at the 0.1 % level


def test_a_view_is_the_crop_and_flip_that_its_numbers_say():
    pixels = gradient(40, 60)
    views = image_views(img_size=20, scale=(0.25, 0.25), ratio=(1, 1))
    rand = torch.full((views.num_random,), 0.5)
    plain = views(Sample(pixels, "a"), rand)["x"]
    rand[-1] = 0.49
    flipped = views(Sample(pixels, "a"), rand)["x"]
    assert plain.dtype == torch.uint8
    assert torch.equal(flipped, plain.flip(2))
    expected = pil.fromarray(pixels).crop((18, 8, 42, 32)).resize((20, 20), pil.Resampling.BICUBIC)
    top, left, height, width = random_resized_crop_box(rand.tolist(), 40, 60, (0.25, 0.25), (1, 1))
    assert (left, top, left + width, top + height) == (18, 8, 42, 32)
    assert (plain.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 2


def test_prepare_normalises_and_to_image_undoes_it():
    views = image_views(img_size=4)
    x = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    prepared = views.prepare(None, {"x": x, "other": x})
    expected = transforms.Normalize(views.config.mean, views.config.std)(x / 255)
    assert prepared["x"].dtype == torch.float32
    torch.testing.assert_close(prepared["x"], expected, atol=1e-6, rtol=1e-6)
    assert prepared["other"] is x
    torch.testing.assert_close(views.to_image(prepared["x"]), x / 255, atol=1e-6, rtol=0)
    assert views.to_image(prepared["x"] + 100).max() == 1


def test_the_view_is_published_with_its_size():
    spec = image_views(img_size=96).specs["x"]
    assert (spec.shape, spec.in_chans, spec.img_size) == ((3, 96, 96), 3, (96, 96))


def test_evaluation_view_agrees_with_the_official_transform():
    pixels = gradient(300, 400)
    got = image_views().evaluation_view(Sample(pixels, "a"))
    official = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    expected = torch.from_numpy(np.array(official(pil.fromarray(pixels)))).permute(2, 0, 1)
    assert got.shape == (3, 224, 224)
    assert (got.float() - expected.float()).abs()[:2].mean() < 1


def test_a_tiny_image_is_only_resized_for_evaluation():
    digit = np.arange(64, dtype=np.uint8).reshape(8, 8)
    same = image_views(img_size=8).evaluation_view(Sample(digit, "a"))
    assert torch.equal(same, torch.from_numpy(digit).expand(3, 8, 8))
    assert image_views(img_size=32).evaluation_view(Sample(digit, "a")).shape == (3, 32, 32)


def test_the_evaluation_view_of_a_panorama_is_its_middle():
    pixels = np.zeros((2, 30_000), np.uint8)
    pixels[:, 14_900:15_100] = 255
    views = image_views(img_size=224)
    assert resized_center_crop(views.open(Sample(pixels, "a")), 224, "bicubic").min() == 255


def test_a_view_that_is_no_square_shows_the_same_crop_in_its_own_shape():
    pixels = gradient(60, 90)
    views = image_views(img_size=(16, 40), scale=(0.25, 0.25), ratio=(1, 1), flip=0)
    rand = torch.full((views.num_random,), 0.5)
    box = random_resized_crop_box(rand.tolist(), 60, 90, (0.25, 0.25), (1, 1))
    assert views.specs["x"].img_size == (16, 40)
    expected = views.open(Sample(pixels, "a")).crop(*box, (16, 40))
    assert torch.equal(views(Sample(pixels, "a"), rand)["x"], expected)
    by_number, by_pair = (image_views(img_size=size)(Sample(pixels, "a"), rand)["x"] for size in (16, (16, 16)))
    assert torch.equal(by_number, by_pair)


@pytest.mark.parametrize(
    ("size", "box"),
    [((300, 400), (50, 0, 200, 400)), ((300, 1000), (0, 200, 300, 600)), ((100, 300), (0, 50, 100, 200))],
)
def test_the_evaluation_view_of_a_wide_view_is_the_largest_central_box_of_its_shape(size, box):
    image = open_image(gradient(*size), "a")
    got = resized_center_crop(image, (112, 224), "bicubic")
    if min(size) <= 112:  # nothing to spare for a border
        expected = image.crop(*box, (112, 224))
    else:
        expected = image.crop(*box, (128, 256))[:, 8:120, 16:240]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("count", [1, 2, 4, 13])
def test_there_are_as_many_channels_as_numbers_in_mean(count):
    mean = tuple(0.1 * (i + 1) for i in range(count))
    views = image_views(img_size=(8, 12), mean=mean, std=(0.5,) * count)
    pixels = np.arange(16 * 16 * count, dtype=np.int64).reshape(16, 16, count).astype(np.uint8)
    view = views(Sample(pixels, "a"), torch.full((views.num_random,), 0.5))["x"]
    assert view.shape == views.evaluation_view(Sample(pixels, "a")).shape == (count, 8, 12)
    assert (views.specs["x"].in_chans, views.specs["x"].img_size) == (count, (8, 12))
    prepared = views.prepare(None, {"x": view[None]})["x"]
    torch.testing.assert_close(prepared[0, -1], (view[-1] / 255 - mean[-1]) / 0.5)
    torch.testing.assert_close(views.to_image(prepared)[0], view / 255, atol=1e-6, rtol=0)


def test_the_range_and_the_alpha_of_a_recipe_reach_the_decoder():
    deep = np.array([[0, 2048], [4095, 4095]], np.uint16)
    views = image_views(img_size=2, value_range=(0, 4095), mean=(0.5,), std=(0.25,))
    assert views.evaluation_view(Sample(deep, "a"))[0].tolist() == [[0, 128], [255, 255]]
    clear = pil.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert image_views(img_size=2).evaluation_view(Sample(clear, "a")).unique().tolist() == [255]
    assert image_views(img_size=2, alpha="drop").evaluation_view(Sample(clear, "a"))[:, 0, 0].tolist() == [10, 20, 30]


def test_a_sample_of_a_later_page_shows_that_page():
    file = io.BytesIO()
    pil.new("L", (4, 4), 10).save(file, "TIFF", save_all=True, append_images=[pil.new("L", (4, 4), 20)])
    views = image_views(img_size=4)
    pages = [views.evaluation_view(Sample(file.getvalue(), "a", page=page)) for page in (0, 1)]
    assert [int(page.max()) for page in pages] == [10, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "'mean' has 1 numbers, 'std' has 3: give both one for each channel"),
        ({"mean": (), "std": ()}, "at least 1"),
        ({"img_size": (32, 0)}, "greater than 0"),
        ({"img_size": (32, 32, 3)}, "at most 2"),
        ({"value_range": (4095, 0)}, r"'value_range' must be \[smallest, largest\], got \[4095.0, 0.0\]"),
        ({"scale": (0.8, 0.2)}, r"must be \[smallest, largest\], got \[0.8, 0.2\]"),
        ({"scale": (0.0, 1.0)}, "greater than 0"),
        ({"ratio": (2.0, 1.0)}, r"must be \[smallest, largest\]"),
        ({"max_pixels": 10**9}, "less than or equal to 178956970"),
        ({"std": (0.0, 1.0, 1.0)}, "greater than 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ImageViews.Config(**options)


def test_a_decoder_that_is_missing_is_refused_before_any_worker_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    jpeg_decoder.cache_clear()
    try:
        with pytest.raises(DataError, match="decoder: torchcodec cannot be imported"):
            image_views(decoder="torchcodec")
    finally:
        jpeg_decoder.cache_clear()


def test_a_crop_drawn_once_is_cut_to_the_image_where_an_ordinary_one_would_be_drawn_again():
    rand = [0.99, 0.99] + [0.0] * (NUM_CROP_RANDOM - 2)  # nearly all of the area, much wider than the image is
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    once = crop_box_drawn_once(rand, 100, 50, scale, ratio)
    assert (once.width, once.top, once.left) == (50, 0, 0)
    assert once.height == 61
    again = random_resized_crop_box(rand, 100, 50, scale, ratio)
    assert (again.height, again.width) != (once.height, once.width)
    last = crop_box_drawn_once([0.2, 0.5] + [0.9999] * (NUM_CROP_RANDOM - 2), 100, 50, scale, ratio)
    assert (last.top + last.height, last.left + last.width) == (100, 50)


@pytest.mark.parametrize("size", [(40, 60), (16, 16), (8, 30)])
def test_the_evaluation_view_of_fine_tuning_is_that_of_torchvision(tmp_path, size):
    """The whole image is resized, also a small one; pixels are those of `Resize` and `CenterCrop`, to 1 of 255."""
    picture = pil.fromarray((np.random.default_rng(0).random((*size, 3)) * 255).astype("uint8"))
    picture.save(tmp_path / "a.png")
    sample = Sample((tmp_path / "a.png").read_bytes(), "a.png")
    views = ImageViews(ImageViews.Config(img_size=14, eval_view="resize_crop"))
    official = v2.Compose([v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(14)])(picture)
    difference = views.evaluation_view(sample).int() - v2.functional.pil_to_tensor(official).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("eval_view", ["resize_crop", "central_box"])
def test_evaluations_may_have_a_filter_of_their_own(tmp_path, eval_view):
    picture = pil.fromarray((np.random.default_rng(0).random((40, 60, 3)) * 255).astype("uint8"))
    picture.save(tmp_path / "a.png")
    sample = Sample((tmp_path / "a.png").read_bytes(), "a.png")
    seen = {
        filters: ImageViews(
            ImageViews.Config(img_size=14, eval_view=eval_view, interpolation=filters[0], eval_interpolation=filters[1])
        ).evaluation_view(sample)
        for filters in [("bilinear", "bicubic"), ("bicubic", None), ("bilinear", None)]
    }
    assert torch.equal(seen["bilinear", "bicubic"], seen["bicubic", None])
    assert not torch.equal(seen["bilinear", None], seen["bicubic", None])


def test_a_panorama_is_resized_in_part(tmp_path):
    pil.new("RGB", (4000, 4)).save(tmp_path / "a.png")
    sample = Sample((tmp_path / "a.png").read_bytes(), "a.png")
    views = ImageViews(ImageViews.Config(img_size=14, eval_view="resize_crop", eval_crop=1.0))
    assert views.evaluation_view(sample).shape == (3, 14, 14)
    assert resize_and_center(4, 32, (14, 14), 1.0) == ((14, 112), 0, 49)
