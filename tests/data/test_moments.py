"""Moments are those of all pixels, however they are divided into images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mim_framework.data.moments import Moments, total
from mim_framework.data.values import UnsupportedValues


def test_moments_by_hand():
    moments = Moments.of(np.array([[[0, 10]], [[4, 10]]], np.uint16))
    assert moments.count == 2
    assert moments.mean.tolist() == [2, 10]
    assert moments.std.tolist() == [2, 0]
    assert (moments.low.tolist(), moments.high.tolist()) == ([0, 10], [4, 10])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_moments_of_parts_add_up_to_those_of_all(dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 7, 3)).astype(dtype)
    parts = total(Moments.of(part) for part in np.split(pixels, [1, 12]))
    assert np.allclose(parts.mean, pixels.mean((0, 1), np.float64), rtol=1e-13)
    assert np.allclose(parts.std, pixels.std((0, 1), np.float64), rtol=1e-13)
    assert parts.count == 210
    assert parts.high.tolist() == pixels.max((0, 1)).tolist()


def test_a_picture_and_its_numbers_have_the_same_moments():
    pixels = np.random.default_rng(1).integers(0, 256, (9, 5, 3), np.uint8)
    assert Moments.of(Image.fromarray(pixels)).to_json() == Moments.of(pixels).to_json()
    assert Moments.of(Image.fromarray(pixels[..., 0])).to_json() == Moments.of(pixels[..., :1]).to_json()


def test_a_small_spread_far_from_zero_is_not_lost():
    values = 1e6 + np.arange(4.0).reshape(4, 1, 1)
    moments = total(Moments.of(value[None]) for value in values)
    assert moments.std[0] == pytest.approx(np.arange(4.0).std(), rel=1e-9)


def test_scaled_and_repeated_by_hand():
    moments = Moments.of(np.array([[[100], [300]]], np.uint16)).scaled(100, 500).repeated(3)
    assert moments.mean.tolist() == [0.25, 0.25, 0.25]
    assert moments.std.tolist() == [0.25, 0.25, 0.25]


def test_moments_survive_json_to_the_last_bit():
    moments = Moments.of(np.random.default_rng(2).random((5, 5, 2)))
    again = Moments.from_json(json.loads(json.dumps(moments.to_json())))
    assert again.to_json() == moments.to_json()


def test_numbers_that_are_none_are_refused():
    with pytest.raises(UnsupportedValues, match="NaN or infinite"):
        Moments.of(np.array([[[1.0], [np.nan]]]))
