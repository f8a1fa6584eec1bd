"""The reference: pages in docs/reference from docstrings and from the options of recipes, components and commands.

    python tools/make_reference.py        # writes them

What is shown comes from the plugins of this repository, whatever else is installed. Start at `pages`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import tomllib
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from make_public_names import (
    GIVEN,
    OPERATORS,
    PACKAGES,
    default_of,
    member_line,
    sections_in,
    show,
    signature,
    testing_names,
)
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import mim_framework
from mim_framework import testing
from mim_framework.base.schedule import Curve
from mim_framework.base.section import Choice
from mim_framework.commands import cli
from mim_framework.contract import hooks
from mim_framework.contract.components import Component
from mim_framework.contract.kinds import KINDS
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.yaml import read_yaml
from mim_framework.registry.installed import RecipeInfo
from mim_framework.registry.registry import Registry

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
COMMAND = "python tools/make_reference.py"
MADE = f"<!-- Made by `{COMMAND}` from the code; change it there. -->"

INDEX = """\
| page | what |
|---|---|
| [Hooks](hooks.md) | what a plugin can register, and the events it is told about |
| [Components](components.md) | base classes: what to set, what to override |
| [Records](records.md) | what passes between the slots of a step, and what builders publish |
| [Handed to plugins](handed.md) | what steps and events bring, and no plugin imports |
| [Functions](functions.md) | tensor functions and constants to import |
| [Plain modules](nn.md) | what `mim_framework.nn` has: attention, blocks, patches, positions, masks, first weights |
| [Layouts](layouts.md) | what `mim_framework.layouts` has: weights of other code bases under the names of ours |
| [Errors](errors.md) | what the command line prints without a traceback |
| [Tests](testing.md) | help for the tests of plugins |
| [Recipe](recipe.md) | every key of a recipe, with type, default and meaning |
| [Installed](installed.md) | the components of all plugins of this repository, with their options |
| [Recipes](recipes.md) | the recipes they ship |
| [Commands](commands.md) | the command line |

## What is public

Names that `mim_framework`, `mim_framework.nn`, `mim_framework.layouts` and `mim_framework.testing` export (`__all__` of
each) with their signatures and fields, hook specs, recipe keys, and the classes that hooks and steps hand to plugins.
[public_names.txt](public_names.txt) lists them; a test compares
the list with the code, and the list is written only when the changelog names what has changed. Other names may change
in any release.

Records grow by optional fields and hooks by new hooks, which disturbs no plugin. What would break a plugin that follows
these pages raises `API_VERSION`. A module that says `requires_api = "2"` is refused by a framework of another version,
with a message that names the plugin and what to upgrade; one that says nothing is taken as it comes.
"""


def house_plugins() -> Registry:
    """The plugins of this repository and the built-in one."""
    files = sorted(ROOT.glob("plugins/*/pyproject.toml"))
    projects = [tomllib.loads(file.read_text())["project"] for file in files]
    return Registry(only=[name for project in projects for name in project["entry-points"]["mim_framework"]])


def pages() -> dict[str, str]:
    """File name -> text."""
    registry = house_plugins()
    return {
        "README.md": joined("Reference", INDEX),
        "hooks.md": hooks_page(),
        "components.md": components_page(),
        "records.md": records_page(),
        "handed.md": handed_page(),
        "functions.md": functions_page(),
        **{f"{section}.md": package_page(package, title) for section, (package, title) in plain_packages().items()},
        "errors.md": errors_page(),
        "testing.md": testing_page(),
        "recipe.md": recipe_page(Recipe),
        "installed.md": installed_page(registry),
        "recipes.md": recipes_page(registry),
        "commands.md": commands_page(cli.main),
    }


def plain_packages() -> dict[str, tuple[types.ModuleType, str]]:
    """Section -> the package, and the title of its page."""
    titles = {"nn": "Plain modules", "layouts": "Layouts"}
    return {section: (package, titles[section]) for section, package in PACKAGES.items()}


def joined(title: str, *blocks: str) -> str:
    """Blocks of Markdown as a page."""
    return "\n\n".join([MADE, f"# {title}", *(block.strip("\n") for block in blocks if block.strip())]) + "\n"


# --- text ------------------------------------------------------------------------------------------------------------


def markdown(docstring: str | None) -> str:
    """A docstring of the house as Markdown: `Args:` and `Raises:` become lists, code stays as it is."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc((docstring or "").rstrip())):
        if section := re.match(r"(Args|Raises|Returns|Yields):\n", block):
            entries = re.split(r"\n(?=\S)", textwrap.dedent(block[section.end() :]))
            items = (entry.partition(":") for entry in entries)
            listed = "\n".join(f"- `{name}`: {_unindented(text)}" for name, _, text in items)
            blocks.append(f"{section[1]}:\n\n{listed}")
        elif block.startswith("    "):
            blocks.append(block)
        elif block:
            blocks.append(_escaped(block))
    return "\n\n".join(blocks)


def _unindented(text: str) -> str:
    """The text of a list entry, its further lines indented by two."""
    first, *rest = text.strip().splitlines()
    return "\n".join([_escaped(first), *(f"  {_escaped(line.strip())}" for line in rest)])


def _escaped(text: str) -> str:
    """Stars, underscores and brackets outside of code that Markdown would take for its own."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<]|(?<!\w)_)", r"\\\1", part) for part in parts)


def item(head: str, text: str) -> str:
    """A list item: what it is, then its help, whose further lines are indented to belong to it."""
    first, *rest = (f"{head}: {text}" if text else head).splitlines()
    return "\n".join([f"- {first}", *(f"  {line}" if line else "" for line in rest)])


# --- names of the framework ------------------------------------------------------------------------------------------


PAGE_OF_MODULE = {
    **dict.fromkeys(("contract.records", "contract.mask", "contract.specs", "contract.step"), "records"),
    "base.errors": "errors",
    "base.schedule": "schedule",
}
"""Modules whose classes stand together on a page of their own."""


def exported(page: str) -> Iterator[tuple[str, Any]]:
    """The public names that stand on a page, in the order in which they are exported."""
    for name, module in mim_framework._MODULE_OF.items():
        value = getattr(mim_framework, name)
        if inspect.isfunction(value):
            home = "functional"
        elif module in PAGE_OF_MODULE:
            home = PAGE_OF_MODULE[module]
        else:
            home = "classes" if inspect.isclass(value) else "constants"
        if home == page:
            yield name, value


def documentation(name: str, value: Any, package: types.ModuleType = mim_framework) -> str:
    """The docstring of a class or function, or the text under an assignment."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__doc__ or ""
    module = import_module(f"{package.__name__}.{package._MODULE_OF[name]}")
    return texts_under(inspect.getsource(module)).get(name, "")


def texts_under(source: str) -> dict[str, str]:
    """The strings that stand under assignments at the top of a module or in a class, by name."""
    body = ast.parse(textwrap.dedent(source)).body
    if len(body) == 1 and isinstance(body[0], ast.ClassDef):
        body = body[0].body
    found = {}
    for node, below in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(targets[0], ast.Name):
            found[targets[0].id] = inspect.cleandoc(str(below.value.value))
    return found


def entry(name: str, value: Any, package: types.ModuleType = mim_framework) -> str:
    """A public name of a package with its documentation and its members."""
    code = f"```python\n{name}{signature(value)}\n```" if inspect.isfunction(value) else ""
    inside = ""
    if inspect.isclass(value):
        inside = options(value) if issubclass(value, BaseModel) and value.model_fields else members(value)
    blocks = [f"## `{name}`", code, markdown(documentation(name, value, package)), inside]
    return "\n\n".join(block for block in blocks if block)


def members(cls: type) -> str:
    """Fields, attributes and methods of a class, in lists."""
    groups: dict[str, list[str]] = {}
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    for field in fields:
        if not field.name.startswith("_"):
            groups.setdefault("Fields", []).append(f"- `{field.name}: {field.type}{default_of(field)}`")
    if not fields and not issubclass(cls, BaseModel):
        groups["Attributes"] = list(attributes(cls))
    for name, value in vars(cls).items():
        line = member_line(value)
        if not line or (name.startswith("_") and name not in OPERATORS) or (name == "__init__" and fields):
            continue
        kind, typed = re.fullmatch(r"(.*?) ?((?:\(|->).*)?", line).groups(default="")  # type: ignore[union-attr]
        head = cls.__name__ if name == "__init__" else name
        head += f" {typed}" if kind == "property" else typed
        group = {"abstract method": "Must override", "property": "Properties", "test": "Tests"}.get(kind, "Methods")
        groups.setdefault(group, []).append(item(f"`{head}`", markdown(own_docstring(cls, name))))
    return "\n\n".join(f"{title}:\n\n" + "\n".join(lines) for title, lines in groups.items() if lines)


def own_docstring(cls: type, name: str) -> str:
    """The docstring of a member, or that of the base class of ours that it overrides."""
    for base in cls.__mro__:
        found = vars(base).get(name)
        if base.__module__.startswith("mim_framework") and found is not None and found.__doc__:
            return found.__doc__
    return ""


def attributes(cls: type) -> Iterator[str]:
    """The annotated attributes of a class with the texts under them, then those to which it gives another value."""
    notes, texts = inspect.get_annotations(cls), texts_under(inspect.getsource(cls))
    for name, note in notes.items():
        if not name.startswith("_"):
            default = f" = {show(vars(cls)[name])}" if name in vars(cls) else ""
            yield item(f"`{name}: {note}{default}`", markdown(texts.get(name)))
    for name, value in vars(cls).items():
        if isinstance(value, bool | str | int) and name not in notes and not name.startswith("_") and name != "kind":
            yield item(f"`{name} = {show(value)}`", markdown(texts.get(name)))


# --- pages of names --------------------------------------------------------------------------------------------------


def hooks_page() -> str:
    """Every hook spec, the registering ones first."""
    specs = {name: hook for name, hook in vars(hooks).items() if name.startswith("mim_")}
    blocks = [markdown(hooks.__doc__)]
    for title, registers in (("Components", True), ("Run events", False)):
        blocks.append(f"## {title}")
        for name, hook in specs.items():
            if (name in hooks.HOOK_OF_KIND.values()) == registers:
                typed = signature(hook).replace("c.", "")
                blocks.append(f"### `{name}`\n\n```python\n{name}{typed}\n```\n\n{markdown(hook.__doc__)}")
    return joined("Hooks", *blocks)


def components_page() -> str:
    """The base classes of components, then the other classes that are exported."""
    bases = {cls.__name__: cls for cls in (Component, *KINDS.values())}
    return joined(
        "Components",
        markdown(import_module("mim_framework.contract.components").__doc__),
        *(entry(name, cls) for name, cls in bases.items()),
        *(entry(name, cls) for name, cls in exported("classes") if name not in bases),
    )


def records_page() -> str:
    """The records."""
    doc = import_module("mim_framework.contract.records").__doc__
    return joined("Records", markdown(doc), *(entry(name, value) for name, value in exported("records")))


def handed_page() -> str:
    """The classes that steps and events hand to plugins."""
    modules = {name: import_module(f"mim_framework.{module}") for module, names in GIVEN.items() for name in names}
    text = "A step brings `World` and `TeacherSession`, an event `Run`."
    return joined("Handed to plugins", text, *(entry(name, getattr(module, name)) for name, module in modules.items()))


def functions_page() -> str:
    """Functions and constants."""
    names = [*exported("functional"), *exported("constants")]
    return joined("Functions and constants", *(entry(name, value) for name, value in names))


def package_page(package: types.ModuleType, title: str) -> str:
    """The names of a package, of those that `mim_framework` has too a list only."""
    both = ", ".join(f"`{name}`" for name in package.__all__ if name in mim_framework.__all__)
    own = [name for name in package.__all__ if name not in mim_framework.__all__]
    text = f"Imported from `{package.__name__}`. So are, beside their place in `mim_framework`: {both}."
    entries = (entry(name, getattr(package, name), package) for name in own)
    return joined(title, markdown(package.__doc__), text, *entries)


def errors_page() -> str:
    """The errors that a user can cause."""
    doc = import_module("mim_framework.base.errors").__doc__
    return joined("Errors", markdown(doc), *(entry(name, value) for name, value in exported("errors")))


def testing_page() -> str:
    """What `mim_framework.testing` offers to the tests of plugins."""
    return joined("Tests", markdown(testing.__doc__), *(entry(name, value) for name, value in testing_names().items()))


# --- options ---------------------------------------------------------------------------------------------------------

WORDS = {int: "whole number", float: "number", bool: "true or false", Any: "any value"}
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}", "multiple_of": "multiple of {}"}
LENGTHS = {"min_length": "at least {}", "max_length": "at most {}"}


def options(model: type[BaseModel]) -> str:
    """The options of a section or component, one list item each."""
    items = []
    for name, field in model.model_fields.items():
        facts = ", ".join([kind_of(field.annotation, field.metadata), *_default(field)])
        items.append(item(f"`{field.alias or name}` ({facts})", markdown(field.description)))
    return "\n".join(items)


def kind_of(note: Any, bounds: list[Any] | tuple[Any, ...] = ()) -> str:
    """What may stand there, in words: 'number above 0', 'list of texts', 'one of `a` and `b`'."""
    origin, inside = get_origin(note), get_args(note)
    if origin is Annotated:
        return kind_of(inside[0], [each for extra in inside[1:] for each in getattr(extra, "metadata", [extra])])
    if origin in (Union, types.UnionType):
        if set(inside) == {float, Curve}:
            return "number or [schedule](recipe.md#schedules)"
        return " or ".join(kind_of(each, bounds) for each in inside if each is not type(None))
    limits = " and ".join(
        words.format(_number(getattr(each, name)))
        for each in bounds
        for name, words in (BOUNDS if note in (int, float) else LENGTHS).items()
        if getattr(each, name, None) is not None
    )
    if origin is Literal:
        *most, last = [f"`{_yaml(each)}`" for each in inside]
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple and Ellipsis not in inside:
        return f"[{', '.join(map(kind_of, inside))}]"
    if origin in (list, tuple):
        return f"list{f' of {limits}' if limits else ''}, each {kind_of(inside[0])}"
    if origin is dict:
        return "mapping" if inside[1] is Any else f"mapping of names, each {kind_of(inside[1])}"
    if note is str:
        return "text" if limits in ("", "at least 1") else f"text of {limits} characters"
    if note in WORDS:
        return f"{WORDS[note]} {limits}".strip()
    if issubclass(note, BaseModel):
        return "component" if issubclass(note, Choice) else "section"
    raise TypeError(f"no words for the annotation {note}")


def _default(field: FieldInfo) -> list[str]:
    if field.is_required():
        return ["required"]
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Choice):
        return [f"default `{value.type}`"]
    if isinstance(value, tuple) and any(isinstance(each, Choice) for each in value):
        return [f"default `[{', '.join(each.type for each in value)}]`"]
    if isinstance(value, BaseModel):
        return []
    return ["optional"] if value is None else [f"default `{_yaml(value)}`"]


def _yaml(value: Any) -> str:
    """A value as a recipe would write it."""
    if isinstance(value, tuple | list | frozenset | set):
        return f"[{', '.join(map(_yaml, sorted(value) if isinstance(value, frozenset | set) else value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(each)}' for key, each in value.items())}}}"
    return value if isinstance(value, str) and value else _number(value)


def _number(value: Any) -> str:
    """At most four digits after the point; huge powers of two as such."""
    if isinstance(value, int) and value > 2**40 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:.4g}" if isinstance(value, float) and len(repr(value)) > 8 else json.dumps(value)


# --- pages of options ------------------------------------------------------------------------------------------------


def recipe_page(recipe: type[BaseModel]) -> str:
    """Every section of a recipe, each at the first place where it may stand."""
    blocks = [
        markdown(recipe.__doc__),
        "Anything can be changed on the command line: `mim run RECIPE optim.lr=1e-3 masker.mask_ratio=0.6`.\n"
        "Components and their options are listed under [Installed](installed.md).",
        "## All of a recipe",
        options(recipe),
    ]
    for model, path in sections(recipe):
        blocks += [f"## `{path}`", markdown(model.__doc__), options(model)]
    schedules = "A plain number, or a mapping with these keys, wherever a kind says schedule."
    return joined("Recipe", *blocks, "## Schedules", schedules, markdown(Curve.__doc__), options(Curve))


def sections(model: type[BaseModel], prefix: str = "", seen: set[type] | None = None) -> Iterator[tuple[type, str]]:
    """The sections inside a section, each with the path of its first place."""
    seen = {model} if seen is None else seen
    for name, field in model.model_fields.items():
        for inner, way in sections_in(field.annotation):
            if inner not in seen:
                seen.add(inner)
                path = f"{prefix}{field.alias or name}.{way}".rstrip(".")
                yield inner, path
                yield from sections(inner, f"{path}.", seen)


def installed_page(registry: Registry) -> str:
    """The components of every plugin with their options."""
    if failures := registry.load_all():
        raise SystemExit("\n".join(map(str, failures.values())))
    table = ["| kind | names |", "|---|---|"]
    for kind in hooks.HOOK_OF_KIND:
        links = [f"[`{name}`](#{kind}-{name})" for name in sorted(registry.classes(kind))]
        table.append(f"| {kind} | {', '.join(links)} |")
    blocks = ["\n".join(table)]
    for info in registry.plugins():
        blocks.append(f"## Plugin `{info.name}`\n\nPackage `{info.distribution}`.")
        if info.events:
            blocks.append(f"Listens to {', '.join(f'`{event}`' for event in info.events)}.")
        for component in registry.components(info.name):
            cls = registry.find(component.kind, f"{info.name}:{component.name}")
            blocks += [f"### {component.kind} `{component.name}`", markdown(cls.__doc__)]
            blocks += [options(cls.Config)] if hasattr(cls, "Config") and cls.Config.model_fields else []
    return joined("Installed components", *blocks)


def recipes_page(registry: Registry) -> str:
    """The shipped recipes of every plugin."""
    blocks = ["`mim run NAME` trains one, `mim recipes copy NAME` makes a file of it."]
    for info in registry.plugins():
        if found := [recipe for recipe in registry.recipes() if recipe.plugin == info.name]:
            items = [item(f"`{recipe.name}`", description(recipe)) for recipe in found]
            blocks += [f"## Plugin `{info.name}`", "\n".join(items)]
    return joined("Recipes", *blocks)


def description(recipe: RecipeInfo) -> str:
    """The first comment of a recipe and its `description`."""
    text = read_yaml(recipe.path.read_bytes(), recipe.path.name).data.get("description", "")
    return _escaped("\n".join(line for line in (recipe.summary, text) if line))


def commands_page(main: click.Group) -> str:
    """Every command with its options."""
    return joined("Commands", *(command_entry(command, path) for path, command in commands(main)))


def commands(command: click.Command, path: str = "mim") -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, each with the words that call it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


def command_entry(command: click.Command, path: str) -> str:
    """One command: how it is called, what it does, its options."""
    arguments = [each.metavar or f"{each.human_readable_name.upper()}{'...' if each.nargs < 0 else ''}"
                 for each in command.params if isinstance(each, click.Argument)]  # fmt: skip
    listed = [each for each in command.params if isinstance(each, click.Option)]
    usage = [path, *(["[OPTIONS]"] if listed else []), *arguments]
    usage += ["COMMAND ..."] if isinstance(command, click.Group) else []
    lines = [item(f"`{option_usage(option)}`", _escaped(option_help(option))) for option in listed]
    blocks = [f"## `{path}`", f"```\n{' '.join(usage)}\n```", markdown(command.help), "\n".join(lines)]
    return "\n\n".join(block for block in blocks if block)


def option_usage(option: click.Option) -> str:
    """'--steps N', '--data synthetic|real', '--fresh'."""
    if option.is_flag:
        return ", ".join(option.opts)
    if isinstance(option.type, click.Choice):
        value = "|".join(map(str, option.type.choices))
    else:
        own = {"integer range": "N", "N|auto": "N|auto"}
        value = option.metavar or own.get(option.type.name, option.type.name.upper())
    return f"{', '.join(option.opts)} {value}"


def option_help(option: click.Option) -> str:
    """Its help with the default, as far as there is one to tell."""
    default = option.show_default if isinstance(option.show_default, str) else option.default
    tell = option.required or (default is not None and not option.is_flag and isinstance(default, str | int | float))
    note = "Required." if option.required else f"Default: `{default}`."
    return " ".join([option.help or "", note if tell else ""]).strip()


# --- what lacks a text -----------------------------------------------------------------------------------------------


def undocumented_names() -> Iterator[str]:
    """Public names and hooks without a docstring, and public methods and properties without one."""
    for package in (mim_framework, *PACKAGES.values()):
        for name in package._MODULE_OF:
            value = getattr(package, name)
            if not documentation(name, value, package):
                yield name
            yield from undocumented_members(value) if inspect.isclass(value) else ()
    for module, names in GIVEN.items():
        for name in names:
            yield from undocumented_members(getattr(import_module(f"mim_framework.{module}"), name))
    yield from (name for name, hook in vars(hooks).items() if name.startswith("mim_") and not hook.__doc__)


def undocumented_members(cls: type) -> Iterator[str]:
    """Methods and properties that a reader has to guess; operators need no words."""
    for name, value in vars(cls).items():
        if member_line(value) and not name.startswith("_") and not own_docstring(cls, name):
            yield f"{cls.__name__}.{name}"


def undocumented_keys(model: type[BaseModel], where: str) -> Iterator[str]:
    """Sections without a docstring and keys without help, at any depth."""
    for section, path in [(model, ""), *sections(model)]:
        place = ".".join(part for part in (where, path) if part)
        if not vars(section).get("__doc__"):
            yield place
        yield from (f"{place}.{name}" for name, field in section.model_fields.items() if not field.description)


def undocumented_components(registry: Registry) -> Iterator[str]:
    """Components without a docstring, and options without help."""
    for kind in hooks.HOOK_OF_KIND:
        for name, cls in registry.classes(kind).items():
            if not vars(cls).get("__doc__"):
                yield f"{kind} {name}"
            for key, field in getattr(getattr(cls, "Config", None), "model_fields", {}).items():
                if not field.description:
                    yield f"{kind} {name}: {key}"


def undocumented_recipes(registry: Registry) -> Iterator[str]:
    """Recipes that do not begin with a comment."""
    yield from (f"recipe {recipe.name}" for recipe in registry.recipes() if not recipe.summary)


def undocumented_commands(main: click.Group) -> Iterator[str]:
    """Commands and options without help."""
    for path, command in commands(main):
        if not command.help:
            yield path
        for option in command.params:
            if isinstance(option, click.Option) and not option.help:
                yield f"{path} {option.opts[0]}"


if __name__ == "__main__":
    for file, text in pages().items():
        (FOLDER / file).write_text(text)
