"""The page on a run's health: it holds what was found, escapes every text, and needs nothing but itself."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from mim_framework.evaluate.health.curves import curve_svg
from mim_framework.evaluate.health.report import (
    Page,
    Training,
    as_html,
    as_markdown,
    curves_of,
    facts_of,
    last_numbers,
)
from mim_framework.evaluate.health.verdicts import Facts, judge

NASTY = "<script>alert(1)</script> | *a* [x](javascript:y) & \"'"
HISTORY = [
    {"step": 10, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0},
    {"step": 20, "loss": 2.0, "lr": 0.2, "grad_norm": 1.0, "skipped_steps": 2.0},
    {"step": 20, "health_loss": 1.9, "health_rankme": 5.0, "health_attention_entropy/0": 0.9},
    {"step": 30, "loss": math.inf, "lr": 0.1, "grad_norm": 1.0},
    {"step": 30, "health_loss": 1.5, "health_rankme": 6.0, "health_attention_entropy/0": 0.8},
]


def page(text: str = "run") -> Page:
    judgement = judge(Facts({"norms_at_start/teacher/" + text: 1.0, "grad_norm_spikes": 0.0}))
    picture, curve = Image.new("RGB", (4, 4), "red"), curve_svg(text, {text: [(1, 2.0)], "b": [(1, 1.0)]})
    return Page(text, judgement, {text: 1.0}, [text], {text: picture}, {text: curve}, {text: text})


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


def test_no_text_becomes_a_tag_and_nothing_is_fetched():
    found, plain = parsed(as_html(page(NASTY))), parsed(as_html(page()))
    assert found.tags == plain.tags
    assert "script" not in found.tags
    assert any(NASTY in text for text in found.text)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "href"]
    assert all(value.startswith("data:image/png;base64,") for name, value in found.attributes if name == "src")
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in found.attributes


def test_no_text_becomes_markdown():
    text = as_markdown(page(NASTY))
    assert "<script>" not in text
    assert "](javascript" not in text
    of_numbers = [line for line in text.splitlines() if line.startswith("| ") and "1 |" in line]
    assert len(of_numbers) == 1
    assert len(re.findall(r"(?<!\\)\|", of_numbers[0])) == 4


def test_the_worst_is_said_first_with_what_to_try():
    text = as_markdown(page())
    assert text.startswith("# Health of run\n\n**untrained teacher**: A network that has learned nothing is what")
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert lines[0].startswith("- ✗ teacher: Teacher 'run' has learned nothing")
    assert " Try: Give it weights \\(teachers.run.checkpoint\\)" in lines[0]
    assert lines[1].startswith("- ✓ gradient")


def test_facts_are_read_from_the_metrics():
    numbers = last_numbers(HISTORY)
    assert numbers == {"loss": 1.5, "rankme": 6.0, "attention_entropy/0": 0.8}
    facts = facts_of(numbers, HISTORY, Training(adam=True))
    assert (list(facts.losses), facts.skipped, facts.rate, facts.adam, facts.moving) == (
        [3.0, 2.0, math.inf], 2, 0.2, True, False,
    )  # fmt: skip
    assert last_numbers([]) == {}


def test_curves_are_those_of_the_metrics():
    curves = curves_of(HISTORY)
    assert list(curves) == [
        "loss", "learning rate", "norm of the gradient", "loss kept aside", "RankMe", "entropy of attention",
    ]  # fmt: skip
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") for svg in curves.values())
    assert curves_of([]) == {}


def test_a_curve_goes_from_corner_to_corner_with_a_gap_where_it_is_not_finite():
    svg = curve_svg("a < b", {"x": [(0, 0.0), (1, 1.0), (2, math.nan), (3, 2.0), (4, 4.0)]}, marks=[1])
    lines = [re.findall(r"[-\d.]+,[-\d.]+", each) for each in re.findall(r'points="([^"]+)"', svg)]
    assert [len(line) for line in lines] == [2, 2]
    assert lines[0][0] == "58.0,146.0"
    assert lines[1][-1] == "410.0,26.0"
    assert svg.count("stroke-dasharray") == 1
    assert "a &lt; b" in svg


@pytest.mark.parametrize("curve", [[], [(1, math.nan)], [(1, 2.0)], [(1, 2.0), (2, 2.0)]])
def test_a_curve_of_hardly_anything_is_still_a_picture(curve):
    svg = curve_svg("x", {"x": curve})
    assert ElementTree.fromstring(svg) is not None
    assert "nan" not in svg
