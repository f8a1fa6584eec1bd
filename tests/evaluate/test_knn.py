"""Neighbours vote as in the paper, in full precision, and the share that they classify rightly is what is measured."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mim_framework.base.errors import DataError
from mim_framework.contract.evaluation import Features
from mim_framework.contract.mask import Grid
from mim_framework.contract.specs import EncoderSpec
from mim_framework.contract.world import World
from mim_framework.evaluate import knn
from mim_framework.evaluate.knn import KNN, knn_predict


def predict(train_x, train_y, test_x, **options):
    options = {"k": 3, "temperature": 0.07, "num_classes": 3, **options}
    return knn_predict(torch.tensor(train_x), torch.tensor(train_y), torch.tensor(test_x), **options).tolist()


def test_one_neighbour_by_hand():
    train_x, train_y = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [2, 0, 1]
    assert predict(train_x, train_y, [[5.0, 1.0], [0.1, 0.2], [-0.01, 0.0]], k=1) == [2, 0, 1]


def test_neighbours_are_chosen_by_direction_and_not_by_length():
    assert predict([[100.0, 100.0], [0.01, 0.0]], [0, 1], [[1.0, 0.1]], k=1) == [1]


def test_a_near_neighbour_outvotes_two_far_ones_at_a_low_temperature_only():
    angles = [0.0, 0.5, -0.5]  # similarities to the test image: 1, 0.878 and 0.878
    train_x = [[math.cos(angle), math.sin(angle)] for angle in angles]
    assert 2 * math.exp((math.cos(0.5) - 1) / 0.1) < 1
    assert 2 * math.exp((math.cos(0.5) - 1) / 1.0) > 1
    assert predict(train_x, [0, 1, 1], [[1.0, 0.0]], temperature=0.1) == [0]
    assert predict(train_x, [0, 1, 1], [[1.0, 0.0]], temperature=1.0) == [1]


def test_chunks_do_not_change_the_result(monkeypatch):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 3
    options = {"k": 5, "temperature": 0.07, "num_classes": 3}
    whole = knn_predict(x[:30], y[:30], x[30:], **options)
    monkeypatch.setattr(knn, "_SIMILARITIES_AT_ONCE", 70)  # two test images at a time
    assert torch.equal(knn_predict(x[:30], y[:30], x[30:], **options), whole)


def test_neighbours_are_found_in_full_precision_under_autocast():
    angles = torch.tensor([0.0100, 0.0101])  # one direction in bfloat16
    train_x = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = knn_predict(train_x, torch.tensor([0, 1]), train_x, k=1, temperature=0.07, num_classes=2)
    assert found.tolist() == [0, 1]


def numbers_of(train: Features, test: Features, *, classes=None, test_classes=None, **options) -> dict[str, float]:
    of_split = {"train": train, "test": test}
    sources = {"train": SimpleNamespace(classes=classes), "test": SimpleNamespace(classes=test_classes or classes)}
    subject = SimpleNamespace(
        features=lambda split, **asked: of_split[split], source=sources.__getitem__, world=World()
    )
    return KNN(KNN.Config(**options))(subject)


def features(*rows: tuple[float, float], y: list[int]) -> Features:
    return Features(torch.tensor(rows), torch.tensor(y))


EYE = features((1.0, 0.0), (0.0, 1.0), y=[0, 1])


def test_the_share_of_rightly_classified_test_images_is_measured_with_its_interval():
    test = features((2.0, 1.0), (1.0, 2.0), (3.0, 1.0), (1.0, 3.0), y=[0, 1, 1, 1])
    numbers = numbers_of(EYE, test, k=1)
    assert numbers == {"top1": 0.75}
    assert numbers["top1"].low < 0.75 < numbers["top1"].high


def test_several_k_are_measured_at_once():
    """Far neighbours of class 1 outvote the near one of class 0."""
    train = features((1.0, 0.0), (1.0, 1.0), (1.0, -1.0), y=[0, 1, 1])
    test = features((1.0, 0.1), (1.0, -0.1), y=[0, 0])
    assert numbers_of(train, test, k=[1, 3], temperature=10.0) == {"top1_k1": 1.0, "top1_k3": 0.0}


def test_the_five_best_classes_are_among_those_with_votes():
    """Of seven classes the two neighbours vote for two; a class without votes is never among the five."""
    angles = torch.arange(7) * 0.1
    train = Features(torch.stack([angles.cos(), angles.sin()], 1), torch.arange(7))
    test = Features(train.x[[0, 0, 0]], torch.tensor([0, 1, 2]))
    assert numbers_of(train, test, k=2) == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}


def test_nothing_is_computed_in_float64_which_not_every_device_has(monkeypatch):
    def refused(tensor):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch.Tensor, "double", refused)
    assert numbers_of(EYE, EYE, k=1) == {"top1": 1.0}


ONE_CLASS = features((1.0, 0.0), y=[1])


@pytest.mark.parametrize(
    ("train", "test", "options", "text"),
    [
        (EYE, EYE, {"k": 20}, "k is 20, but there are 2 labelled train images; use k=2 or less"),
        (EYE, EYE, {"k": [1, 3]}, "k is 3, but there are 2 labelled train images"),
        (ONE_CLASS, EYE, {}, "all labelled train images are of one class, 1; at least two"),
        (ONE_CLASS, EYE, {"classes": ["cat", "dog"]}, "are of one class, 'dog'; at least two are needed"),
        (EYE, features((1.0, 0.0), y=[2]), {}, "class 2 has test images (1) and no labelled train image; both splits"),
        (EYE, EYE, {"classes": ["a", "b"], "test_classes": ["a", "c"]}, "class 1 is 'b' in train and 'c' in test"),
        (EYE, EYE, {"classes": ["a", "b"], "test_classes": ["a"]}, "class 1 is 'b' in train and missing in test"),
    ],
)
def test_what_cannot_be_judged_is_told(train, test, options, text):
    with pytest.raises(DataError, match=re.escape(text)):
        numbers_of(train, test, **options)


def test_of_fewer_images_than_the_default_k_all_vote_and_that_is_said(caplog):
    assert numbers_of(EYE, EYE) == numbers_of(EYE, EYE, k=2)
    assert caplog.messages == ["knn: k is 20 by default, but there are 2 labelled train images; all vote"]


def test_a_class_token_that_is_not_there_is_a_clear_error():
    spec = EncoderSpec(dim=4, grid=Grid((2, 2)), stride=4, depth=1, num_heads=1)
    KNN(KNN.Config(pool="mean")).check(spec)
    KNN(KNN.Config(pool="cls")).check(replace(spec, num_prefix_tokens=1))
    with pytest.raises(ValueError, match="pool is 'cls', but the encoder has no class token; use pool=mean"):
        KNN(KNN.Config(pool="cls")).check(spec)
