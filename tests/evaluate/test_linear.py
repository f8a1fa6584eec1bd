"""Of many linear classifiers the one that is best on images kept aside is judged, and never the best on test unsaid."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from blobs import SPEC, blobs, subject_of
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from mim_framework.base.errors import DataError
from mim_framework.contract.evaluation import Features
from mim_framework.contract.records import Ask
from mim_framework.evaluate.labelled import tenth_of
from mim_framework.evaluate.linear import RATES, Linear, rightly_classified
from mim_framework.evaluate.sweep import Sweep, batches, half_cosine

QUICK = {"steps": 100, "batch_size": 32, "rates": (1e-3, 0.1, 1.0)}


def numbers_of(train: Features, test: Features, **options) -> dict[str, float]:
    return Linear(Linear.Config(**{**QUICK, **options}))(subject_of(train, test))


def test_classifiers_trained_at_once_are_those_trained_one_by_one():
    data, rates = blobs(10), [0.1, 0.5]
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 3, 8, generator=generator), torch.zeros(2, 3)
    together = Sweep(weight, bias, rates)
    alone = [torch.nn.Linear(8, 3) for _ in rates]
    optimizers = []
    for linear, rate, start in zip(alone, rates, weight, strict=True):
        linear.weight.data, linear.bias.data = start.clone(), torch.zeros(3)
        optimizers.append(torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9))
    for _ in range(5):
        losses = together.step(data.x, data.y, 1.0)
        for number, (linear, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            loss = cross_entropy(linear(data.x), data.y)
            assert loss.item() == pytest.approx(losses[number].item(), rel=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for number, linear in enumerate(alone):
        assert torch.allclose(together.weight[number], linear.weight, atol=1e-6)
        assert torch.allclose(together.bias[number], linear.bias, atol=1e-6)


def test_a_rate_falls_from_one_to_nothing():
    assert [half_cosine(done, 4) for done in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])


def test_batches_take_every_row_before_they_take_one_again():
    rows = torch.cat(list(batches(5, 4, 5, torch.Generator().manual_seed(0))))
    assert all(sorted(part.tolist()) == list(range(5)) for part in rows.split(5))
    assert len(set(map(tuple, rows.reshape(4, 5).tolist()))) > 1


def test_a_tenth_is_kept_aside_and_no_class_goes_with_it():
    y = torch.arange(100) % 3
    aside = tenth_of(y)
    assert int(aside.sum()) == 10
    assert torch.equal(tenth_of(y), aside)
    rare = torch.cat([torch.zeros(99, dtype=torch.long), torch.ones(1, dtype=torch.long)])
    assert all(set(rare[~tenth_of(rare[order])].tolist()) for order in (torch.arange(100), torch.arange(99, -1, -1)))
    for place in range(0, 100, 7):
        y = torch.zeros(100, dtype=torch.long)
        y[place] = 1
        assert not tenth_of(y)[place]


def test_what_is_one_image_of_each_class_cannot_be_chosen_by():
    text = "2 labelled train images, one of each class, leave none to choose a classifier by"
    with pytest.raises(DataError, match=text):
        tenth_of(torch.tensor([0, 1]))


@pytest.mark.parametrize("solver", ["sweep", "logistic"])
def test_classes_that_are_apart_are_told_apart_the_same_each_time(solver):
    train, test = blobs(40), blobs(40, seed=1)
    numbers = numbers_of(train, test, solver=solver)
    assert numbers["top1"] > 0.95
    assert numbers["top1"].low < numbers["top1"] <= numbers["top1"].high
    assert numbers_of(train, test, solver=solver) == numbers


def test_more_classes_than_five_have_a_top5():
    train, test = (blobs(20, num_classes=7, spread=0.8, seed=seed) for seed in (0, 1))
    numbers = numbers_of(train, test)
    assert numbers["top1"] < numbers["top5"] <= 1


def test_the_best_is_chosen_on_train_images_and_its_rate_is_told():
    numbers = numbers_of(blobs(40), blobs(40, seed=1))
    assert numbers.keys() == {"top1", "lr", "blocks"}
    assert numbers["lr"] in QUICK["rates"]
    assert numbers["blocks"] == 1


def test_a_choice_on_test_images_is_said_in_the_name_and_is_no_worse():
    train, test = blobs(40, spread=1.0), blobs(40, spread=1.0, seed=1)
    on_test = numbers_of(train, test, choose_on="test")
    assert on_test.keys() == {"top1_best_on_test", "lr", "blocks"}
    alone = [numbers_of(train, test, choose_on="test", rates=(rate,))["top1_best_on_test"] for rate in QUICK["rates"]]
    assert on_test["top1_best_on_test"] == max(alone)


def test_test_labels_do_not_change_what_is_chosen_on_train():
    train, test = blobs(40, spread=1.0), blobs(40, spread=1.0, seed=1)
    turned = Features(test.x, (test.y + 1) % 3)
    assert numbers_of(train, test)["lr"] == numbers_of(train, turned)["lr"]


def test_classifiers_that_diverged_are_counted_and_never_chosen(caplog):
    train, test = blobs(20), blobs(20, seed=1)
    numbers = numbers_of(train, test, rates=(0.1, 1e39))
    assert numbers["lr"] == 0.1
    assert "linear: 1 of 2 classifiers diverged; they are left out of the choice" in caplog.text
    with pytest.raises(DataError, match=r"all classifiers diverged, from a rate of 1e\+39 on; give lower rates"):
        numbers_of(train, test, rates=(1e39,))


def test_steps_follow_from_the_images_and_the_rates_from_the_steps():
    linear = Linear(Linear.Config())
    assert [linear._steps(count) for count in (10, 1_280, 1_294, 2_560, 10**6)] == [1_000, 1_000, 1_011, 2_000, 12_500]
    assert Linear(Linear.Config(steps=7))._steps(10**6) == 7
    assert Linear(Linear.Config(batch_size=32))._steps(1_280) == 4_000
    told = Linear(Linear.Config(steps=125))(subject_of(blobs(40), blobs(40, seed=1)))
    assert told["lr"] == pytest.approx(min(RATES, key=lambda rate: abs(rate * 100 - told["lr"])) * 100)


def test_features_of_small_scale_come_as_far_in_few_steps_as_in_many():
    train, test = (Features(0.02 * each.x, each.y) for each in (blobs(200, spread=0.6), blobs(200, spread=0.6, seed=1)))
    few, many = (Linear(Linear.Config(steps=steps))(subject_of(train, test))["top1"] for steps in (100, 2_000))
    assert few == pytest.approx(many, abs=0.01)
    as_they_are = Linear(Linear.Config(steps=100, rates=RATES))(subject_of(train, test))["top1"]
    assert as_they_are < few - 0.05


def test_the_highest_of_the_rates_is_told_where_it_is_the_best(caplog):
    train, test = (Features(0.02 * each.x, each.y) for each in (blobs(200, spread=0.6), blobs(20, seed=1)))
    assert numbers_of(train, test, rates=(1e-6, 1.0))["lr"] == 1.0
    text = "linear: the highest of the rates, 1, was the best; higher ones may be better: linear.rates=[...], or take"
    assert text in caplog.text
    caplog.clear()
    numbers_of(train, test, rates=(1e-3,))
    assert not caplog.text


def test_a_classifier_that_is_not_finite_has_nothing_right():
    weight = torch.tensor([[[1.0], [-1.0]], [[float("nan")], [0.0]]])
    sweep = Sweep(weight, torch.zeros(2, 2), [0.1, 0.1])
    right, finite = rightly_classified(sweep, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    assert (right.tolist(), finite.tolist()) == ([2, -1], [True, False])


def test_features_are_class_tokens_of_the_last_blocks_and_the_mean_of_the_last():
    asked = []
    subject = subject_of(blobs(10), blobs(10, seed=1))
    given = subject.features

    def features(split, *, pool, layers=(), limit=None):
        asked.append((split, pool, tuple(layers)))
        return given(split, pool=pool, layers=layers, limit=limit)

    subject.features = features
    Linear(Linear.Config(**QUICK, features=("cls", "cls+mean"), blocks=(1, 3)))(subject)
    assert asked == [
        ("train", "cls", ()), ("test", "cls", ()),
        ("train", "cls", ()), ("train", "mean", ()), ("test", "cls", ()), ("test", "mean", ()),
        ("train", "cls", (-3, -2)), ("train", "cls", ()), ("test", "cls", (-3, -2)), ("test", "cls", ()),
        ("train", "cls", (-3, -2)), ("train", "cls", ()), ("train", "mean", ()),
        ("test", "cls", (-3, -2)), ("test", "cls", ()), ("test", "mean", ()),
    ]  # fmt: skip


def test_an_encoder_without_the_blocks_or_a_class_token_is_told():
    spec = replace(SPEC, offers=Ask(layers=frozenset(range(4))))
    Linear(Linear.Config(blocks=(4,))).check(spec)
    with pytest.raises(ValueError, match=re.escape("blocks is [1, 5], but the encoder has 4")):
        Linear(Linear.Config(blocks=(1, 5))).check(spec)
    with pytest.raises(ValueError, match="pool is 'cls', but the encoder has no class token"):
        Linear(Linear.Config(features=("cls",))).check(spec)
    with pytest.raises(ValueError, match="'layers' and 'blocks' exclude each other: both say which blocks are read"):
        Linear(Linear.Config(layers=(2,), blocks=(2,))).check(spec)
    with pytest.raises(ValueError, match=re.escape("layers [4] are none of the encoder's 4 blocks")):
        Linear(Linear.Config(layers=(4,))).check(spec)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"solver": "logistic", "blocks": (1, 4)}, "solver logistic takes one kind of 'features' and one number"),
        ({"solver": "logistic", "choose_on": "test"}, "solver logistic takes choose_on: train only"),
    ],
)
def test_options_that_contradict_each_other_are_told(options, text):
    with pytest.raises(ValidationError, match=text):
        Linear.Config(**options)
