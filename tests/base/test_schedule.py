"""Schedules as pure functions of the epoch."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from mim_framework.base.schedule import Curve, Schedule, epoch_of, extremes, value_at


def test_a_plain_number_is_constant():
    assert value_at(0.75, 3.0, 10.0) == 0.75


def test_cosine_with_warmup_by_hand():
    curve = Curve(shape="cosine", start=1.0, end=0.0, warmup_epochs=2)
    values = [value_at(curve, epoch, 10) for epoch in (0, 1, 2, 6, 10)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=1e-15)


def test_linear_step_and_constant_by_hand():
    line = Curve(shape="linear", start=4.0, end=2.0)
    assert [value_at(line, epoch, 4) for epoch in (0, 1, 4)] == [4.0, 3.5, 2.0]
    jumps = Curve(shape="step", start=1.0, milestones=(2, 3), gamma=0.5)
    assert [value_at(jumps, epoch, 4) for epoch in (0, 1.9, 2, 3.5)] == [1.0, 1.0, 0.5, 0.25]
    assert value_at(Curve(shape="constant", start=5.0, warmup_epochs=1, warmup_from=1.0), 0.5, 4) == 3.0


def test_momentum_rises_from_its_start_to_its_end():
    curve = Curve(shape="cosine", start=0.996, end=1.0)
    assert value_at(curve, 0, 100) == pytest.approx(0.996)
    assert value_at(curve, 50, 100) == pytest.approx(0.998)
    assert value_at(curve, 100, 100) == 1.0


def test_a_run_longer_than_its_schedule_stays_at_the_end():
    assert value_at(Curve(shape="cosine", start=1.0, end=0.1), 12, 10) == pytest.approx(0.1)
    assert math.isfinite(value_at(Curve(shape="cosine", start=1.0, end=0.1, warmup_epochs=10), 10, 10))


def test_recipes_write_from_and_to():
    schedule = TypeAdapter(Schedule)
    assert schedule.validate_python({"shape": "linear", "from": 0, "to": 1}) == Curve(shape="linear", start=0, end=1)
    assert schedule.validate_python(0.5) == 0.5
    with pytest.raises(ValidationError, match="needs 'to'"):
        schedule.validate_python({"shape": "cosine", "from": 1})


def test_a_schedule_that_does_not_move_takes_no_end():
    for shape in ("constant", "step"):
        with pytest.raises(ValidationError, match=f"a {shape} schedule takes no 'to'; use shape cosine or linear"):
            Curve(shape=shape, start=1.0, end=0.0)


def test_extremes_are_the_turning_points():
    assert extremes(0.5) == (0.5,)
    assert extremes(Curve(start=0.9, end=1.0)) == (0.9, 1.0)
    assert extremes(Curve(start=0.9, end=1.0, warmup_epochs=1, warmup_from=-1)) == (-1, 0.9, 1.0)
    assert extremes(Curve(shape="step", start=1.0, gamma=2.0, milestones=(1, 2))) == (1.0, 4.0)
    assert extremes(Curve(shape="constant", start=1.0)) == (1.0, 1.0)


def rates(curve: Curve, steps_per_epoch: int, epochs: int) -> list[float]:
    epochs_of = [epoch_of(index, steps_per_epoch) for index in range(steps_per_epoch * epochs)]
    return [value_at(curve, epoch, epochs, steps_per_epoch) for epoch in epochs_of]


def test_an_inclusive_warmup_reaches_its_end_one_step_early_by_hand():
    curve = Curve(shape="linear", start=1.0, end=0.0, warmup_epochs=1, warmup_inclusive=True)
    assert rates(curve, 3, 2) == pytest.approx([0.0, 0.5, 1.0, 1.0, 2 / 3, 1 / 3])
    assert rates(curve.model_copy(update={"warmup_epochs": 1 / 3}), 3, 1)[0] == 1.0  # a warm-up of one step is none


def test_a_lagging_schedule_gives_the_first_two_steps_one_value_by_hand():
    curve = Curve(shape="linear", start=1.0, end=0.0, warmup_epochs=1, lag_steps=1)
    assert rates(curve, 2, 2) == pytest.approx([0.0, 0.0, 0.5, 1.0])


def test_a_cosine_counted_from_the_start_jumps_down_after_its_warmup_by_hand():
    curve = Curve(start=1.0, end=0.0, warmup_epochs=2, counted_from="run_start")
    assert [value_at(curve, epoch, 4) for epoch in (0, 1, 2, 4)] == pytest.approx([0.0, 0.5, 0.5, 0.0])


def test_a_schedule_of_epochs_stands_still_within_one_by_hand():
    curve = Curve(shape="linear", start=1.0, end=0.0, per_epoch=True)
    assert rates(curve, 3, 2) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    warmed = Curve(shape="constant", start=1.0, warmup_epochs=2, per_epoch=True)
    assert rates(warmed, 2, 3) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]


def test_without_the_length_of_an_epoch_steps_cannot_be_counted():
    curve = Curve(shape="linear", start=1.0, end=0.0, warmup_epochs=1, warmup_inclusive=True, lag_steps=1)
    assert value_at(curve, 0.5, 2) == 0.5
