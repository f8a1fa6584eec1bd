"""Estimates: numbers that carry their uncertainty."""

import json
import pickle

import pytest

from mim_framework.contract.evaluation import Estimate


def test_an_interval_by_hand():
    """Of 8 of 10: centre 0.8 + 0.19207, width 1.96 sqrt(0.016 + 0.0096), both over 1.38415."""
    found = Estimate.of_share(8, 10)
    assert (float(found), found.low, found.high) == pytest.approx((0.8, 0.49016, 0.94332), abs=1e-4)


@pytest.mark.parametrize("right", [0, 50])
def test_an_interval_never_leaves_0_to_1_and_is_never_empty(right):
    found = Estimate.of_share(right, 50)
    assert 0 <= found.low <= found <= found.high <= 1
    assert found.high - found.low > 0.05


def test_an_estimate_is_a_number_like_any_other():
    found = Estimate.of_share(3, 4)
    assert json.dumps({"top1": found}) == '{"top1": 0.75}'
    assert pickle.loads(pickle.dumps(found)).low == found.low
