"""Checks plain data against a config class and says what is wrong in words, instead of pydantic's own."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mim_framework.base.errors import did_you_mean
from mim_framework.base.section import Choice

KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

_NEEDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "none_required": "null",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "path_type": "a path",
}
_BOUNDS = {
    "greater_than": ("gt", "be greater than {}"),
    "greater_than_equal": ("ge", "be at least {}"),
    "less_than": ("lt", "be less than {}"),
    "less_than_equal": ("le", "be at most {}"),
    "multiple_of": ("multiple_of", "be a multiple of {}"),
    "too_short": ("min_length", "have at least {} entries"),
    "too_long": ("max_length", "have at most {} entries"),
    "string_too_short": ("min_length", "have at least {} characters"),
    "string_too_long": ("max_length", "have at most {} characters"),
    "string_pattern_mismatch": ("pattern", "match {}"),
}
_LONGEST_VALUE = 60
_MOST_EXPLAINED = 200
"""So many problems of one section are explained; the others are only counted, as an explanation takes time."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe: where, and what."""

    path: KeyPath
    message: str

    def __str__(self) -> str:
        return f"{key(self.path)}: {self.message}" if self.path else self.message


def key(path: KeyPath) -> str:
    """('heads', 'main', 'weight') -> 'heads.main.weight'."""
    return ".".join(shortened(str(part)) for part in path)


def show(value: Any) -> str:
    """A value as it stands in a recipe, shortened."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return shortened(text)


def shortened(text: str) -> str:
    """A text that may be of any length, for a message."""
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def validate(model: type[Model], data: Any) -> tuple[Model | None, list[Problem]]:
    """The validated model, or every problem with the data.

    Values are taken as YAML means them: `true` is no number and `"1"` is text, where pydantic would convert.
    """
    try:
        found, problems = model.model_validate(data), []
    except ValidationError as error:
        found, problems = None, _problems(model, data, error)
    known = {problem.path for problem in problems}
    problems += [problem for problem in _converted(model, data) if problem.path not in known]
    return (None if problems else found), problems


def leaves(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value of nested dicts and lists that is neither, with its path."""
    if isinstance(data, dict | list):
        for part, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, part))
    else:
        yield path, data


def _converted(model: type[BaseModel], data: Any) -> Iterator[Problem]:
    """Texts and booleans that pydantic would silently turn into numbers or booleans."""
    for path, value in leaves(data):
        allowed = {each for each in annotations_at(model, path) if each is not type(None) and not _is_model(each)}
        number = "a number" if float in allowed else "a whole number"
        if isinstance(value, bool) and allowed and allowed <= {int, float}:
            yield Problem(path, f"needs {number}, got {show(value)}")
        elif isinstance(value, str) and allowed and allowed <= {int, float, bool}:
            yield Problem(path, f"needs {'true or false' if bool in allowed else number}, got {show(value)}")


def annotations_at(annotation: Any, path: KeyPath) -> list[Any]:
    """The annotations of the fields that `path` leads to; several behind a union, none for an unknown key."""
    found = _alternatives(annotation)
    for part in path:
        found = [each for option in found for inner in _children(option, part) for each in _alternatives(inner)]
    return found


def fields_at(annotation: Any, path: KeyPath) -> dict[str, Any]:
    """The keys that may stand at `path`, with their pydantic fields."""
    models = [each for each in annotations_at(annotation, path) if _is_model(each)]
    return {field.alias or name: field for model in models for name, field in model.model_fields.items()}


def _alternatives(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [each for option in get_args(annotation) for each in _alternatives(option)]
    return [annotation]


def _children(annotation: Any, part: str | int) -> list[Any]:
    if _is_model(annotation):
        return [field.annotation for name, field in annotation.model_fields.items() if part in (name, field.alias)]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict and isinstance(part, str):
        return [arguments[1]]
    if origin is list or (origin is tuple and Ellipsis in arguments):
        return [arguments[0]]
    return list(arguments[part : part + 1]) if origin is tuple and isinstance(part, int) else []


def is_choice(annotation: Any) -> bool:
    """Whether a component is chosen there."""
    return _is_model(annotation) and issubclass(annotation, Choice)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _problems(model: type[BaseModel], data: Any, error: ValidationError) -> list[Problem]:
    """One problem per place. Of a union, the branch that the value comes nearest to is reported."""
    branches: dict[KeyPath, dict[str, list[tuple[KeyPath, Any]]]] = {}
    found: list[Problem] = []
    for number, each in enumerate(error.errors(include_url=False, include_context=True)):
        if number >= _MOST_EXPLAINED:
            found.append(Problem(_locate(data, each["loc"], each["type"])[0], each["msg"]))
            continue
        path, union, branch = _locate(data, each["loc"], each["type"])
        if union is None:
            found.append(Problem(path, _message(model, data, path, each)))
        else:
            branches.setdefault(union, {}).setdefault(branch, []).append((path, each))
    for union, errors_of in branches.items():
        fitting = [errors for errors in errors_of.values() if not _is_mismatch(errors, union)]
        if fitting:
            nearest = min(fitting, key=len)
            found += [Problem(path, _message(model, data, path, each)) for path, each in nearest]
        else:
            messages = [_message(model, data, path, each) for errors in errors_of.values() for path, each in errors]
            found.append(Problem(union, _join(messages)))
    return found


def _is_mismatch(errors: list[tuple[KeyPath, Any]], union: KeyPath) -> bool:
    """True if the value as a whole is of another type than this branch of the union takes."""
    return any(path == union and each["type"] in (*_NEEDS, "literal_error") for path, each in errors)


def _join(messages: list[str]) -> str:
    """['needs a number, got 'x'', 'needs a mapping, got 'x''] -> 'needs a number or a mapping, got 'x''."""
    unique = list(dict.fromkeys(messages))
    head, _, got = unique[0].rpartition(", got ")
    if head and all(each.startswith("needs ") and each.endswith(f", got {got}") for each in unique):
        needs = " or ".join(each.removeprefix("needs ").removesuffix(f", got {got}") for each in unique)
        return f"needs {needs}, got {got}"
    return "; or ".join(unique)


def _locate(data: Any, location: tuple[str | int, ...], kind: str) -> tuple[KeyPath, KeyPath | None, str]:
    """pydantic's location -> (path in the data, path of the union on the way, its branch).

    pydantic's locations hold the names of union branches among the keys; what is no key of the data is taken for one.
    """
    path: KeyPath = ()
    union, branch = None, ""
    for index, part in enumerate(location):
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and part in range(len(data))):
            data = data[part]
            path = (*path, part)
        elif index == len(location) - 1 and kind == "missing":
            path = (*path, part)
        elif isinstance(part, str) and union is None and part != "[key]":
            union, branch = path, part
    return path, union, branch


def _message(model: type[BaseModel], data: Any, path: KeyPath, error: Any) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    choice = any(is_choice(each) for each in annotations_at(model, path))
    if choice and kind == "string_too_short":
        return "names no component; write 'type: NAME' here"
    if kind == "extra_forbidden":
        known = list(fields_at(model, path[:-1]))
        hint = did_you_mean(str(path[-1]), known) or f"; known keys: {', '.join(known) or 'none'}"
        return f"unknown key{hint}"
    if kind == "missing":
        field = fields_at(model, path[:-1]).get(str(path[-1]))
        help_text = f" ({field.description})" if field is not None and field.description else ""
        return f"missing, and has no default{help_text}"
    if kind == "model_type" and choice:
        return f"needs the name of a component, or a mapping with 'type' and its options, got {show(value)}"
    if kind in _NEEDS:
        return f"needs {_NEEDS[kind]}, got {show(value)}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must {words.format(context[bound])}, got {show(value)}"
    if kind in ("literal_error", "enum"):
        wanted = context["expected"]
        names = [each.strip("' ") for each in wanted.replace(" or ", ", ").split(",")]
        return f"must be {wanted}, got {show(value)}{did_you_mean(str(value), names)}"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    text = error["msg"]
    return f"{text[:1].lower()}{text[1:]}, got {show(value)}"


def describe(problems: Iterable[Problem]) -> str:
    """Problems of a single component, in one line."""
    return "; ".join(str(problem) for problem in problems)
