"""From a checked recipe to a model: builds the components in order and checks that they fit.

Each builder publishes a spec and later ones read it, so that no dimension stands twice in a recipe. Everything that
does not fit is an error that names both sides, before any data is read.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim_framework.assembly.fits import refusal
from mim_framework.assembly.trained import trained_encoder
from mim_framework.assembly.weights import Filled, load_init, load_into, some
from mim_framework.base.errors import CheckpointError, DataError, MimError, RecipeError, did_you_mean
from mim_framework.base.section import Choice
from mim_framework.contract.components import (
    Component,
    Decoder,
    Encoder,
    Head,
    Loss,
    Masker,
    Objective,
    Parts,
    Source,
    Target,
    ViewBuilder,
)
from mim_framework.contract.records import Views
from mim_framework.contract.specs import Specs
from mim_framework.contract.step import Step
from mim_framework.data.companions import Companion, TokenCache, example_of
from mim_framework.data.file_systems import RemoteSection
from mim_framework.data.labels import LABEL, Labels, num_classes_of
from mim_framework.data.order import sample_order
from mim_framework.data.views import MIXING_OPTIONS, UNSAID
from mim_framework.evaluate.measure import check
from mim_framework.nn.images import Renormalize
from mim_framework.nn.patches import shown
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import Optimizer, assign, layers_above
from mim_framework.runtime.step import StepEngine
from mim_framework.runtime.teachers import Teachers, TeacherSection


@dataclass
class Model:
    """The built parts of a recipe, on the CPU."""

    recipe: Recipe
    views: ViewBuilder
    objective: Objective
    teachers: Teachers
    specs: Specs
    companions: tuple[Companion, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    """What the user should know at the start of a run."""
    init_fills: Filled | None = field(default=None, kw_only=True)
    """What the recipe's `init` holds of the objective, if it was read."""

    def example(self, batch_size: int) -> dict[str, Tensor]:
        """A made-up batch before `prepare`: the views, and what travels beside them."""
        beside = {each.spec.name: example_of(each.spec, batch_size) for each in self.companions}
        return {**self.views.example(batch_size), **beside}

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """A batch on the device as the slots see it: prepared views, and what travels beside them as it is.

        Only a builder that mixes labels is given them.
        """
        beside = {each.spec.name for each in self.companions} & batch.keys()
        if self.views.mixes_labels:
            beside -= {LABEL}
        views = self.views.prepare(step, {name: view for name, view in batch.items() if name not in beside})
        return {**views, **{name: batch[name] for name in sorted(beside)}}

    def to(self, device: torch.device) -> Model:
        self.objective.to(device)
        self.teachers.to(device)
        return self

    def engine(self, device: torch.device, *, bfloat16: bool = False) -> StepEngine:
        """What makes steps of these parts."""
        return StepEngine(self.objective, self.prepare, self.teachers, device, bfloat16=bfloat16)


def build_model(
    recipe: Recipe,
    registry: Registry,
    *,
    with_weights: bool = True,
    compare_weights: bool = False,
    source: Source | None = None,
) -> Model:
    """Build everything but the data. Weights depend on the recipe's seed only.

    Args:
        with_weights: read `init` and the checkpoints of frozen teachers; False leaves them at their random values.
        compare_weights: without `with_weights`, read the files all the same and refuse what does not fit.
        source: the recipe's data source, which a recipe with labels asks for its classes; built if it is needed.

    Raises:
        RecipeError: naming the slots that do not fit.
        CheckpointError: if weights named by the recipe cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Builder(recipe, registry, source).build(with_weights, with_weights or compare_weights)


def build_source(recipe: Recipe, registry: Registry) -> Source:
    """The recipe's data source; reads listings, not images.

    Raises:
        DataError: if there is none, or it cannot be read in the recipe's order.
    """
    cls, config = registry.resolve("source", recipe.data.source)
    source = cls(config)
    sample_order(recipe.data.order, source, recipe.seed, recipe.data.order_window)
    return source


def build_optimizers(recipe: Recipe, objective: Objective, total_batch_size: int) -> dict[str, Optimizer]:
    """The recipe's optimizers by name, over the parameters of a built (and wrapped or sharded) objective.

    Raises:
        RecipeError: naming the optimizer that cannot be made or an option of it that concerns no parameter, or a
            parameter that has none or several.
    """
    sections = recipe.named_optimizers()
    where = "optim" if recipe.optimizers is None else "optimizers"
    exempt = exempt_names(objective)
    optimizers = {}
    try:
        parameters = assign(sections, list(objective.named_parameters()))
        for name, section in sections.items():
            where = "optim" if recipe.optimizers is None else f"optimizers.{name}"
            above = None if section.layer_decay is None else layers_above(objective)
            optimizers[name] = Optimizer(name, section, parameters[name], exempt, total_batch_size, above)
    except ValueError as error:
        raise RecipeError(f"{recipe.location(where)}: {error}") from error
    return optimizers


def exempt_names(objective: nn.Module) -> set[str]:
    """Full names of the parameters that components exempt from weight decay; each speaks for all modules inside it."""
    return {
        f"{path}.{name}" if path else name
        for path, module in objective.named_modules()
        if isinstance(module, Component)
        for name in module.no_weight_decay()
    }


class Builder:
    def __init__(self, recipe: Recipe, registry: Registry, source: Source | None = None) -> None:
        self.recipe, self.registry, self.source = recipe, registry, source
        self.specs = Specs()
        self.built: dict[str, str] = {}

    def build(self, with_weights: bool, read_weights: bool) -> Model:
        """`read_weights` without `with_weights`: compare files with the model and load none."""
        recipe = self.recipe
        views = self.build_views()
        companions = self.build_companions(views)
        encoder = self.build_encoder()
        sections = recipe.named_teachers()
        teachers = Teachers(sections)
        with torch.random.fork_rng(devices=[]):  # the rest begins with the same weights, whatever teachers there are
            for name, section in sections.items():
                if not section.copy_of:
                    self.build_frozen(teachers, name, section, with_weights, read_weights)
        if with_weights:
            self.load_published("encoder", encoder)
        copies = {name: section for name, section in sections.items() if "encoder" in section.copy_of}
        self.publish(
            teachers={**self.specs.teachers, **dict.fromkeys(copies, encoder.spec)},
            teacher_views={**self.specs.teacher_views, **{n: self.view_of(n, each) for n, each in copies.items()}},
        )
        masker: Masker = self.make("masker", "masker", recipe.masker, self.specs)
        self.publish(masker=masker.spec)
        self.check_masker(masker, encoder)
        for index, choice in enumerate(recipe.evaluate):
            cls, config = self.registry.resolve("evaluation", choice)
            with self.slot(f"evaluate.{index}", choice.type):
                check(cls(config), encoder.spec, choice.layers)

        heads = {
            name: self.build_head(name, section, encoder, masker) for name, section in recipe.named_heads().items()
        }
        parts = Parts(masker, encoder, heads, views, self.specs)
        objective: Objective = self.make("objective", "objective", recipe.objective, parts)

        notes, filled = [], None
        if read_weights and recipe.init is not None:
            filled = load_init(objective, Path(recipe.init), only_compare=not with_weights)
            if not filled.complete:
                notes.append(f"init {recipe.init} fills a part of the model, the rest starts at random:{filled}")
        with self.slot("train.frozen"):
            objective.freeze(matching(recipe.train.frozen, [name for name, _ in objective.named_parameters()]))
        self.check_copies(objective)
        teachers.add_copies(objective)
        with self.slot("teachers"):
            for component in objective.components():
                self.check_teacher_asks(component)
                teachers.declare(component.teacher_asks())
        parts_of_model = (recipe, views, objective, teachers, self.specs, companions)
        return Model(*parts_of_model, notes=tuple(notes), init_fills=filled)

    def build_views(self) -> ViewBuilder:
        views: ViewBuilder = self.make("views", "views", self.recipe.views)
        self.publish(views=dict(views.specs))
        return views

    def build_companions(self, views: ViewBuilder) -> tuple[Companion, ...]:
        """What travels beside the views, published as views."""
        recipe, companions, specs = self.recipe, [], {}
        if recipe.data.tokens is not None:
            if views.mixes_labels or getattr(views, "erase", 0.0):
                raise self.misfit(
                    "data.tokens", f"views '{views.name}' mix or erase images, the ids are those of whole ones"
                )
            cache = TokenCache(Path(recipe.data.tokens), accept_changed=recipe.data.accept_changed_source)
            cache.check_views(views_of=decides_pixels(recipe), seed=recipe.seed)
            companions.append(cache)
            specs[cache.spec.name] = cache.spec
        if views.mixes_labels or self.some_part_needs_labels():
            labels = Labels(self.num_classes())
            companions.append(labels)
            with self.slot("views", views.name):
                specs[LABEL] = views.label_spec(labels.spec) if views.mixes_labels else labels.spec
        for name in specs.keys() & self.specs.views.keys():
            text = f"views '{views.name}' have a view '{name}', which is the name of what travels beside them"
            raise self.misfit("views", text)
        self.publish(views={**self.specs.views, **specs})
        return tuple(companions)

    def some_part_needs_labels(self) -> bool:
        choices = [(kind, getattr(self.recipe, kind)) for kind in ("masker", "encoder", "objective")]
        for head in self.recipe.named_heads().values():
            choices += [(kind, getattr(head, kind)) for kind in ("target", "decoder", "loss")]
        return any(self.registry.resolve(kind, choice)[0].needs_labels for kind, choice in choices)

    def num_classes(self) -> int | None:
        """Of the data source; None if it was not given and is not there, as where a model is only exported.

        Nor does it need labels then, if a target says how many classes there are.
        """
        if self.source is not None:
            return num_classes_of(self.source)
        try:
            source = build_source(self.recipe, self.registry)
        except DataError:
            return None
        heads = self.recipe.named_heads().values()
        if source.classes is None and any(head.target.options.get("num_classes") is not None for head in heads):
            return None
        return num_classes_of(source)

    def build_encoder(self) -> Encoder:
        encoder: Encoder = self.make("encoder", "encoder", self.recipe.encoder, self.specs)
        if not encoder.spec.grid.num_patches:
            token = f"one takes {shown(encoder.spec.stride)} pixels and more"
            raise self.misfit("encoder", f"encoder '{encoder.name}' has no token in so small an image: {token}")
        self.publish(encoder=encoder.spec)
        return encoder

    def load_published(self, where: str, encoder: Encoder) -> None:
        with self.slot(where, encoder.name):
            encoder.load_published()

    def build_frozen(
        self, teachers: Teachers, name: str, section: TeacherSection, with_weights: bool, read_weights: bool
    ) -> None:
        """A frozen encoder sees its view as "x", in the normalisation it was trained in."""
        where = f"teachers.{name}" if name in self.recipe.teachers else name
        choice, mean, std = section.encoder, None, None
        path = None if section.checkpoint is None else Path(section.checkpoint)
        if choice is None:
            try:
                trained = trained_encoder(path, self.registry)
            except CheckpointError as error:
                raise self.misfit(where, str(error)) from error
            choice, mean, std = trained.encoder, trained.mean, trained.std
        view_name = self.view_of(name, section)
        with self.slot(f"{where}.view"):
            given = self.specs.view(view_name)
        if given.kind != "image":
            raise self.misfit(f"{where}.view", f"view '{view_name}' holds {given.kind}, a teacher looks at images")
        expected = given if mean is None else replace(given, mean=mean, std=std)
        specs = Specs(views={**self.specs.views, "x": replace(expected, name="x")})
        place = f"{where}.encoder" if section.encoder is not None else where
        cls, config = self.registry.resolve("encoder", choice)
        with self.slot(place, choice.type):
            teacher: Encoder = cls(config, specs)
        if mean is None and teacher.spec.mean is not None:
            mean, std = teacher.spec.mean, teacher.spec.std
        self.check_weights(place, name, section, teacher)
        if with_weights:
            self.load_published(place, teacher)
        if read_weights and path is not None:
            missing = load_into(teacher, path, prefix="encoder.", only_compare=not with_weights)
            if missing:
                raise CheckpointError(f"{path} lacks {some(missing)} of the encoder of teacher '{name}'")
        teachers.add_frozen(name, teacher, Renormalize(given, mean, std))
        self.publish(
            teachers={**self.specs.teachers, name: teacher.spec},
            teacher_views={**self.specs.teacher_views, name: view_name},
        )

    def check_weights(self, place: str, name: str, section: TeacherSection, teacher: Encoder) -> None:
        """A frozen teacher has weights from somewhere, or says that it has none."""
        if section.random and teacher.has_weights:
            text = f"encoder '{teacher.name}' has weights by its options; leave out these or teachers.{name}.random"
            raise self.misfit(place, text)
        given = section.random or section.checkpoint is not None or teacher.has_weights
        if given or not any(True for _ in teacher.parameters()):
            return
        options = teacher.config.model_dump() if teacher.config is not None else {}
        own = [
            f"encoder.{key}={value}"
            for key, value in (("pretrained", "true"), ("checkpoint", "FILE"))
            if key in options
        ]
        ways = [f"teachers.{name}.{way}" for way in (*own, "checkpoint=RUN (a run, or a folder of `mim import`)")]
        raise self.misfit(
            place,
            f"the frozen teacher '{name}' has no weights, so that encoder '{teacher.name}' would stay as it is drawn. "
            f"Give {', '.join(ways)}; or teachers.{name}.random=true, if a random network is meant",
        )

    def view_of(self, name: str, section: TeacherSection) -> str:
        return section.view or (name if name in self.specs.views else "x")

    def build_head(self, name: str, section: Any, encoder: Encoder, masker: Masker) -> Head:
        where = "" if self.recipe.heads is None else f"heads.{name}."
        with self.slot(where + "view"):
            seen = self.specs.also(encoder=encoder.spec.of(section.view), head_view=section.view)
            if section.view not in masker.spec.views:
                raise ValueError(f"masker '{masker.name}' masks {', '.join(masker.spec.views)}, not '{section.view}'")
        target: Target = self.make("target", where + "target", section.target, seen)
        specs = seen.also(target=target.spec)
        decoder: Decoder = self.make("decoder", where + "decoder", section.decoder, specs)
        specs = specs.also(pred=decoder.spec)
        loss: Loss = self.make("loss", where + "loss", section.loss, specs)
        sides = f"decoder '{decoder.name}' and target '{target.name}'"
        if lacking := encoder.spec.lacks(decoder.ask):
            raise self.misfit(
                where + "decoder", f"decoder '{decoder.name}' asks for {lacking}, which encoder '{encoder.name}' lacks"
            )
        if masker.spec.mixes != decoder.unmixes:
            sees = "mixes images" if masker.spec.mixes else "mixes no images"
            takes = "predicts from mixed images only" if decoder.unmixes else "cannot tell mixed images apart"
            raise self.misfit(where + "decoder", f"masker '{masker.name}' {sees}, decoder '{decoder.name}' {takes}")
        if target.spec.kind not in loss.accepts:
            accepted = ", ".join(sorted(loss.accepts))
            text = f"loss '{loss.name}' takes {accepted} targets, target '{target.name}' gives {target.spec.kind}"
            raise self.misfit(where + "loss", text)
        if "opaque" not in (target.spec.kind, decoder.spec.kind):
            wanted = "dense" if target.spec.kind in ("dense", "map") else "probs"
            if decoder.spec.kind != wanted:
                text = f"{sides} do not fit: {decoder.spec.kind} predictions for a {target.spec.kind} target"
                raise self.misfit(where + "decoder", text)
            if (decoder.spec.grid, decoder.spec.dim) != (target.spec.grid, target.spec.dim):
                text = (
                    f"{sides} do not fit: predictions of size {decoder.spec.dim} on grid {decoder.spec.grid}, "
                    f"targets of size {target.spec.dim} on grid {target.spec.grid}"
                )
                raise self.misfit(where + "decoder", text)
        return Head(target, decoder, loss, section.weight, section.view)

    def check_masker(self, masker: Masker, encoder: Encoder) -> None:
        sides = f"masker '{masker.name}' and encoder '{encoder.name}' do not fit"
        mask = masker.spec
        if reason := refusal(mask, encoder.spec):
            raise self.misfit("masker", f"{sides}: {reason}")
        for view in encoder.spec.views:
            if view not in mask.views and encoder.spec.grids:
                joined, masked = ", ".join(encoder.spec.views), ", ".join(mask.views)
                raise self.misfit("masker", f"{sides}: the encoder joins {joined}, the masker masks {masked}")
            grid, seen = mask.grid_of(view), encoder.spec.of(view)
            grids = f"mask grid {grid}, token grid {seen.grid}"
            ratios = list(zip(grid.shape, seen.grid.shape, strict=False))
            divisible = all(b % a == 0 for a, b in ratios) or all(a % b == 0 for a, b in ratios)
            if len(grid.shape) != len(seen.grid.shape) or not divisible:
                raise self.misfit("masker", f"{sides}: {grids}")
            if mask.num_hidden and any(a > b for a, b in ratios):
                token = f"a token of {shown(seen.stride)} pixels cannot be hidden in part"
                raise self.misfit("masker", f"{sides}: {grids}; {token}")

    def check_copies(self, objective: Objective) -> None:
        parts = {path: module for path, module in objective.named_modules() if path}
        for name, section in self.recipe.named_teachers().items():
            for path in section.copy_of:
                if path not in parts and section.of_teacher is None:
                    known = [each for each, module in parts.items() if isinstance(module, Component) or "." not in each]
                    text = f"objective '{objective.name}' has no part '{path}'{did_you_mean(path, known)}"
                    text = f"{text}; it has {', '.join(known)} and what is inside them"
                    raise self.misfit(f"teachers.{name}.copy", text)

    def check_teacher_asks(self, component: Component) -> None:
        for name, ask in component.teacher_asks().items():
            if lacking := self.specs.teacher(name).lacks(ask):
                sides = f"{component.kind} '{component.name}' asks teacher '{name}' for {lacking}"
                raise ValueError(f"{sides}, which its encoder lacks")

    def make(self, kind: str, where: str, choice: Choice, *arguments: Any) -> Any:
        cls, config = self.registry.resolve(kind, choice)
        with self.slot(where, choice.type):
            component = cls(config, *arguments)
        self.built[kind] = component.name
        return component

    def publish(self, **specs: Any) -> None:
        self.specs = self.specs.also(**specs)

    def misfit(self, where: str, text: str) -> RecipeError:
        return RecipeError(f"{self.recipe.location(where)}: {text}")

    @contextmanager
    def slot(self, where: str, name: str = "") -> Iterator[None]:
        """What a constructor raises is told with its place: a ValueError in its own words, others with their type."""
        try:
            yield
        except MimError:
            raise
        except Exception as error:
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            kinds = [kind for kind in ("masker", "encoder", "target", "decoder") if kind in self.built]
            beside = ", ".join(f"{kind} '{self.built[kind]}'" for kind in kinds)
            text = f"{text} (beside {beside})" if beside and name else text
            raise self.misfit(where, f"{name}: {text}" if name else text) from error


def matching(patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """The names that match one of the patterns.

    Raises:
        ValueError: if a pattern matches none, or together they match all.
    """
    found: set[str] = set()
    for pattern in patterns:
        own = set(fnmatch.filter(names, pattern))
        if not own:
            near = did_you_mean(pattern, names) or f", the first are {', '.join(names[:3])}"
            raise ValueError(f"pattern '{pattern}' matches no parameter{near}")
        found |= own
    if found and len(found) == len(names):
        raise ValueError(f"{', '.join(patterns)} leaves no parameter to train")
    return found


def decides_pixels(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that decide which pixels a fixed view of a sample holds."""
    source = recipe.data.source.model_dump(mode="json")
    views = recipe.views.model_dump(mode="json")
    place = ("root", *RemoteSection.model_fields)
    return {
        "data.source": {key: value for key, value in source.items() if key not in place},
        "data.views_per_image": recipe.data.views_per_image,
        "views": {
            key: value
            for key, value in views.items()
            if key not in ("decoder", *MIXING_OPTIONS) and (key, value) not in UNSAID.items()
        },
    }
