"""Pictures of masks and reconstructions, pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.evaluate.pictures import CAPTION_HEIGHT, GAP, mask_image, reconstruction_picture


def test_hidden_patches_are_painted_grey():
    image = torch.arange(8.0).reshape(1, 2, 4) / 8
    hidden = torch.tensor([True, False])
    assert mask_image(image, hidden, Grid((1, 2))).tolist() == [[[0.5, 0.5, 0.25, 0.375], [0.5, 0.5, 0.75, 0.875]]]
    assert image[0, 0, 0] == 0  # the image itself is as it was
    with pytest.raises(ValueError, match="image size 2x4 is not a multiple of the grid 2x3"):
        mask_image(image, torch.zeros(6, dtype=torch.bool), Grid((2, 3)))


def test_a_picture_by_hand():
    grey = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])  # (1, 2, 2); 2.0 is clipped
    red = torch.tensor([1.0, -1.0, 0.0])[:, None, None].expand(3, 2, 2)
    picture = reconstruction_picture([(grey, red), (red, grey)], scale=3, captions=("a", "b"))

    cell = 2 * 3 + GAP
    assert picture.size == (GAP + 2 * cell, CAPTION_HEIGHT + GAP + 2 * cell)
    left, top = GAP, CAPTION_HEIGHT + GAP
    assert picture.getpixel((left, top)) == (0, 0, 0)
    assert picture.getpixel((left + 2, top + 2)) == (0, 0, 0)  # one pixel became 3x3
    assert picture.getpixel((left + 3, top)) == (255, 255, 255)
    assert picture.getpixel((left, top + 3)) == (128, 128, 128)
    assert picture.getpixel((left + 5, top + 5)) == (255, 255, 255)
    assert picture.getpixel((left + cell, top)) == (255, 0, 0)
    assert picture.getpixel((left, top + cell)) == (255, 0, 0)
    assert picture.getpixel((left + cell, top + cell)) == (0, 0, 0)
    assert picture.getpixel((left - 1, top)) == (255, 255, 255)  # a gap
    captions = picture.crop((0, 0, picture.width, CAPTION_HEIGHT)).convert("L").getextrema()
    assert captions[0] < 128  # there is writing


def test_small_images_are_enlarged_until_the_captions_fit():
    digit, photo = torch.zeros(1, 8, 8), torch.zeros(3, 224, 160)
    assert reconstruction_picture([(digit,) * 3]).size == (3 * (96 + GAP) + GAP, CAPTION_HEIGHT + 96 + 2 * GAP)
    assert reconstruction_picture([(photo,) * 3]).size == (3 * (160 + GAP) + GAP, CAPTION_HEIGHT + 224 + 2 * GAP)


def test_a_prediction_that_is_not_finite_is_still_drawn():
    broken = torch.full((3, 2, 2), float("nan"))
    assert reconstruction_picture([(broken,)], scale=1, captions=("x",)).getpixel((GAP, CAPTION_HEIGHT + GAP)) == (
        0,
        0,
        0,
    )


@pytest.mark.parametrize("chans", [1, 2, 3, 4, 13])
def test_a_picture_of_any_number_of_channels_is_grey_or_shows_the_first_three(chans):
    image = torch.arange(chans)[:, None, None].expand(chans, 96, 100) / 255
    picture = reconstruction_picture([(image,)], scale=1, captions=("input",))
    assert picture.getpixel((50, 50)) == ((0, 1, 2) if chans >= 3 else (0, 0, 0))
