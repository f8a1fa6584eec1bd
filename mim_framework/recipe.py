"""A recipe: which components make a run, with all their options, checked before any GPU time is spent.

Start at `load_recipe`. Every problem of a recipe is found in one go and reported with its file, line and column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from mim_framework.base.errors import PluginError, RecipeError
from mim_framework.base.schedule import Schedule
from mim_framework.base.section import Choice, Section
from mim_framework.base.validation import KeyPath, Problem, annotations_at, describe, fields_at, key, show, validate
from mim_framework.checkpoints.checkpoint import CheckpointSection
from mim_framework.contract.hooks import HOOK_OF_KIND
from mim_framework.data.loader import DataSection
from mim_framework.evaluate.knn import EvaluateSection
from mim_framework.registry.registry import Registry, UnknownName
from mim_framework.runtime.metrics import LogSection
from mim_framework.runtime.optim import OptimSection
from mim_framework.runtime.teachers import TeacherSection
from mim_framework.train_config import PhaseSection, TrainSection
from mim_framework.yaml_loader import read_scalar, read_yaml

HEAD_SLOTS = ("target", "decoder", "loss")
DEFAULT_OBJECTIVE = "masked_prediction"
TOKENIZER = "tokenizer"


def _file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ValueError(f"needs letters, digits, '.', '_' and '-', the first a letter or digit, got {show(text)}")
    return text


def _part_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text):
        raise ValueError(f"a name needs letters, digits and '_', the first a letter, got {show(text)}")
    return text


PartName = Annotated[str, AfterValidator(_part_name)]
"""Name of a head, teacher or optimizer; it becomes part of parameter and file names."""


class HeadSection(Section):
    """One prediction: what is predicted, by which decoder, and how the error counts."""

    target: Choice
    """What should be predicted."""
    decoder: Choice
    """From the encoder's tokens to the prediction."""
    loss: Choice
    """One number from prediction and target."""
    weight: Schedule = 1.0
    """Factor of this head's loss in the sum."""


class Recipe(Section):
    """All that makes a run. Slots hold a component's name, or `{type: NAME, ...}` with its options."""

    name: Annotated[str, AfterValidator(_file_name)]
    """Name of the run, and of its folder inside `output_dir`."""
    description: str = ""
    """What the recipe is for."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random is a function of this number and the sample's position."""
    output_dir: str = Field("runs", min_length=1)
    """Folder that holds the run's folder."""
    data: DataSection
    """Where images come from, and how they are read."""
    views: Choice = Choice(type="image")
    """From a sample to the views that the encoder sees."""
    masker: Choice
    """What is hidden."""
    encoder: Choice
    """Tokens out of an image under a mask: what is being trained."""
    target: Choice | None = None
    """What should be predicted, by the single head of most recipes."""
    decoder: Choice | None = None
    """From the encoder's tokens to the prediction, for the single head."""
    loss: Choice | None = None
    """One number from prediction and target, for the single head."""
    heads: dict[PartName, HeadSection] | None = None
    """Several heads by name, instead of `target`, `decoder` and `loss`."""
    teachers: dict[PartName, TeacherSection] = {}
    """Frozen networks and momentum copies by name."""
    tokenizer: str | None = Field(None, min_length=1)
    """A run that trained a tokenizer, or a folder that `mim import` wrote: short for a frozen teacher `tokenizer`."""
    objective: Choice = Choice(type=DEFAULT_OBJECTIVE)
    """The order of a step."""
    optim: OptimSection | None = None
    """The optimizer, if there is one."""
    optimizers: dict[PartName, OptimSection] | None = None
    """Several optimizers by name, instead of `optim`."""
    phases: tuple[PhaseSection, ...] = ()
    """Passes of a step, where there is more than one."""
    init: str | None = None
    """Weights to start from: a run directory, a checkpoint folder or a safetensors file."""
    train: TrainSection
    """How long, how many images at a time, on what."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the state is saved, and how many are kept."""
    log: LogSection = LogSection()
    """What is written down on the way."""
    evaluate: EvaluateSection = EvaluateSection()
    """What is measured on the way."""

    _file: str = PrivateAttr("recipe")
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if problems := _inconsistencies(self.model_dump(exclude_none=True)):
            raise ValueError(describe(problems))
        return self

    def __eq__(self, other: object) -> bool:
        """Equal contents; where they were written does not count."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def location(self, where: str) -> str:
        """Where a key such as "heads.main.decoder" stands: 'file:line:column: key', as errors begin."""
        parts = where.split(".") if where else []
        for length in range(len(parts), 0, -1):
            if place := self._places.get(".".join(parts[:length])):
                return f"{place}: {where}"
        return f"{self._file}: {where}" if where else self._file

    def named_heads(self) -> dict[str, HeadSection]:
        """The heads by name; `target`, `decoder` and `loss` are the head `main`."""
        if self.heads is not None:
            return self.heads
        if self.target is None or self.decoder is None or self.loss is None:
            return {}
        return {"main": HeadSection(target=self.target, decoder=self.decoder, loss=self.loss)}

    def named_teachers(self) -> dict[str, TeacherSection]:
        """The teachers by name, with that of `tokenizer`, which is not needed where its token ids are stored."""
        if self.tokenizer is None or self.data.tokens is not None:
            return self.teachers
        return {TOKENIZER: TeacherSection(checkpoint=self.tokenizer), **self.teachers}

    def named_optimizers(self) -> dict[str, OptimSection]:
        """The optimizers by name; `optim` is the optimizer `main`."""
        if self.optimizers is not None:
            return self.optimizers
        assert self.optim is not None
        return {"main": self.optim}

    def named_phases(self) -> tuple[PhaseSection, ...]:
        """The phases; by default one, `main`, that steps every optimizer."""
        return self.phases or (PhaseSection(name="main", optimizers=tuple(self.named_optimizers())),)

    def phase_names(self) -> list[str]:
        return [phase.name for phase in self.named_phases()]

    def doubts(self, epochs: float) -> list[str]:
        """What is allowed but hardly meant, in a run of so many epochs."""
        return [
            f"the warm-up of optimizer '{name}', {section.warmup_epochs:g} epochs, is no shorter than the run of "
            f"{epochs:g}: the learning rate stays below its peak"
            for name, section in self.named_optimizers().items()
            if section.warmup_epochs >= epochs
        ]


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
    path = _find(recipe, registry)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    document = read_yaml(text, str(path))
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, got {show(document.data)}")
    draft = _Draft(str(path), document.data, dict(document.marks), registry)
    for override in overrides:
        draft.override(override)
    return draft.finish(complete)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; `load_recipe` reads the same recipe from it."""
    optional = [name for name, field in Recipe.model_fields.items() if field.default is None]
    data = recipe.model_dump(mode="json", exclude={name for name in optional if getattr(recipe, name) is None})
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """JSON schema of a recipe; every slot lists the installed components and their options. Imports all plugins."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    slots: dict[str, Any] = {}
    for kind in HOOK_OF_KIND:
        if kind == "checkpoint_format":
            continue
        branches: list[dict[str, Any]] = []
        for name, cls in sorted(registry.classes(kind).items()):
            label = f"{kind}.{name.replace(':', '.')}"
            component = cls.Config.model_json_schema(ref_template=f"#/$defs/{label}.{{model}}")
            definitions |= {f"{label}.{inner}": value for inner, value in component.pop("$defs", {}).items()}
            help_text = (cls.__doc__ or "").partition("\n")[0]
            component |= {"title": name, "description": help_text, "required": ["type", *component.get("required", [])]}
            component["properties"] = {"type": {"const": name}, **component.get("properties", {})}
            definitions[label] = component
            if component["required"] == ["type"]:
                branches.append({"const": name, "description": help_text})
            branches.append({"$ref": f"#/$defs/{label}"})
        slots[kind] = {"anyOf": branches}
    _fill_slots(schema, slots)
    definitions.pop("Choice", None)
    return schema


def _fill_slots(schema: Any, slots: dict[str, Any]) -> None:
    """Replace the reference to `Choice` in every property that is named after a kind of component."""
    for node in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _fill_slots(node, slots)
    properties = schema.get("properties", {}) if isinstance(schema, dict) else {}
    for name, slot in slots.items():
        field = properties.get(name)
        if field is not None and "#/$defs/Choice" in json.dumps(field):
            nullable = [{"type": "null"}] if {"type": "null"} in field.get("anyOf", ()) else []
            described = {each: field[each] for each in ("description", "default") if each in field}
            properties[name] = {**described, "anyOf": [*slot["anyOf"], *nullable]}


def parse_override(text: str) -> tuple[str, Any]:
    """'a.b=1e-3' -> ('a.b', 0.001); the value is YAML.

    Raises:
        RecipeError: if it is not of that form.
    """
    where, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in where.split(".")):
        raise RecipeError("write it as KEY=VALUE, for example optim.lr=1e-3")
    try:
        return where.strip(), read_yaml(value, "value").data
    except RecipeError as error:
        raise RecipeError(f"{error}; quote a text with special characters") from error


Place = tuple[int, int] | str
"""Line and column in the file, or the words for an override."""


class _Draft:
    """A recipe that is still plain data, with the place of every key and the problems found so far."""

    def __init__(self, file: str, data: dict[str, Any], places: dict[KeyPath, Place], registry: Registry) -> None:
        self.file, self.data, self.registry = file, data, registry
        self.places: dict[KeyPath, Place] = places
        self.problems: list[tuple[Place, Problem]] = []

    def place(self, path: KeyPath) -> Place:
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def report(self, problem: Problem) -> None:
        """Note a problem. Where overrides changed part of what is wrong, it may be theirs: they are named too."""
        path, place = problem.path, self.place(problem.path)
        inside = [each for at, each in self.places.items() if isinstance(each, str) and at[: len(path)] == path]
        if path in self.places and path and not isinstance(place, str) and inside:
            problem = Problem(path, f"{problem.message} (after {' and '.join(dict.fromkeys(inside))})")
        self.problems.append((place, problem))

    def override(self, text: str) -> None:
        """Apply one `a.b=value`."""
        label = f"override '{text}'"
        try:
            where, value = parse_override(text)
        except RecipeError as error:
            self.problems.append((label, Problem((), str(error))))
            return
        parts = where.split(".")
        node: Any = self.data
        path: KeyPath = ()
        for part in parts:
            if isinstance(node, list):
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

    def open(self, node: Any, path: KeyPath, label: str) -> Any:
        """The value at `path`, ready to take a key: a slot's bare name or default becomes `{type: NAME}`."""
        part = path[-1]
        value = node[part] if isinstance(node, list) else node.get(part)
        if value is None:
            field = fields_at(Recipe, path[:-1]).get(str(part))
            default = getattr(field, "default", None)
            value = node[part] = default.model_dump() if isinstance(default, Choice) else {}
            self.places[path] = label
        elif isinstance(value, str) and Choice in annotations_at(Recipe, path):
            value = node[part] = {"type": value}
        return value

    def finish(self, complete: bool) -> Recipe:
        """The checked recipe.

        Raises:
            RecipeError: with every problem.
        """
        inconsistencies = _inconsistencies(self.data)
        recipe, problems = validate(Recipe, self.data)
        for problem in inconsistencies + [each for each in problems if not (inconsistencies and each.path == ())]:
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
        for path, kind, value in _slots([Recipe], self.data):
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
            _, problems = validate(cls.Config, {option: each for option, each in options.items() if option != "type"})
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

        lines = [f"{self.format(place)}: {problem}" for place, problem in sorted(self.problems, key=in_file_order)]
        return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems in {self.file}", *lines])


def _find(recipe: str | Path, registry: Registry) -> Path:
    """The file of a recipe given by path or shipped name."""
    path = Path(recipe)
    try:
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


def _slots(annotations: list[Any], data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str, Any]]:
    """Every value that chooses a component: its path, the kind of component, and the value."""
    if Choice in annotations and path[-1] in HOOK_OF_KIND:
        yield path, str(path[-1]), data
        return
    for part, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        inner = [found for each in annotations for found in annotations_at(each, (part,))]
        if inner:
            yield from _slots(inner, value, (*path, part))


def _complete(recipe: Recipe, registry: Registry) -> Recipe:
    """The same recipe with the default of every component's option written out."""
    data = recipe.model_dump(mode="json")
    for path, kind, value in list(_slots([Recipe], data)):
        if value is None:
            continue
        _, config = registry.resolve(kind, Choice.model_validate(value))
        node = data
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = {"type": value["type"], **config.model_dump(mode="json", by_alias=True, round_trip=True)}
    return Recipe.model_validate(data)


def _inconsistencies(data: dict[str, Any]) -> list[Problem]:
    """What no single section can see. The data may be wrong in other ways too, so that all is reported at once."""
    problems = []
    present = [slot for slot in HEAD_SLOTS if data.get(slot) is not None]
    objective = data.get("objective", DEFAULT_OBJECTIVE)
    objective = objective.get("type") if isinstance(objective, dict) else objective
    if data.get("heads") is not None and present:
        problems.append(
            Problem(("heads",), f"stands beside {_and(present)}; write all heads here, or one head without it")
        )
    elif data.get("heads") is None and (present or objective == DEFAULT_OBJECTIVE):
        for slot in HEAD_SLOTS:
            if slot not in present:
                problems.append(Problem((slot,), f"missing; a recipe needs {_and(HEAD_SLOTS)}, or 'heads'"))
    if (data.get("optim") is None) == (data.get("optimizers") is None):
        both = data.get("optim") is not None
        text = (
            "stands beside 'optimizers'; use one of the two" if both else "missing; a recipe needs it, or 'optimizers'"
        )
        problems.append(Problem(("optim",), text))
    return [*problems, *_phase_problems(data), *_teacher_problems(data)]


def _phase_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """Phases of one name, optimizers that are not there, and optimizers that no phase steps."""
    optimizers, phases = data.get("optimizers") or {"main": None}, data.get("phases") or ()
    if not isinstance(optimizers, dict) or not isinstance(phases, list | tuple):
        return
    seen: set[Any] = set()
    stepped: set[Any] = set()
    for index, phase in enumerate(phases):
        phase = phase if isinstance(phase, dict) else {}
        name, names = phase.get("name"), phase.get("optimizers")
        if isinstance(name, str) and name in seen:
            yield Problem(("phases", index, "name"), f"there is a phase '{name}' already; give each its own name")
        seen |= {name} if isinstance(name, str) else set()
        for each in names if isinstance(names, list | tuple) else ():
            if isinstance(each, str) and each not in optimizers:
                text = f"there is no optimizer '{each}'; the recipe has {_and(optimizers)}"
                yield Problem(("phases", index, "optimizers"), text)
            stepped |= {each} if isinstance(each, str) else set()
    if phases and (idle := [name for name in optimizers if name not in stepped]):
        yield Problem(("phases",), f"no phase steps optimizer {_and(idle)}; its parameters would never change")


def _teacher_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """A teacher that copies another one needs one that is copied before it, with the same parts."""
    teachers = data.get("teachers") or {}
    if data.get("tokenizer") is not None and isinstance(teachers, dict) and TOKENIZER in teachers:
        yield Problem(("tokenizer",), f"stands beside 'teachers.{TOKENIZER}'; use one of the two")
    earlier: dict[str, Any] = {}
    for name, teacher in teachers.items() if isinstance(teachers, dict) else ():
        teacher = teacher if isinstance(teacher, dict) else {}
        source, copied = teacher.get("of_teacher"), teacher.get("copy", teacher.get("copy_of"))
        place = ("teachers", name, "of_teacher")
        if isinstance(source, str) and source not in teachers:
            yield Problem(place, f"there is no teacher '{source}'")
        elif isinstance(source, str) and source not in earlier:
            yield Problem(place, f"teacher '{source}' must stand before '{name}', which copies it")
        elif isinstance(source, str) and not earlier[source]:
            yield Problem(place, f"teacher '{source}' is frozen, not a copy; give '{name}' its own 'encoder'")
        elif isinstance(source, str) and isinstance(copied, list | tuple) and isinstance(earlier[source], list | tuple):
            for part in copied:
                if part not in earlier[source]:
                    yield Problem(("teachers", name, "copy"), f"teacher '{source}' holds no copy of '{part}'")
        earlier[name] = copied


def _and(names: Iterable[str]) -> str:
    *most, last = [f"'{name}'" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


class _Dumper(yaml.SafeDumper):
    """Quotes what `read_scalar` would take for a number, and writes short lists in one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes Unicode's own line breaks unescaped, where a reader folds them into a space.
    plain = isinstance(read_scalar(text), str) and not re.search("[\x85\u2028\u2029]", text)
    style = None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
