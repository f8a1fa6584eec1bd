"""What builders publish."""

from __future__ import annotations

import pytest

from mim_framework.contract.mask import Grid
from mim_framework.contract.specs import EncoderSpec, PredSpec, Specs, TargetSpec, ViewSpec


def test_only_a_view_of_images_has_a_size_in_pixels():
    images = ViewSpec("x", size=(32, 48))
    assert (images.in_chans, images.img_size, images.shape) == (3, (32, 48), (3, 32, 48))
    points = ViewSpec.of_kind("points", "x", 64, 33, 3)
    assert (points.shape, points.in_chans) == ((64, 33, 3), None)
    for name in ("img_size", "height_width"):
        with pytest.raises(ValueError, match="view 'x' holds points, images are needed"):
            getattr(points, name)


def test_a_clip_has_a_size_along_three_axes_and_no_height_and_width_alone():
    clip = ViewSpec("x", axes=("time", "height", "width"), size=(4, 8, 6), in_chans=1)
    assert (clip.shape, clip.img_size) == ((1, 4, 8, 6), (4, 8, 6))
    with pytest.raises(ValueError, match="view 'x' has the axes time, height, width; height and width are needed"):
        _ = clip.height_width
    with pytest.raises(ValueError, match=r"view 'y' has 2 axes \(height, width\) and 3 sizes"):
        ViewSpec("y", size=(4, 8, 6))


def test_one_stride_is_that_of_every_axis():
    assert EncoderSpec(8, Grid((2, 4, 4)), 2, 1, 1).stride == (2, 2, 2)
    assert EncoderSpec(8, Grid((2, 4, 4)), (1, 2, 2), 1, 1).stride == (1, 2, 2)


def test_an_encoder_of_several_views_has_a_grid_for_each():
    both = EncoderSpec(8, Grid((4,)), 2, 1, 1, views=("x", "depth"), grids={"depth": (Grid((2, 2)), (4, 4))})
    assert (both.of("depth").grid, both.of("depth").stride, both.of("x").grid) == (Grid((2, 2)), (4, 4), Grid((4,)))
    with pytest.raises(ValueError, match="the encoder sees the views x, depth, not 'y'"):
        both.of("y")


def test_a_part_that_is_not_built_yet_says_so():
    specs = Specs({"x": ViewSpec("x", size=(4, 4))})
    with pytest.raises(ValueError, match="the encoder is not built yet: the order is views, encoder, frozen teachers"):
        _ = specs.encoder
    later = specs.also(encoder=EncoderSpec(8, Grid((2, 2)), 2, 1, 1))
    assert later.encoder.dim == 8
    assert later.view("x") is specs.view("x")


@pytest.mark.parametrize(
    ("kind", "fitting"), [("ids", "probs"), ("probs", "probs"), ("dense", "dense"), ("map", "dense")]
)
def test_a_prediction_that_fits_a_target(kind: str, fitting: str):
    target = TargetSpec(kind, 5, Grid((8,)))
    assert PredSpec.for_target(target, Grid((4,))) == PredSpec(fitting, 5, Grid((4,)))
