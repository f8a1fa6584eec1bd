"""From a file and overrides to a checked recipe. Start at `load_recipe`.

Every problem of a recipe is found in one go and reported with its file, line and column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mim_framework.base.errors import PluginError, RecipeError
from mim_framework.base.paths import local_path
from mim_framework.base.section import Choice
from mim_framework.base.sizes import oversized
from mim_framework.base.text import plain_logger
from mim_framework.base.validation import (
    KeyPath,
    Problem,
    annotations_at,
    fields_at,
    is_choice,
    key,
    shortened,
    show,
    validate,
)
from mim_framework.contract.hooks import HOOK_OF_KIND
from mim_framework.recipe.eval_source import in_one_line as eval_source_in_one_line
from mim_framework.recipe.eval_source import of_former
from mim_framework.recipe.evaluations import from_mapping, in_one_line, type_of
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.rules import inconsistencies
from mim_framework.recipe.yaml import MAX_DEPTH, read_yaml
from mim_framework.registry.registry import Registry, UnknownName

logger = plain_logger(__name__)

MOST_SHOWN = 20
"""Of more problems the first are shown, in the order of the file."""


def load_recipe(
    recipe: str | Path, overrides: Iterable[str] = (), registry: Registry | None = None, *, complete: bool = True
) -> Recipe:
    """Read and check a recipe, with every option of every component.

    Args:
        recipe: a file, or the name of a recipe that an installed plugin ships.
        overrides: changes such as "optim.lr=1e-3"; the value is YAML.
        registry: the plugins to use; by default those of the environment.
        complete: write the defaults of the components' options out, so that the recipe no longer depends on them.

    Raises:
        RecipeError: listing every problem as `file:line:column: key: what is wrong`.
    """
    registry = registry or Registry()
    draft = _read(find_recipe(recipe, registry), registry)
    for override in overrides:
        draft.override(override)
    return draft.finish(complete)


def load_written(path: Path, registry: Registry) -> Recipe:
    """The recipe that a run wrote into its directory; what an earlier version wrote otherwise is read, and told.

    Raises:
        RecipeError: as of `load_recipe`.
    """
    draft = _read(path, registry)
    former = draft.data.get("evaluate")
    if isinstance(former, dict):
        draft.data["evaluate"] = from_mapping(former)
        logger.warning(f"{path} was written by an earlier version; it now reads {in_one_line(draft.data['evaluate'])}")
    return draft.finish(complete=True)


def with_evaluations(recipe: Recipe, names: Iterable[str], changes: Iterable[str], registry: Registry) -> Recipe:
    """The recipe with these evaluations alone, each with the recipe's own options where it has them.

    Args:
        changes: "NAME.KEY=VALUE" of an evaluation, or "data.KEY=VALUE".

    Raises:
        RecipeError: listing every evaluation that is not installed, and every wrong change.
    """
    data = recipe.model_dump(mode="json")
    own = {entry["type"]: entry for entry in data["evaluate"]}
    data["evaluate"] = [own.get(name, {"type": name}) for name in dict.fromkeys(names)]
    draft = Draft("mim eval", data, {(): "mim eval"}, registry)
    for change in changes:
        first = change.partition("=")[0].partition(".")[0]
        if first != "data" and first not in [entry["type"] for entry in data["evaluate"]]:
            text = "changes none of the evaluations; write NAME.KEY=VALUE for an option of one, or data.KEY=VALUE"
            draft.problems.append((f"override '{shortened(change)}'", Problem((), text)))
        else:
            draft.override(change if first == "data" else f"evaluate.{change}")
    return draft.finish(complete=True)


def recipe_of(data: dict[str, Any], registry: Registry) -> Recipe:
    """A recipe that is made up here and not read.

    Raises:
        RecipeError: as of `load_recipe`.
    """
    return Draft("recipe", data, {(): "recipe"}, registry).finish(complete=True)


def _read(path: Path, registry: Registry) -> Draft:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    document = read_yaml(text, str(path))
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, got {show(document.data)}")
    return Draft(str(path), document.data, dict(document.marks), registry)


def parse_override(text: str) -> tuple[str, Any]:
    """'a.b=1e-3' -> ('a.b', 0.001); the value is YAML.

    Raises:
        RecipeError: if it is not of that form.
    """
    where, equals, value = text.partition("=")
    if where.count(".") >= MAX_DEPTH:
        raise RecipeError(f"names a key deeper than {MAX_DEPTH} levels, which no recipe has")
    if not equals or not all(part.strip() for part in where.split(".")):
        raise RecipeError("write it as KEY=VALUE, for example optim.lr=1e-3")
    try:
        return where.strip(), read_yaml(value, "value").data
    except RecipeError as error:
        raise RecipeError(f"{error}; quote a text with special characters") from error


Place = tuple[int, int] | str
"""Line and column in the file, or the words for an override."""


class Draft:
    """A recipe that is still plain data, with the place of every key and the problems found so far."""

    def __init__(self, file: str, data: dict[str, Any], places: dict[KeyPath, Place], registry: Registry) -> None:
        self.file, self.data, self.registry = file, data, registry
        self.places: dict[KeyPath, Place] = places
        self.problems: list[tuple[Place, Problem]] = []
        self._overridden: dict[KeyPath, str] = {}

    def place(self, path: KeyPath) -> Place:
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def report(self, problem: Problem) -> None:
        """Note a problem. Where overrides changed part of what is wrong, it may be theirs: they are named too."""
        path, place = problem.path, self.place(problem.path)
        inside = [each for at, each in self._overridden.items() if at[: len(path)] == path]
        if path in self.places and path and not isinstance(place, str) and inside:
            problem = Problem(path, f"{problem.message} (after {' and '.join(dict.fromkeys(inside))})")
        self.problems.append((place, problem))

    def override(self, text: str) -> None:
        """Apply one `a.b=value`."""
        label = f"override '{shortened(text)}'"
        try:
            where, value = parse_override(text)
        except RecipeError as error:
            self.problems.append((label, Problem((), str(error))))
            return
        parts = where.split(".")
        node: Any = self.data
        path: KeyPath = ()
        for part in parts:
            if isinstance(node, list) and self.names_components(path) and not part.isdecimal():
                if value is None and len(path) + 1 == len(parts):
                    self.leave_out(node, path, part)
                    return
                path = (*path, self.entry(node, path, part, label))
                if len(path) == len(parts) and isinstance(value, dict):
                    value = {"type": part, **value}
            elif isinstance(node, list):
                if part not in map(str, range(len(node))):
                    message = f"is a list of {len(node)}; '{part}' is none of its numbers, which begin at 0"
                    self.problems.append((label, Problem(path, message)))
                    return
                path = (*path, int(part))
            elif isinstance(node, dict):
                path = (*path, part)
            else:
                self.problems.append((label, Problem(path, f"is {show(node)}, which has no keys")))
                return
            if len(path) == len(parts):
                node[path[-1]] = value
                self.places = {each: place for each, place in self.places.items() if each[: len(path)] != path}
                self.places[path] = label
                return
            node = self.open(node, path, label)

    def names_components(self, path: KeyPath) -> bool:
        """Whether there is a list of components, whose entries can be called by their names."""
        return any(is_choice(each) for each in annotations_at(Recipe, (*path, 0)))

    def entry(self, entries: list[Any], path: KeyPath, name: str, label: str) -> int:
        """The number of the component `name` in a list, to which it is appended if it is not there."""
        names = [type_of(entry) for entry in entries]
        if name not in names:
            entries.append({"type": name})
            self.places[(*path, len(names))] = label
            return len(names)
        return names.index(name)

    def leave_out(self, entries: list[Any], path: KeyPath, name: str) -> None:
        """Take the component `name` out of a list, if it is there; those behind it move up."""
        names = [type_of(entry) for entry in entries]
        if name not in names:
            return
        index, depth = names.index(name), len(path)
        del entries[index]
        moved = {}
        for each, place in self.places.items():
            if each[:depth] != path or len(each) == depth or each[depth] < index:
                moved[each] = place
            elif each[depth] > index:
                moved[*path, each[depth] - 1, *each[depth + 1 :]] = place
        self.places = moved

    def open(self, node: Any, path: KeyPath, label: str) -> Any:
        """The value at `path`, ready to take a key: a slot's bare name or default becomes `{type: NAME}`."""
        part = path[-1]
        value = node[part] if isinstance(node, list) else node.get(part)
        if value is None:
            field = fields_at(Recipe, path[:-1]).get(str(part))
            default = getattr(field, "default", None)
            if self.names_components(path):
                value = node[part] = [] if part in node else [each.model_dump() for each in default or ()]
            else:
                value = node[part] = default.model_dump() if isinstance(default, Choice) else {}
            self.places[path] = label
        elif isinstance(value, str) and any(is_choice(each) for each in annotations_at(Recipe, path)):
            value = node[part] = {"type": value}
        return value

    def finish(self, complete: bool) -> Recipe:
        """The checked recipe.

        Raises:
            RecipeError: with every problem.
        """
        self._overridden = {at: place for at, place in self.places.items() if isinstance(place, str)}
        former = self.data.get("evaluate")
        if isinstance(former, dict):
            self.data["evaluate"] = from_mapping(former)
            text = f"is a list of evaluations now; write {in_one_line(self.data['evaluate'])}"
            self.report(Problem(("evaluate",), text))
        if (eval_source := of_former(self.data)) is not None:
            self.places[("data", "eval_source")] = self.place(("data", "source", "eval_root"))
            now = eval_source_in_one_line(eval_source)
            logger.warning(f"{self.file}: data.source.eval_root is read as what it is called now, {now}")
        across = inconsistencies(self.data)
        recipe, problems = validate(Recipe, self.data)
        problems = [each for each in problems if not (across and each.path == ())]
        for problem in across + problems + oversized(self.data):
            self.report(problem)
        self.check_components()
        if self.problems or recipe is None:
            raise RecipeError(self.summary())
        if complete:
            recipe = _complete(recipe, self.registry)
        recipe._file = self.file
        recipe._places = {key(path): self.format(place) for path, place in self.places.items() if path}
        return recipe

    def check_components(self) -> None:
        """Report components that are not installed and options that they do not take."""
        missing: dict[str, list[tuple[KeyPath, str, str, UnknownName]]] = {}
        for path, kind, choice, value in slots([Recipe], self.data):
            name, options = (value.get("type"), value) if isinstance(value, dict) else (value, {})
            if not isinstance(name, str) or not name:
                continue
            type_path = (*path, "type") if isinstance(value, dict) else path
            try:
                cls = self.registry.find(kind, name)
            except UnknownName as error:
                missing.setdefault(error.package or str(error), []).append((type_path, kind, name, error))
                continue
            except PluginError as error:
                self.report(Problem(type_path, str(error)))
                continue
            own = choice.own_keys()
            _, problems = validate(cls.Config, {option: each for option, each in options.items() if option not in own})
            for problem in problems:
                self.report(Problem(path + problem.path, problem.message))
        for package, names in missing.items():  # one plugin to install is one problem
            type_path, _, _, error = names[0]
            listed = " and ".join(dict.fromkeys(f"{kind} '{name}'" for _, kind, name, _ in names))
            several = f"{listed} are not installed; pip install {package} brings them"
            self.report(Problem(type_path, several if " and " in listed and error.package else str(error)))

    def format(self, place: Place) -> str:
        return place if isinstance(place, str) else f"{self.file}:{place[0]}:{place[1]}"

    def summary(self) -> str:
        def in_file_order(found: tuple[Place, Problem]) -> tuple[bool, Place]:
            return isinstance(found[0], str), found[0]

        found = sorted(self.problems, key=in_file_order)
        lines = [f"{self.format(place)}: {problem}" for place, problem in found[:MOST_SHOWN]]
        if len(found) == 1:
            return lines[0]
        if len(found) > MOST_SHOWN:
            lines.append(f"and {len(found) - MOST_SHOWN:,} more")
        return "\n  ".join([f"{len(found):,} problems in {self.file}", *lines])


def find_recipe(recipe: str | Path, registry: Registry) -> Path:
    """The file of a recipe given by path or shipped name."""
    try:
        path = Path(local_path(str(recipe)))
        if path.is_file():
            return path
    except (OSError, ValueError) as error:  # a name too long, or with a NUL
        raise RecipeError(f"recipe {show(str(recipe))} cannot be read: {error}") from error
    looks_like_path = isinstance(recipe, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if looks_like_path:
        shipped = [each.name for each in registry.recipes() if each.name == path.stem]
        hint = f"; the shipped recipe of that name is called '{path.stem}'" if shipped else ""
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise RecipeError(f"recipe {path}: {what}{hint}")
    return registry.recipe(str(recipe)).path


def slots(annotations: list[Any], data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str, type[Choice], Any]]:
    """Every value that chooses a component: its path, the kind of component, the form of the choice, and the value."""
    choice = next((each for each in annotations if is_choice(each)), None)
    if choice is not None and (kind := choice.kind or str(path[-1])) in HOOK_OF_KIND:
        yield path, kind, choice, data
        return
    for part, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        inner = [found for each in annotations for found in annotations_at(each, (part,))]
        if inner:
            yield from slots(inner, value, (*path, part))


def _complete(recipe: Recipe, registry: Registry) -> Recipe:
    """The same recipe with the default of every component's option written out."""
    data = recipe.model_dump(mode="json")
    for path, kind, choice, value in list(slots([Recipe], data)):
        if value is None:
            continue
        _, config = registry.resolve(kind, choice.model_validate(value))
        node = data
        for part in path[:-1]:
            node = node[part]
        own = {name: value[name] for name in choice.own_keys()}
        node[path[-1]] = {**own, **config.model_dump(mode="json", by_alias=True, round_trip=True), **own}
    return Recipe.model_validate(data)
