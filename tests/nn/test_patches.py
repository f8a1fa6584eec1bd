"""Images in patches, and back."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.nn.patches import PatchEmbed, patch_grid, patchify, unpatchify


def test_patchify_by_hand_has_channels_fastest():
    image = torch.arange(2 * 2 * 4).reshape(1, 2, 2, 4)  # two channels, two rows, four columns
    assert patchify(image, 2)[0, 1].tolist() == [2, 10, 3, 11, 6, 14, 7, 15]


def test_unpatchify_inverts_patchify_on_rectangles():
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, Grid((2, 3))), images)


def test_an_image_of_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="image size 10x8 is not a multiple of patch_size 4"):
        patchify(torch.rand(1, 3, 10, 8), 4)


# --- any number of axes ----------------------------------------------------------------------------------------------


def test_cubes_of_a_clip_by_hand():
    """Two frames of 2x4 pixels in cubes of 2x1x2: four cubes, each (time, row, column, channel)."""
    clip = torch.arange(16.0).reshape(1, 1, 2, 2, 4)
    assert patch_grid((2, 2, 4), (2, 1, 2)) == Grid((1, 2, 2))
    cubes = patchify(clip, (2, 1, 2))
    assert cubes.tolist() == [[[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]]
    assert torch.equal(unpatchify(cubes, (2, 1, 2), Grid((1, 2, 2))), clip)


@pytest.mark.parametrize(("size", "patch"), [((12,), (3,)), ((4, 6), (2, 3)), ((4, 6, 8), (2, 3, 4))])
def test_patches_of_any_axes_come_back(size: tuple[int, ...], patch: tuple[int, ...]):
    images = torch.randn(2, 3, *size)
    assert torch.equal(unpatchify(patchify(images, patch), patch, patch_grid(size, patch)), images)


def test_the_embedding_of_patches_is_a_linear_map_of_each():
    for size, patch in (((6, 8), (2, 4)), ((2, 6, 8), (2, 3, 2))):
        grid, images = patch_grid(size, patch), torch.randn(2, 3, *size)
        embed = PatchEmbed(grid, patch, 3, 5)
        weight = embed.proj.weight.movedim(1, -1).flatten(1)
        assert torch.allclose(embed(images), patchify(images, patch) @ weight.T + embed.proj.bias, atol=1e-5)


def test_a_patch_with_another_number_of_sides_is_refused():
    with pytest.raises(ValueError, match=r"patch_size \[2, 2\] has 2 sides, the image has 3 axes"):
        patch_grid((4, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="image size 3x4x4 is not a multiple of patch_size 2"):
        patch_grid((3, 4, 4), 2)
