"""Images in patches, and back."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.nn.patches import patchify, unpatchify


def test_patchify_by_hand_has_channels_fastest():
    image = torch.arange(2 * 2 * 4).reshape(1, 2, 2, 4)  # two channels, two rows, four columns
    assert patchify(image, 2)[0, 1].tolist() == [2, 10, 3, 11, 6, 14, 7, 15]


def test_unpatchify_inverts_patchify_on_rectangles():
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, Grid((2, 3))), images)


def test_an_image_of_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="image size 10x8 is not a multiple of patch_size 4"):
        patchify(torch.rand(1, 3, 10, 8), 4)
