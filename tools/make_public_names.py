"""The public names of the framework with their signatures and fields, kept in docs/reference/public_names.txt.

    python tools/make_public_names.py        # writes it; refuses while CHANGELOG.md does not name what has changed

Plugins rely on these names, so none of them changes unseen: a test compares the file with the code. Start at `surface`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import mim_framework
from mim_framework import layouts, nn, testing
from mim_framework.base.schedule import Curve
from mim_framework.base.section import Choice
from mim_framework.contract import hooks
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "public_names.txt"
CHANGELOG = ROOT / "CHANGELOG.md"
COMMAND = "python tools/make_public_names.py"
HEADER = f"""\
# Public names, each with its signature, field or default. Written by `{COMMAND}`; a test compares
# them with the code. A line that changes needs a line in CHANGELOG.md that names it.
"""
GIVEN = {"contract.world": ["World"], "runtime.teachers": ["TeacherSession"], "training.run": ["Run"]}
"""Module -> classes that a plugin does not import to use: what steps and run events hand it."""
PACKAGES = {"nn": nn, "layouts": layouts}
"""Section of the file -> the package of plain functions and modules that it lists."""
BOUNDS = {
    "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of",
    "min_length": "length >=", "max_length": "length <=", "pattern": "like",
}  # fmt: skip
"""Name of a bound in pydantic -> how it is written."""
OPERATORS = ("__init__", "__call__", "__or__", "__len__", "__getitem__", "__iter__")

Surface = dict[str, dict[str, str]]
"""Section of the file -> name -> what it is."""


def surface() -> Surface:
    """What the code offers now."""
    names = {}
    for name in mim_framework.__all__:
        if name != "__version__":
            names |= described(name, getattr(mim_framework, name))
    for module, classes in GIVEN.items():
        for name in classes:
            names |= described(name, getattr(import_module(f"mim_framework.{module}"), name))
    for name, value in testing_names().items():
        names |= described(name, value)
    events = {name: f"hook {signature(hook)}" for name, hook in vars(hooks).items() if name.startswith("mim_")}
    plain = {section: names_of(package) for section, package in PACKAGES.items()}
    return {
        "names": names,
        **plain,
        "hooks": events,
        "recipe": dict(recipe_keys(Recipe)),
        "options": options_of_builtins(),
    }


def names_of(package: ModuleType) -> dict[str, str]:
    """The names of a package and their members, as name -> what it is."""
    found: dict[str, str] = {}
    for name in package.__all__:
        found |= described(name, getattr(package, name), package)
    return found


def testing_names() -> dict[str, Any]:
    """What `mim_framework.testing` offers to the tests of plugins."""
    return {name: getattr(testing, name) for name in testing.__all__}


# --- one name --------------------------------------------------------------------------------------------------------


def described(name: str, value: Any, package: ModuleType = mim_framework) -> dict[str, str]:
    """A public name of a package and its members, as name -> what it is."""
    if inspect.isclass(value):
        return {name: class_line(value), **{f"{name}.{member}": line for member, line in members(value)}}
    if inspect.isfunction(value):
        return {name: f"function {signature(value)}"}
    if _is_plain(value):
        return {name: f"constant {show(value)}"}
    return {name: f"alias {_assigned(name, package)}"}


def class_line(cls: type) -> str:
    """'frozen dataclass', 'abstract class(Component)' and the like."""
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    if dataclasses.is_dataclass(cls):
        kind = "frozen dataclass" if cls.__dataclass_params__.frozen else "dataclass"  # type: ignore[attr-defined]
    else:
        kind = "class"
    return f"{kind}({bases})" if bases else kind


def members(cls: type) -> Iterator[tuple[str, str]]:
    """Public fields, attributes and methods that a class of ours has of itself; inherited ones stand at their base."""
    own, notes = vars(cls), inspect.get_annotations(cls)
    if issubclass(cls, BaseModel):
        yield from fields(cls)
    elif dataclasses.is_dataclass(cls):
        for place, field in enumerate(dataclasses.fields(cls), start=1):
            if not field.name.startswith("_") and field.name in notes:
                yield field.name, f"field {place}: {annotation(field.type)}{default_of(field)}"
    else:
        for name, note in notes.items():
            if not name.startswith("_"):
                yield name, f"{annotation(note)}{f' = {show(own[name])}' if name in own else ''}"
    for name, value in own.items():
        if name.startswith("_") and name not in OPERATORS:
            continue
        if name == "__init__" and (dataclasses.is_dataclass(cls) or issubclass(cls, BaseModel)):
            continue  # the fields are its arguments
        if line := member_line(value):
            if line != "test":  # nobody calls it but pytest
                yield name, line
        elif name == "Config":
            yield from ((f"Config.{key}", line) for key, line in fields(value))
        elif _is_plain(value) and name not in notes and not issubclass(cls, BaseModel):
            yield name, f"= {show(value)}"


def member_line(value: Any) -> str:
    """A method or property in one line; empty for anything else."""
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {signature(value.__func__)}"
    if isinstance(value, property | cached_property):
        function = value.fget if isinstance(value, property) else value.func
        return f"property -> {annotation(inspect.signature(function).return_annotation)}"
    if inspect.isfunction(value) and value.__name__.startswith("test_"):
        return "test"  # its arguments are fixtures, which nobody passes
    if inspect.isfunction(value):
        return f"{'abstract ' if getattr(value, '__isabstractmethod__', False) else ''}method {signature(value)}"
    return ""


def signature(function: Callable[..., Any]) -> str:
    """'(view: Tensor, mask: Mask) -> Latent', as it stands in the source; without `self`, `cls` and docstrings."""
    found = inspect.signature(inspect.unwrap(function))
    parts, star = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        typed = "" if parameter.annotation is parameter.empty else f": {annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {show(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{typed}{default}")
    returns = "" if found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
    return f"({', '.join(parts)}){returns}"


def annotation(note: Any) -> str:
    """An annotation as its source writes it."""
    return note if isinstance(note, str) else inspect.formatannotation(note)


def show(value: Any) -> str:
    """A default, the same in every process: sets in order, no addresses."""
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(show, value)))}}}" if value else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, BaseModel):  # of a section that is left out, its own keys tell the defaults
        return show(value.model_dump(exclude_unset=not isinstance(value, Choice)))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {show(each)}' for key, each in value.items())}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        texts = {each.name: show(getattr(value, each.name)) for each in dataclasses.fields(value)}
        standard = {each.name: default_of(each).removeprefix(" = ") for each in dataclasses.fields(value)}
        given = (f"{name}={text}" for name, text in texts.items() if text != standard[name])
        return f"{type(value).__name__}({', '.join(given)})"
    return getattr(value, "__name__", None) or repr(value)


def default_of(field: dataclasses.Field[Any]) -> str:
    """' = 1.0', or nothing if the field must be given."""
    if field.default is not dataclasses.MISSING:
        return f" = {show(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {show(field.default_factory())}"
    return ""


def _is_plain(value: Any) -> bool:
    """A class attribute that is a value: a name, a switch, a set of names."""
    return isinstance(value, bool | int | float | str | tuple | frozenset)


def _assigned(name: str, package: ModuleType) -> str:
    """The right-hand side of the assignment that makes an alias."""
    module = import_module(f"{package.__name__}.{package._MODULE_OF[name]}")
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.unparse(node.value)
    raise ValueError(f"{name} is neither a class nor a function nor assigned at the top of {module.__name__}")


# --- recipes ---------------------------------------------------------------------------------------------------------


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """The keys of one section, with type, bounds and default."""
    for name, field in model.model_fields.items():
        note = next(
            base.__annotations__[name] for base in model.__mro__ if name in vars(base).get("__annotations__", ())
        )
        yield field.alias or name, f"{annotation(note)}{_bounds(field)}{_default(field)}"


def recipe_keys(model: type[BaseModel], prefix: str = "", seen: set[type] | None = None) -> Iterator[tuple[str, str]]:
    """All keys of recipes by path; a section that may stand in several places is written out at the first."""
    seen = set() if seen is None else seen
    seen.add(model)
    lines = dict(fields(model))
    for name, field in model.model_fields.items():
        key = field.alias or name
        yield prefix + key, lines[key]
        for inner, way in sections_in(field.annotation):
            if inner not in seen:
                yield from recipe_keys(inner, f"{prefix}{key}.{way}", seen)


def sections_in(note: Any, way: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The sections inside an annotation, each with what stands between: "NAME." in a mapping, "N." in a list.

    Components and schedules have their own places; a component is told where it has keys that are not its options.
    """
    if isinstance(note, type) and issubclass(note, BaseModel):
        plain = issubclass(note, Choice) and note.own_keys() == ["type"]
        if not plain and not issubclass(note, Curve):
            yield note, way
    inside = {dict: "NAME.", list: "N.", tuple: "N."}.get(get_origin(note), "")
    for each in get_args(note):
        yield from sections_in(each, way + inside)


def options_of_builtins() -> dict[str, str]:
    """The components that the core brings, and their options."""
    found = {}
    registry = Registry(only=())
    for kind in hooks.HOOK_OF_KIND:
        for name, cls in registry.classes(kind).items():
            found[f"{kind}.{name}"] = "component"
            config = getattr(cls, "Config", None)
            found |= {f"{kind}.{name}.{key}": line for key, line in fields(config)} if config else {}
    return found


def _bounds(field: FieldInfo) -> str:
    return "".join(
        f", {symbol} {getattr(each, name)}"
        for each in field.metadata
        for name, symbol in BOUNDS.items()
        if getattr(each, name, None) is not None
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    return f" = {show(field.get_default(call_default_factory=True))}"


# --- the file --------------------------------------------------------------------------------------------------------


def page(found: Surface) -> str:
    """The file's text."""
    lines = [HEADER]
    for section, names in found.items():
        lines += [f"[{section}]", *(f"{name}  {what}" for name, what in names.items()), ""]
    return "\n".join(lines)


def read(text: str) -> Surface:
    """The surface that a text of `page` holds."""
    found: Surface = {}
    names: dict[str, str] = {}
    for line in text.splitlines():
        if re.fullmatch(r"\[\w+\]", line):
            names = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, _, what = line.partition("  ")
            names[name] = what
    return found


def changes(old: Surface, new: Surface) -> dict[str, str]:
    """What differs: name -> 'new', 'gone' or 'was ..., is ...'."""
    found = {}
    for section in old.keys() | new.keys():
        before, after = old.get(section, {}), new.get(section, {})
        for name in sorted(before.keys() | after.keys()):
            if name not in before:
                found[name] = "new"
            elif name not in after:
                found[name] = "gone"
            elif before[name] != after[name]:
                found[name] = f"was {before[name]}, is {after[name]}"
    return dict(sorted(found.items()))


def unnamed(changed: dict[str, str], changelog: str) -> list[str]:
    """Changed names that no code span of the changelog's section 'Unreleased' holds.

    A name that is new or gone as a whole speaks for its members.
    """
    section = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    spans = " ".join(re.findall(r"`([^`]+)`", section[1] if section else ""))
    named = set(re.findall(r"[\w.]*\w", spans))

    def whole(name: str) -> bool:
        """True if what it belongs to is new or gone."""
        parts = name.split(".")
        return any(changed.get(".".join(parts[:length])) in ("new", "gone") for length in range(1, len(parts)))

    return [name for name in changed if name not in named and not whole(name)]


def main(page_path: Path = PAGE, changelog_path: Path = CHANGELOG) -> int:
    """Write the file, unless the changelog is silent about a change; returns the exit status."""
    now = surface()
    changed = changes(read(page_path.read_text()) if page_path.exists() else {}, now)
    if silent := unnamed(changed, changelog_path.read_text()):
        print(f"{page_path.name} is not written: the section 'Unreleased' of CHANGELOG.md must name, in `code`:")
        print("\n".join(f"  {name}: {changed[name]}" for name in silent))
        return 1
    page_path.parent.mkdir(exist_ok=True)
    page_path.write_text(page(now))
    print("\n".join([f"{len(changed)} changes written", *(f"  {name}: {what}" for name, what in changed.items())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
