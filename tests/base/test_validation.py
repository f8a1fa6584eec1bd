"""What is wrong with plain data, in words."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, Field, model_validator

from mim_framework.base.schedule import Schedule
from mim_framework.base.section import Choice, Section
from mim_framework.base.validation import Problem, annotations_at, describe, fields_at, show, validate


def _even(number: int) -> int:
    if number % 2:
        raise ValueError(f"must be even, got {number}")
    return number


class Inner(Section):
    rate: float = Field(gt=0, le=1)
    """A rate."""
    mode: Literal["fast", "exact"] = "fast"


class Outer(Section):
    count: int = 1
    flag: bool = False
    text: str = ""
    inner: Inner | None = None
    named: dict[str, Inner] = {}
    pair: tuple[float, float] = (0, 0)
    weight: Schedule = 1.0
    threads: int | Literal["auto"] = "auto"
    masker: Choice | None = None
    even: Annotated[int, AfterValidator(_even)] = 0
    short: str = Field("", max_length=3)

    @model_validator(mode="before")
    @classmethod
    def _unchanged(cls, value: object) -> object:
        return value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"coumt": 1}, "coumt: unknown key, did you mean 'count'?"),
        ({"inner": {"rate": 1, "zzz": 1}}, "inner.zzz: unknown key; known keys: rate, mode"),
        ({"inner": {}}, "inner.rate: missing, and has no default (A rate.)"),
        ({"named": {"a": {"rate": 0}}}, "named.a.rate: must be greater than 0.0, got 0"),
        ({"named": {"a": {"rate": 2}}}, "named.a.rate: must be at most 1.0, got 2"),
        ({"count": "many"}, "count: needs a whole number, got 'many'"),
        ({"count": 1.5}, "count: needs a whole number, got 1.5"),
        ({"count": "1"}, "count: needs a whole number, got '1'"),
        ({"count": True}, "count: needs a whole number, got true"),
        ({"count": None}, "count: needs a whole number, got null"),
        ({"flag": "yes"}, "flag: needs true or false, got 'yes'"),
        ({"text": 3}, "text: needs text, got 3"),
        ({"text": ["x" * 100]}, "text: needs text, got ['" + "x" * 58 + "…"),
        ({"inner": 3}, "inner: needs a mapping of keys to values, got 3"),
        ({"inner": {"rate": float("inf")}}, "inner.rate: needs a finite number, got inf"),
        (
            {"inner": {"rate": 1, "mode": "exakt"}},
            "inner.mode: must be 'fast' or 'exact', got 'exakt', did you mean 'exact'?",
        ),
        ({"pair": [1, "x"]}, "pair.1: needs a number, got 'x'"),
        ({"pair": [1, True]}, "pair.1: needs a number, got true"),
        ({"pair": [1]}, "pair.1: missing, and has no default"),
        ({"pair": 1}, "pair: needs a list, got 1"),
        ({"weight": "x"}, "weight: needs a number or a mapping of keys to values, got 'x'"),
        ({"weight": {"from": 1, "too": 2}}, "weight.too: unknown key, did you mean 'to'?"),
        ({"weight": {"from": 1}}, "weight: a cosine schedule needs 'to', the value at the end of the run"),
        ({"threads": "some"}, "threads: needs a whole number, got 'some'; or must be 'auto', got 'some'"),
        ({"masker": 3}, "masker: needs the name of a component, or a mapping with 'type' and its options, got 3"),
        ({"masker": {"ratio": 1}}, "masker: names no component; write 'type: NAME' here"),
        ({"masker": {"type": 5}}, "masker.type: needs text, got 5"),
        ({"even": 3}, "even: must be even, got 3"),
        ({"short": "long"}, "short: must have at most 3 characters, got 'long'"),
    ],
)
def test_a_problem_is_said_in_words(data, message):
    model, problems = validate(Outer, data)
    assert model is None
    assert describe(problems) == message


def test_all_problems_are_found_at_once():
    _, problems = validate(Outer, {"x": 1, "count": True, "inner": {"rate": "a"}})
    assert {problem.path for problem in problems} == {("x",), ("count",), ("inner", "rate")}


def test_good_data_becomes_the_model():
    data = {"count": 3.0, "pair": [1, 2], "weight": {"from": 1, "to": 0}, "threads": 4, "masker": {"type": "x", "a": 1}}
    model, problems = validate(Outer, data)
    assert not problems
    assert (model.count, model.pair, model.weight.end, model.threads, model.masker.options) == (
        3,
        (1, 2),
        0,
        4,
        {"a": 1},
    )


def test_annotations_and_fields_behind_a_path():
    assert annotations_at(Outer, ("pair", 1)) == [float]
    assert annotations_at(Outer, ("named", "any", "rate")) == [float]
    assert annotations_at(Outer, ("nothing",)) == []
    assert list(fields_at(Outer, ("inner",))) == ["rate", "mode"]
    assert {"from", "to"} <= fields_at(Outer, ("weight",)).keys()


def test_values_are_shown_as_in_yaml():
    assert [show(value) for value in (True, None, 1, "a")] == ["true", "null", "1", "'a'"]
    assert str(Problem((), "wrong")) == "wrong"
