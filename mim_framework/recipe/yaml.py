"""Reads recipes: a small, strict subset of YAML 1.2 that turns into plain data and cannot run anything.

`1e-3` is a number, `yes` and `on` are text. Refused, with file, line and column: duplicate keys, anchors and aliases,
tags, a second document, and anything too large or too deep. The parser's events are turned into data here, so that
no constructor of PyYAML is ever involved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from mim_framework.base.errors import RecipeError
from mim_framework.base.validation import shortened, show

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 20_000
"""More keys, entries and values than any recipe has, and few enough to be explained one by one."""

KeyPath = tuple[str | int, ...]

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
_MAX_DIGITS = 400  # longer than any float; Python refuses to read integers of several thousand digits

# YAML 1.2.2, section 10.3.2 (core schema)
_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """Plain data (dict with text keys, list, str, int, float, bool, None) and where each value's key stands.

    `marks` maps a key path to (line, column), both counted from 1.
    """

    data: Any
    marks: dict[KeyPath, tuple[int, int]]


def read_yaml(text: str | bytes, name: str) -> Document:
    """Read one document; `name` stands for the file in messages.

    Raises:
        RecipeError: `name:line:column: what is wrong`.
    """
    if isinstance(text, bytes):
        text = _decode(text, name)
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{name}: larger than {MAX_BYTES:,} bytes, which no recipe needs")
    if found := _CONTROL.search(text):
        line, column = _position(text, found.start())
        raise RecipeError(f"{name}:{line}:{column}: character U+{ord(found[0]):04X} is not allowed in a recipe")
    try:
        return _Builder(name, yaml.parse(text, Loader=_Loader)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        if "maximum nesting depth" in str(error.problem):  # newer libyaml, which reads ahead, sees the worst first
            raise RecipeError(f"{place}: nested deeper than {MAX_DEPTH} levels") from error
        raise RecipeError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error


def read_scalar(text: str) -> Any:
    """The value of an unquoted scalar by the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if len(text) <= _MAX_DIGITS:
        if _DECIMAL.fullmatch(text):
            return int(text)
        if _OCTAL.fullmatch(text):
            return int(text[2:], 8)
        if _HEXADECIMAL.fullmatch(text):
            return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if found := _INFINITY.fullmatch(text):
        return float(found[1] + "inf")
    if _NAN.fullmatch(text):
        return float("nan")
    return text


class _Builder:
    """Turns parser events into a `Document`."""

    def __init__(self, name: str, events: Iterator[yaml.Event]) -> None:
        self.name = name
        self.events = events
        self.marks: dict[KeyPath, tuple[int, int]] = {}
        self.num_values = 0

    def document(self) -> Document:
        data, documents = None, 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.error(event, "a second document; a recipe is one")
                data = self.value(next(self.events), ())
        return Document(data, self.marks)

    def value(self, event: yaml.Event, path: KeyPath) -> Any:
        if event.anchor is not None:
            sign = "alias '*" if isinstance(event, yaml.AliasEvent) else "anchor '&"
            raise self.error(
                event, f"{sign}{shortened(event.anchor)}': anchors and aliases are not allowed, write the value out"
            )
        if event.tag is not None:
            raise self.error(event, f"tag '{shortened(event.tag)}': tags are not allowed, a recipe is plain data")
        if len(path) > MAX_DEPTH:
            raise self.error(event, f"nested deeper than {MAX_DEPTH} levels")
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self.error(event, f"more than {MAX_VALUES:,} values, which no recipe needs")
        self.marks.setdefault(path, _place(event))
        if isinstance(event, yaml.ScalarEvent):
            return read_scalar(event.value) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            return list(self.items(path))
        return self.mapping(path)

    def items(self, path: KeyPath) -> Iterator[Any]:
        index = 0
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self.value(event, (*path, index))
            index += 1

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self.error(event, "a key must be plain text")
            if event.anchor is not None or event.tag is not None:
                self.value(event, path)  # refuses it
            key = event.value
            if key in found:
                line, _ = self.marks[(*path, key)]
                raise self.error(event, f"key {show(key)} stands here a second time, first in line {line}")
            if key == "<<":
                raise self.error(event, "merge key '<<' is not allowed, write the values out")
            self.marks[(*path, key)] = _place(event)
            found[key] = self.value(next(self.events), (*path, key))
        return found

    def error(self, event: yaml.Event, text: str) -> RecipeError:
        line, column = _place(event)
        return RecipeError(f"{self.name}:{line}:{column}: {text}")


def _place(event: yaml.Event) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _decode(text: bytes, name: str) -> str:
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{name}: larger than {MAX_BYTES:,} bytes, which no recipe needs")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        column = error.start - text.rfind(b"\n", 0, error.start)
        raise RecipeError(f"{name}:{line}:{column}: not UTF-8 text") from error


def _position(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
