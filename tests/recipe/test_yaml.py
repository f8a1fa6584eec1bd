"""The YAML that recipes are written in."""

from __future__ import annotations

import contextlib
import json
import math
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_framework.base.errors import RecipeError
from mim_framework.recipe import yaml as yaml_loader
from mim_framework.recipe.yaml import MAX_DEPTH, read_scalar, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1.5e-4", 0.00015), ("1.", 1.0), (".5", 0.5), ("+3", 3), ("-3", -3), ("010", 10), ("0o10", 8),
        ("0x1F", 31), ("-.inf", -math.inf), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("1:30", "1:30"), ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("e3", "e3"), ("1e", "1e"), (".", "."), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    found = read_yaml(f"key: {text}", "r.yaml").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_and_endless_integers_are_floats():
    assert math.isnan(read_scalar(".nan"))
    assert read_scalar("9" * 5000) == math.inf


def test_quoted_scalars_are_text():
    assert read_yaml("a: '1'\nb: \"true\"\nc: |\n  1\n", "r.yaml").data == {"a": "1", "b": "true", "c": "1\n"}


def test_every_key_and_item_has_its_place():
    document = read_yaml("a:\n  b: 1\n  c: [x, {d: 2}]\n", "r.yaml")
    assert document.data == {"a": {"b": 1, "c": ["x", {"d": 2}]}}
    assert document.marks == {
        (): (1, 1),
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
        ("a", "c"): (3, 3),
        ("a", "c", 0): (3, 7),
        ("a", "c", 1): (3, 10),
        ("a", "c", 1, "d"): (3, 11),
    }


def test_keys_are_text():
    assert read_yaml("1: a\nnull: b\n", "r.yaml").data == {"1": "a", "null": "b"}


def test_a_byte_order_mark_is_skipped():
    assert read_yaml(b"\xef\xbb\xbfa: 1", "r.yaml").data == {"a": 1}


ALIAS_BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "duplicate key": ("a: 1\nb: 2\na: 3\n", r"r.yaml:3:1: key 'a' stands here a second time, first in line 1"),
    "duplicate of quoted": ("x:\n  '1': 1\n  1: 2\n", r"r.yaml:3:3: key '1' stands here a second time"),
    "alias bomb": (ALIAS_BOMB, r"r.yaml:1:4: anchor '&a': anchors and aliases are not allowed"),
    "self reference": ("a: &a [*a]\n", r"r.yaml:1:4: anchor '&a'"),
    "alias": ("a: 1\nb: *a\n", r"r.yaml:2:4: alias '\*a'"),
    "alias as key": ("*a : 1\n", r"r.yaml:1:1: a key must be plain text"),
    "merge key": ("<<: {a: 1}\n", r"r.yaml:1:1: merge key"),
    "python object": ("a: !!python/object/apply:os.system [ls]\n", r"r.yaml:1:4: tag .*python/object.*not allowed"),
    "local tag": ("a: !x 1\n", r"r.yaml:1:4: tag '!x'"),
    "tagged key": ("!!python/name:os.system : 1\n", r"r.yaml:1:1: tag "),
    "anchored key": ("&x a: 1\n", r"r.yaml:1:1: anchor '&x'"),
    "list as key": ("? [a]\n: 1\n", r"r.yaml:1:3: a key must be plain text"),
    "second document": ("a: 1\n---\nb: 2\n", r"r.yaml:2:1: a second document"),
    "syntax": ("a: [1\nb: 2\n", r"r.yaml:2:2: not valid YAML: "),
    "tab": ("a:\n\tb: 1\n", r"r.yaml:2:1: not valid YAML: .*token"),
    "NUL": ("a: 1\nb: \0\n", r"r.yaml:2:4: character U\+0000 is not allowed"),
    "surrogate": ("a: \ud800\n", r"r.yaml:1:4: character U\+D800 is not allowed"),
    "latin-1": (b"a: 1\nb: caf\xe9\n", r"r.yaml:2:7: not UTF-8 text"),
    "utf-16": ("a: 1".encode("utf-16"), r"r.yaml:1:1: not UTF-8 text"),
    "deep": ("[" * 500, rf"r.yaml:1:{MAX_DEPTH + 2}: nested deeper than {MAX_DEPTH} levels"),
    "very deep": ("[" * 100_000, rf"r.yaml:1:\d+: nested deeper than {MAX_DEPTH} levels"),  # libyaml may stop at 1000
    "deep blocks": ("- " * 100_000, r"nested deeper than"),
    "large text": ("a: " + "x" * 1_000_000, r"r.yaml: larger than 1,000,000 bytes"),
    "large file": (b"a" * 1_000_001, r"r.yaml: larger than 1,000,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("loader", ["libyaml", "python"])
@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_refused_with_its_place_and_at_once(case, loader, monkeypatch):
    if loader == "python":
        monkeypatch.setattr(yaml_loader, "_Loader", yaml.SafeLoader)
    text, message = BAD[case]
    start = time.process_time()
    with pytest.raises(
        RecipeError, match="(?s)" + (message if loader == "libyaml" else message.replace("2:2", r"2:\d"))
    ):
        read_yaml(text, "r.yaml")
    assert time.process_time() - start < 2


@settings(deadline=None)
@given(st.text() | st.binary())
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(RecipeError):
        read_yaml(text, "r.yaml")


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126))
)


@settings(deadline=None, max_examples=50)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner)))
def test_json_is_yaml(data):
    assert read_yaml(json.dumps(data), "r.yaml").data == data
