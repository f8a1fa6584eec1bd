"""What builders publish."""

from __future__ import annotations

import pytest

from mim_framework.contract.mask import Grid
from mim_framework.contract.specs import PredSpec, TargetSpec, ViewSpec


def test_only_a_view_of_images_has_a_size_and_channels():
    images = ViewSpec("x", (3, 32, 48))
    assert (images.in_chans, images.img_size) == (3, (32, 48))
    points = ViewSpec("x", (64, 33, 3), kind="points")
    for name in ("in_chans", "img_size"):
        with pytest.raises(ValueError, match="view 'x' holds points, images are needed"):
            getattr(points, name)


@pytest.mark.parametrize(
    ("kind", "fitting"), [("ids", "probs"), ("probs", "probs"), ("dense", "dense"), ("map", "dense")]
)
def test_a_prediction_that_fits_a_target(kind: str, fitting: str):
    target = TargetSpec(kind, 5, Grid((8,)))
    assert PredSpec.for_target(target, Grid((4,))) == PredSpec(fitting, 5, Grid((4,)))
