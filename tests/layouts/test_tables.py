"""Position tables for another image size."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.mask import Grid
from mim_framework.convert import resize_bias_table, resize_position_table
from mim_framework.layouts.tables import _geometric_distances


def test_the_same_grid_changes_nothing():
    table = torch.randn(1, 5, 4)
    assert resize_position_table(table, Grid((2, 2)), Grid((2, 2))) is table


def test_prefix_rows_are_kept_and_a_constant_stays_constant():
    table = torch.cat([torch.tensor([[[9.0, 8.0]]]), torch.full((1, 4, 2), 3.0)], dim=1)
    resized = resize_position_table(table, Grid((2, 2)), Grid((3, 5)))
    assert resized.shape == (1, 16, 2)
    assert resized[0, 0].tolist() == [9.0, 8.0]
    assert torch.allclose(resized[0, 1:], torch.tensor(3.0))


def test_rows_and_columns_keep_their_places():
    column = torch.arange(4.0).repeat(4)[None, :, None]  # the value is the column
    row = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    resized = resize_position_table(torch.cat([column, row], dim=2), Grid((4, 4)), Grid((8, 8)))[0].unflatten(0, (8, 8))
    assert torch.allclose(resized[..., 0], resized[..., 1].T, atol=1e-6)
    assert (resized[:, 1:, 0] - resized[:, :-1, 0] > 0).all()  # grows along columns,
    assert torch.allclose(resized[1:, :, 0], resized[:-1, :, 0], atol=1e-6)  # and not along rows
    assert resized[0, 2:6, 0].tolist() == pytest.approx([0.75, 1.25, 1.75, 2.25], abs=0.1)


def test_shrinking_is_bicubic_without_antialiasing():
    """Halving reads the two middle neighbours with weight 19/32 and the outer two with -3/32 (a = -0.75)."""
    table = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat(4)[None, :, None]
    resized = resize_position_table(table, Grid((4, 4)), Grid((2, 2)))[0, :, 0].unflatten(0, (2, 2))
    first = (-3 * 1 + 19 * 1 + 19 * 2 - 3 * 4) / 32  # the border value stands for what lies outside
    assert resized[0, 0].item() == pytest.approx(first)
    assert resized[0, 1].item() == pytest.approx((-3 * 2 + 19 * 4 + 19 * 8 - 3 * 8) / 32)


def test_a_table_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="a position table of 3 rows cannot be that of a grid 2x2"):
        resize_position_table(torch.zeros(1, 3, 4), Grid((2, 2)), Grid((3, 3)))


@pytest.mark.parametrize("method", ["geometric", "bicubic"])
def test_a_bias_table_keeps_its_centre_its_class_token_rows_and_its_symmetry(method):
    side = torch.arange(-2.0, 3.0)
    distance = (side[:, None] ** 2 + side[None] ** 2).flatten()  # of the relative positions in a window of 3
    table = torch.cat([torch.stack([distance, -distance], dim=1), torch.tensor([[7.0, 8], [9, 10], [11, 12]])])
    resized = resize_bias_table(table, 7 * 7 + 3, method)
    assert resized[-3:].tolist() == table[-3:].tolist()
    image = resized[:-3, 0].reshape(7, 7)
    assert image[3, 3] == image.min()
    assert image[3, 3].item() == pytest.approx(0, abs=0.2)
    assert torch.allclose(image, image.flip(0), atol=1e-4)
    assert torch.allclose(resized[:-3, 1], -resized[:-3, 0], atol=1e-4)
    if method == "bicubic":
        assert torch.equal(resize_bias_table(table[:-3], 25, method), table[:-3])


def test_what_is_no_bias_table_of_a_square_window_is_refused():
    with pytest.raises(ValueError, match="7 rows is not that of a square window"):
        resize_bias_table(torch.zeros(7, 2), 25, "bicubic")
    with pytest.raises(ValueError, match="28 rows cannot be resized to 49"):
        resize_bias_table(torch.zeros(28, 2), 49, "geometric")


def test_a_geometric_resize_is_the_spline_of_the_official_code():
    """interp2d of SciPy, which the official code calls, is gone; this is what it called itself."""
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn(13 * 13, 1, generator=torch.Generator().manual_seed(0))
    distances = _geometric_distances(6, 9)
    assert distances[-1].item() == pytest.approx(9)
    ratios = distances[7:].diff()[1:] / distances[7:].diff()[:-1]
    assert ratios.tolist() == pytest.approx([ratios[0].item()] * len(ratios))
    spline = interpolate.RectBivariateSpline(distances, distances, table.reshape(13, 13).double(), s=0)
    official = torch.tensor(spline(range(-9, 10), range(-9, 10)))
    assert torch.allclose(resize_bias_table(table, 19 * 19, "geometric").reshape(19, 19).double(), official, atol=1e-5)


def test_windows_that_shrink_and_the_smallest_ones():
    line = torch.arange(-3.0, 4.0).repeat(7)[:, None]  # the value is the distance to the right
    cut = resize_bias_table(line, 25, "geometric")[:5, 0].tolist()
    assert cut == pytest.approx([-2, -1, 0, 1, 2], abs=0.02)  # not compressed to [-3, 3]
    small = torch.arange(-1.0, 2.0).repeat(3)[:, None]
    assert resize_bias_table(small, 25, "geometric")[:5, 0].tolist() == pytest.approx([-1, -1, 0, 1, 1])
    assert resize_bias_table(torch.tensor([[5.0]]), 9, "geometric").flatten().tolist() == [5.0] * 9
