"""A few labels of each class are drawn by the number of the draw, and the spread over draws is told."""

from __future__ import annotations

import re

import pytest
import torch
from blobs import SPEC, blobs, subject_of

from mim_framework.base.errors import DataError
from mim_framework.contract.evaluation import Features
from mim_framework.evaluate.few_shot import FewShot, draw_rows, over_draws


def numbers_of(train: Features, test: Features, **options) -> dict[str, float]:
    return FewShot(FewShot.Config(**options))(subject_of(train, test))


def test_rows_are_n_of_each_class_in_ascending_order_and_others_in_every_draw():
    y = torch.tensor([2, 0, 2, 0, 1, 1, 2, 0, 1])
    rows = draw_rows(y, 2, seed=0)
    assert y[rows].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(rows.tolist())) == 6
    assert torch.equal(draw_rows(y, 2, seed=0), rows)
    assert len({tuple(draw_rows(y, 2, seed).tolist()) for seed in range(5)}) > 1


def test_drawing_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    draw_rows(torch.tensor([0, 1]), 1, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_far_apart_classes_need_one_label_each():
    numbers = numbers_of(blobs(20, spread=0.05), blobs(10, spread=0.05, seed=1), n=[1])
    assert numbers == {"knn_top1_n1": 1.0, "knn_std_n1": 0.0, "logistic_top1_n1": 1.0, "logistic_std_n1": 0.0}


def test_more_labels_are_better_and_the_same_each_time():
    train, test = blobs(40, spread=0.6), blobs(40, spread=0.6, seed=1)
    numbers = numbers_of(train, test, n=[1, 20], draws=3)
    for kind in ("knn", "logistic"):
        assert numbers[f"{kind}_top1_n20"] > numbers[f"{kind}_top1_n1"].high - 0.2
        assert numbers[f"{kind}_top1_n20"] > numbers[f"{kind}_top1_n1"]
        assert numbers[f"{kind}_top1_n1"].low < numbers[f"{kind}_top1_n1"] < numbers[f"{kind}_top1_n1"].high
    assert numbers_of(train, test, n=[1, 20], draws=3) == numbers


def test_the_interval_of_a_mean_by_hand():
    """Of 0.4, 0.5 and 0.6 the standard deviation is 0.1, and Student's t of two degrees of freedom is 4.303."""
    mean, std = over_draws([0.4, 0.5, 0.6])
    assert (mean, std) == (pytest.approx(0.5), pytest.approx(0.1))
    assert (mean.low, mean.high) == (pytest.approx(0.5 - 4.303 * 0.1 / 3**0.5), pytest.approx(0.5 + 0.24843, abs=1e-4))
    many, std = over_draws([0.4, 0.6] * 20)  # 39 degrees of freedom: 2.0227
    assert many.high - many == pytest.approx(2.0227 * std / 40**0.5, rel=1e-4)


def test_scale_and_shift_of_features_do_not_matter_to_the_regression():
    train, test = blobs(20), blobs(20, seed=1)
    moved = [Features(100 * each.x + 7, each.y) for each in (train, test)]
    numbers, of_moved = (numbers_of(*pair, n=[2])["logistic_top1_n2"] for pair in ((train, test), moved))
    assert of_moved == pytest.approx(numbers, abs=1e-9)


def test_fewer_images_than_labels_wanted_are_told():
    text = "few_shot.n asks for 5 images of each class, and class 0 has 3 labelled train images; use 3 or fewer"
    with pytest.raises(DataError, match=re.escape(text)):
        numbers_of(blobs(3), blobs(3), n=[5])


def test_a_class_token_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="pool is 'cls', but the encoder has no class token; use pool=mean"):
        FewShot(FewShot.Config(pool="cls")).check(SPEC)
