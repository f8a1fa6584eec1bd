"""Masker and target by hand, then the contract that every plugin keeps."""

import pytest
import torch
from mim_framework import EncoderSpec, Grid, Masked, Specs, ViewSpec
from mim_framework.testing import PluginContract
from mim_plugin_my_method import CellMasker, EdgeTarget, one_per_cell


def specs(rows: int, columns: int, patch_size: int) -> Specs:
    """What an encoder with such a grid publishes."""
    grid = Grid((rows, columns))
    encoder = EncoderSpec(dim=8, grid=grid, stride=patch_size, depth=1, num_heads=1)
    return Specs(views={"x": ViewSpec("x", size=(rows * patch_size, columns * patch_size))}, encoder=encoder)


def gradients(images: torch.Tensor) -> torch.Tensor:
    """The target of images (B, 3, 2, 2) that are one patch: vertical and horizontal gradient of each pixel."""
    target = EdgeTarget(EdgeTarget.Config(), specs(1, 1, patch_size=2))
    return target(None, Masked({}, {"x": images})).reshape(-1, 2, 2, 2).movedim(-1, 1)


def test_the_most_noisy_patch_of_every_cell_stays_visible():
    noise = torch.tensor([[0.1, 0.9, 0.8, 0.3], [0.5, 0.4, 0.2, 0.6]])  # two cells of 2 x 2, side by side
    mask = one_per_cell(noise.reshape(1, 8), Grid((2, 4)), cell_size=2)
    assert mask.hidden.reshape(2, 4).tolist() == [[True, False, False, True], [True, True, True, True]]
    assert mask.num_hidden == 6
    mask.validate()


def test_cells_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="cell_size 3 does not divide the encoder's grid of 4x6 patches"):
        CellMasker(CellMasker.Config(cell_size=3), specs(4, 6, patch_size=4))


def test_the_gradient_of_a_slope_is_its_steepness():
    slope = torch.tensor([[0.0, 5.0], [2.0, 7.0]]).expand(1, 3, 2, 2)  # 2 more in every row, 5 more in every column
    vertical, horizontal = gradients(slope)[0]
    assert vertical.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert horizontal.tolist() == [[5.0, 5.0], [5.0, 5.0]]


def test_brightness_does_not_matter():
    image = torch.arange(12.0).reshape(1, 3, 2, 2) ** 2
    assert torch.allclose(gradients(image + 100), gradients(image))


class TestContract(PluginContract):
    plugin = "my_method"
