"""The weak crop, by hand on a few pixels and against torchvision's own transforms."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
import torch
from mim_plugin_mff.views import ResizedCropViews, Shift, random_shift, reflected, resized_size
from PIL import Image as pil
from pydantic import ValidationError
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from mim_framework import Sample

LOW, HIGH = 0.0, 1 - 2**-24


def views(**options) -> ResizedCropViews:
    return ResizedCropViews(ResizedCropViews.Config(**options))


def view(array: np.ndarray, rand: list[float], **options) -> Tensor:
    return views(**options)(Sample(array, "image"), torch.tensor(rand))["x"]


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1).astype(np.uint8)


def rows_and_columns(size: int) -> np.ndarray:
    """Pixels that say where they are: (row, column, 0)."""
    rows, columns = np.mgrid[0:size, 0:size]
    return np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)


def test_indices_are_mirrored_at_both_ends_without_repeating_the_edge():
    assert reflected(torch.arange(4), -2, 6, dim=0).tolist() == [2, 1, 0, 1, 2, 3]
    assert reflected(torch.arange(4), 1, 5, dim=0).tolist() == [1, 2, 3, 2, 1]
    assert reflected(torch.arange(4), -1, 6, dim=0).tolist() == [1, 0, 1, 2, 3, 2]
    assert reflected(torch.arange(4), 1, 2, dim=0).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("size", "resized"),
    [((375, 500), (224, 298)), ((500, 375), (298, 224)), ((8, 8), (224, 224)), ((3, 1000), (224, 74666))],
)
def test_the_short_side_becomes_the_size_of_the_view(size, resized):
    assert resized_size(*size, (224, 224)) == resized


def test_the_shift_reaches_from_padding_to_padding():
    assert random_shift([LOW, LOW], 32, 40, (32, 32), padding=4) == Shift(-4, -4)
    assert random_shift([HIGH, HIGH], 32, 40, (32, 32), padding=4) == Shift(4, 12)
    assert random_shift([0.5, 0.5], 32, 40, (32, 32), padding=4) == Shift(0, 4)
    assert random_shift([HIGH, HIGH], 32, 40, (32, 32), padding=0) == Shift(0, 8)


def test_every_shift_is_equally_likely():
    numbers = (torch.arange(9000) + 0.5) / 9000
    found = Counter(random_shift([x, 0.0], 32, 32, (32, 32), padding=4).top for x in numbers.tolist())
    assert found == dict.fromkeys(range(-4, 5), 1000)


def test_a_crop_over_the_upper_left_corner_by_hand():
    """Two pixels beyond the corner of a 6 x 6 image: rows and columns 2 1 0 1 2 3."""
    crop = view(rows_and_columns(6), [LOW, LOW, HIGH], img_size=6, padding=2)
    assert crop[0, :, 0].tolist() == [2, 1, 0, 1, 2, 3]
    assert crop[1, 0].tolist() == [2, 1, 0, 1, 2, 3]
    assert view(rows_and_columns(6), [HIGH, HIGH, HIGH], img_size=6, padding=2)[0, :, 0].tolist() == [2, 3, 4, 5, 4, 3]
    assert view(rows_and_columns(6), [LOW, LOW, LOW], img_size=6, padding=2)[1, 0].tolist() == [3, 2, 1, 0, 1, 2]


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (40, 40), (12, 20), (47, 94)])
def test_a_view_is_what_torchvisions_transforms_make(size):
    """Resize, pad by reflection, crop, flip, of a Pillow image; the filters differ in rounding."""
    img_size, padding, rand = 32, 4, [0.3, 0.92, 0.0]
    resized = functional.resize(pil.fromarray(gradient(*size)), img_size)
    assert resized.size[::-1] == resized_size(*size, (img_size, img_size))
    padded = functional.pad(resized, padding, padding_mode="reflect")
    top, left = (int(r * (side - img_size + 1)) for r, side in zip(rand, padded.size[::-1], strict=False))
    wanted = functional.hflip(functional.crop(padded, top, left, img_size, img_size))
    ours = view(gradient(*size), rand, img_size=img_size, padding=padding)
    assert (ours.int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).int()).abs().max() <= 1


def test_positions_are_distributed_as_torchvision_draws_them():
    torch.manual_seed(0)
    crop = transforms.RandomCrop(32, padding=4)
    drawn = Counter(crop.get_params(torch.empty(3, 40, 48), (32, 32))[0] - 4 for _ in range(4000))
    ours = Counter(random_shift([x, 0.5], 32, 40, (32, 32), 4).top for x in torch.rand(4000).tolist())
    assert drawn.keys() == ours.keys() == set(range(-4, 5))
    assert all(abs(drawn[top] - ours[top]) < 120 for top in drawn)


@pytest.mark.parametrize("rand", [[0.5, LOW, HIGH], [0.5, 0.37, HIGH], [0.5, HIGH, HIGH], [0.1, 0.99, LOW]])
@pytest.mark.parametrize("size", [(20, 300), (300, 20), (50, 400)])
def test_a_panorama_is_cropped_where_its_numbers_say_without_resizing_all_of_it(monkeypatch, rand, size):
    """To within a pixel of the view, where a row or column differs from the next by at most `slope` levels."""
    waves = [np.abs(4 * np.arange(side) % 510 - 255) for side in size]  # up and down by 4 levels a pixel
    image = np.stack([*np.meshgrid(*waves, indexing="ij"), np.zeros(size)], -1).astype(np.uint8)
    slope = 4 * min(size) / 32
    sizes = []
    opened = views(img_size=32, padding=4).open(Sample(image, "image"))
    original = type(opened).crop
    monkeypatch.setattr(type(opened), "crop", lambda *args, **kw: sizes.append(args[5]) or original(*args, **kw))
    rand = rand if size[1] > size[0] else [rand[1], rand[0], rand[2]]
    ours = view(image, rand, img_size=32, padding=4)
    [(height, width)] = sizes
    assert height * width <= 32 * 34

    total = resized_size(*size, (32, 32))
    whole = original(opened, 0, 0, *size, total, interpolation="bilinear")
    top, left = random_shift(rand[:2], *total, (32, 32), 4)
    wanted = reflected(reflected(whole, top, 32, dim=1), left, 32, dim=2)
    wanted = wanted.flip(2) if rand[2] < 0.5 else wanted
    assert (ours.int() - wanted.int()).abs().max() <= slope + 1
    assert (ours.int() - wanted.int()).abs().float().mean() < slope / 4


def test_a_large_jpeg_is_decoded_small_and_to_nearly_the_same():
    data = io.BytesIO()
    pil.fromarray(gradient(400, 600)).save(data, "JPEG", quality=95)
    sample, rand = Sample(data.getvalue(), "image.jpg"), torch.tensor([0.5, 0.5, HIGH])
    small, full = (views(img_size=32, scaled_decode=scaled)(sample, rand)["x"] for scaled in (True, False))
    assert (small[:2].int() - full[:2].int()).abs().float().mean() < 1.5


def test_the_rest_is_that_of_the_cores_views():
    """Normalisation, its inverse and the evaluation view."""
    ours = views(img_size=16)
    assert ours.specs["x"].shape == (3, 16, 16)
    assert ours.num_random == 3
    batch = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    prepared = ours.prepare(None, {"x": batch})["x"]
    assert prepared[0, 0, 0, 0].item() == pytest.approx((batch[0, 0, 0, 0].item() / 255 - 0.485) / 0.229, abs=1e-5)
    assert torch.allclose(ours.to_image(prepared) * 255, batch.float(), atol=1e-3)
    assert ours.evaluation_view(Sample(gradient(40, 60), "image")).shape == (3, 16, 16)


def test_the_view_does_not_depend_on_anything_but_its_numbers():
    first = view(gradient(40, 60), [0.2, 0.7, 0.4], img_size=32)
    torch.manual_seed(1)
    assert torch.equal(view(gradient(40, 60), [0.2, 0.7, 0.4], img_size=32), first)
    assert not torch.equal(view(gradient(40, 60), [0.2, 0.6, 0.4], img_size=32), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 4, "padding": 4}, "'padding' must be smaller than 'img_size', 4, which it mirrors; got 4"),
        ({"padding": -1}, "greater than or equal to 0"),
        ({"scale": [0.2, 1.0]}, "scale"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ResizedCropViews.Config(**options)


@pytest.mark.parametrize(
    ("size", "resized"),
    [((60, 40), (96, 64)), ((40, 120), (32, 96)), ((20, 40), (32, 64))],  # 32 x 64 is covered, and no more
)
def test_an_image_is_resized_until_it_covers_a_view_that_is_no_square(size, resized):
    assert resized_size(*size, (32, 64)) == resized


@pytest.mark.parametrize("size", [(60, 40), (40, 120), (20, 40), (400, 40), (30, 900)])
def test_a_view_that_is_no_square_is_cut_from_the_resized_image(size):
    pixels = gradient(*size)
    made = ResizedCropViews(ResizedCropViews.Config(img_size=(32, 64), padding=0, flip=0))
    got = made(Sample(pixels, "image"), torch.full((3,), 0.5))["x"]
    height, width = resized_size(*size, (32, 64))
    top, left = random_shift([0.5, 0.5], height, width, (32, 64), padding=0)
    whole = made.open(Sample(pixels, "image")).crop(0, 0, *size, (height, width), interpolation="bilinear")
    expected = whole[:, top : top + 32, left : left + 64]
    assert got.shape == (3, 32, 64)
    assert (got[:2].float() - expected[:2].float()).abs().mean() < 2
