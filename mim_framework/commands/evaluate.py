"""`mim eval`: what encoders are worth, beside raw pixels and the encoders from which they started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mim_framework.assembly.builder import build_source
from mim_framework.assembly.opened import LoadedEncoder, load_encoder, load_run
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base.errors import CheckpointError, DataError, MimError, RecipeError
from mim_framework.base.paths import is_url, local_path
from mim_framework.checkpoints.checkpoint import best_checkpoint, find_latest, list_checkpoints, step_of
from mim_framework.commands.evaluation_report import Judged, Made, append_records, records, tables
from mim_framework.contract.components import Objective
from mim_framework.evaluate.base import EncoderSubject, PixelSubject
from mim_framework.evaluate.cache import FeatureCache
from mim_framework.evaluate.measure import JudgedSubject, Reading, check, measure
from mim_framework.evaluate.overlap import Overlap, find_overlap
from mim_framework.evaluate.splits import Splits
from mim_framework.features.subjects import open_encoder
from mim_framework.recipe.draft import recipe_of, with_evaluations
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.yaml import read_yaml
from mim_framework.registry.registry import Registry, UnknownName

PIXELS, UNTRAINED, TRAINED = "raw_pixels", "untrained", "trained"
EVERY_CHECKPOINT, BEST_CHECKPOINT = "all", "best"
OF_A_RUN = ("every_epochs", "forward_batch_size")
"""Keys of an evaluation that do not concern what it measures."""
NO_IMAGES = "(the encoder comes from no run)"


@dataclass(frozen=True)
class Options:
    """What `mim eval` is told beside the names of evaluations and subjects.

    `changes`: "NAME.KEY=VALUE" for options of an evaluation, else those of the subject's recipe or the defaults;
    "data.KEY=VALUE" for other images than those of its recipe. `train` and `test`: sources in their place, by a folder
    or URL of class folders, a name, or a mapping with options. `checkpoint`: a step, "best" or "all". `cache`: a folder
    for features.
    """

    changes: tuple[str, ...] = ()
    train: str | None = None
    test: str | None = None
    checkpoint: str | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Named:
    """An encoder as it was named, and where it comes from: of what is no run, neither directory nor step is known."""

    subject: str
    opened: LoadedEncoder
    run_dir: Path | None
    step: int | None
    checkpoint: Path | None = None


def evaluate(
    names: Sequence[str],
    subjects: Iterable[str | Path],
    changes: Sequence[str] = (),
    registry: Registry | None = None,
    *,
    options: Options = Options(),
    progress: Callable[[str], None] = lambda line: None,
) -> list[Judged]:
    """Make several evaluations of several subjects; those of one subject share its features.

    What was measured is added to `evaluations.jsonl` of a run's directory, subject by subject.

    Args:
        subjects: see `open_encoder`; of a run directory, the newest checkpoint is taken.
        changes: further ones beside those of the options.
        progress: told what is measured next.

    Raises:
        RecipeError: if there is no such evaluation, option, source or subject, or the encoder cannot be judged so.
        DataError: if there are no labelled images and one is needed.
        CheckpointError: if there is no whole checkpoint, or its model has no part named `encoder`.
    """
    registry = registry or Registry()
    options = replace(options, changes=(*options.changes, *changes))
    found = []
    for subject in subjects:
        judge = _Judge(names, options, registry, progress)
        for named in opened_subjects(str(subject), options.checkpoint, registry):
            judged = judge(named)
            if judged.run_dir is not None:
                append_records(judged, registry)
            found.append(judged)
    return found


def report(
    names: Sequence[str],
    subjects: Sequence[str],
    changes: Sequence[str],
    registry: Registry,
    *,
    as_json: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Iterator[str]:
    """The lines that `mim eval` prints; see `evaluate`, and `Options` for its options."""
    told = Options(**options)
    judged = evaluate(names, subjects, changes, registry, options=told, progress=progress)
    if as_json:
        yield from records(judged, registry)
        return
    yield from tables(judged)
    if told.cache is not None:
        files, size = FeatureCache(told.cache).size()
        much = f"{files:,} files, {size / 2**20:,.1f} MiB"
        yield f"cache: {much} in {told.cache}; it is never trimmed, delete it at will"


def opened_subjects(subject: str, checkpoint: str | None, registry: Registry) -> Iterator[Named]:
    """The encoders that a subject names, opened one after the other: several if all checkpoints are wanted."""
    try:
        path = Path(local_path(subject))
    except ValueError as error:
        raise RecipeError(f"{subject}: {error}") from error
    if path.parent.name == "checkpoints" and (path.parent.parent / "recipe.yaml").is_file():
        if checkpoint is not None:
            raise RecipeError(
                f"--checkpoint chooses among those of a run, and {subject} is one; name {path.parent.parent}"
            )
        opened = load_encoder(path.parent.parent, checkpoint=path, registry=registry)
        yield Named(subject, opened, path.parent.parent, step_of(path), path)
        return
    if not (path / "recipe.yaml").is_file():
        opened = open_encoder(subject, registry=registry)
        if checkpoint is not None:
            raise RecipeError(f"--checkpoint chooses among those of a run, and {subject} is none")
        yield Named(subject, opened, None, opened.origin.step)
        return
    for each in _checkpoints(path, checkpoint):
        yield Named(subject, load_encoder(path, checkpoint=each, registry=registry), path, step_of(each), each)


def _checkpoints(run_dir: Path, wanted: str | None) -> list[Path]:
    """The newest whole checkpoint of a run, that of a step, the best one, or all."""
    if wanted is None:
        if (newest := find_latest(run_dir / "checkpoints")) is None:
            raise CheckpointError(f"{run_dir} holds no checkpoint yet")
        return [newest.path]
    if wanted == BEST_CHECKPOINT:
        return [best_checkpoint(run_dir)]
    every = list_checkpoints(run_dir / "checkpoints")
    found = every if wanted == EVERY_CHECKPOINT else [each for each in every if str(step_of(each)) == wanted]
    if not found:
        steps = ", ".join(str(step_of(each)) for each in every) or "none"
        raise CheckpointError(
            f"--checkpoint {wanted}: {run_dir} has no such checkpoint; it has {steps}, or write best or all"
        )
    return found


class _Judge:
    """Judges the encoders of one subject: all checkpoints of a run, whose pixels and first weights are the same."""

    def __init__(
        self, names: Sequence[str], options: Options, registry: Registry, progress: Callable[[str], None]
    ) -> None:
        self.names, self.options, self.registry, self.progress = names, options, registry, progress
        self._prepared: tuple[Recipe, Splits, Overlap, Overlap | None] | None = None
        self._before: dict[str, dict[str, Reading]] = {}

    def __call__(self, named: Named) -> Judged:
        if self._prepared is None:
            self._prepared = self._prepare(named)
        recipe, splits, overlap, in_train = self._prepared
        readings = {**self._before}
        for variant, subject in self._variants(named, recipe, splits):
            if variant not in readings:
                readings[variant] = self._read(named, variant, subject, recipe)
        self._before = {variant: found for variant, found in readings.items() if variant != TRAINED}
        made = []
        for choice in recipe.evaluate:
            of_each = {variant: found[choice.type] for variant, found in readings.items() if choice.type in found}
            own = {key: each for key, each in choice.model_dump(mode="json").items() if key not in OF_A_RUN}
            made.append(Made(own, of_each[TRAINED].asked, {each: found.numbers for each, found in of_each.items()}))
        return Judged(named.subject, named.run_dir, named.step, named.opened, splits, overlap, tuple(made), in_train)

    def _prepare(self, named: Named) -> tuple[Recipe, Splits, Overlap, Overlap | None]:
        """What is measured on which images, once for all checkpoints; everything that is wrong is told here."""
        changes = _changes(self.options, self.names, self.registry)
        own = named.opened.recipe
        recipe = with_evaluations(own or _of_no_run(named, changes, self.registry), self.names, changes, self.registry)
        splits = evaluation_splits(recipe, self.registry)
        for choice in recipe.evaluate:
            cls, config = self.registry.resolve("evaluation", choice)
            evaluation = cls(config)
            place = f"evaluation '{choice.type}' of {named.subject}"
            try:
                check(evaluation, named.opened.trained.spec, choice.layers)
            except ValueError as error:
                raise RecipeError(f"{place}: {error}") from error
            if lacking := splits.lacks(evaluation):
                raise DataError(f"{place}: {lacking}")
            if evaluation.of_classifier:
                self._check_classifier(place, named, splits)
        return recipe, splits, _overlap(splits, own, self.registry), _in_train(splits)

    def _check_classifier(self, place: str, named: Named, splits: Splits) -> None:
        """
        Raises:
            DataError: if the subject has no classifier, or one of other classes than the images have.
        """
        own = None if named.run_dir is None else named.opened.recipe
        if own is None or self.registry.find("objective", own.objective.type).logits is Objective.logits:
            what = "is no run" if own is None else f"was trained by objective '{own.objective.type}'"
            raise DataError(
                f"{place}: it is of a classifier that a run has trained, and {named.subject} {what}; train one from "
                f"it, for example mim run mae_finetune init={named.subject}, or use knn"
            )
        wanted, found = build_source(own, self.registry).classes, splits.sources["test"].classes
        if list(wanted or ()) != list(found or ()):
            raise DataError(
                f"{place}: its classifier tells {len(wanted or ())} classes, and those of the images to be tested on "
                "are others; name images by data.eval_source alone, whose classes are then matched by name"
            )

    def _variants(self, named: Named, recipe: Recipe, splits: Splits) -> Iterator[tuple[str, JudgedSubject]]:
        """The pixels, the untrained and the trained encoder, one after the other, so that one holds its features."""
        opened = named.opened
        cache = None if self.options.cache is None else FeatureCache(self.options.cache)
        of_classifier = any(self.registry.find("evaluation", choice.type).of_classifier for choice in recipe.evaluate)
        encoders = {UNTRAINED: opened.untrained, TRAINED: opened.trained}
        for variant in (PIXELS, UNTRAINED, TRAINED):
            if (encoder := encoders.get(variant, opened.trained)) is None:
                continue
            objective = None
            if of_classifier and variant == TRAINED and named.run_dir is not None:
                objective = load_run(named.run_dir, checkpoint=named.checkpoint, registry=self.registry).objective
            subject = EncoderSubject(
                encoder, opened.views, splits, device=opened.device, workers=recipe.data.num_workers, cache=cache,
                batch_size=min(choice.forward_batch_size for choice in recipe.evaluate), objective=objective,
            )  # fmt: skip
            yield variant, PixelSubject(subject) if variant == PIXELS else subject

    def _read(self, named: Named, variant: str, subject: JudgedSubject, recipe: Recipe) -> dict[str, Reading]:
        found = {}
        for choice in recipe.evaluate:
            cls, config = self.registry.resolve("evaluation", choice)
            if variant == TRAINED or (not cls.of_classifier and (variant != PIXELS or cls.of_pixels)):
                step = "" if named.step is None else f" (step {named.step})"
                self.progress(f"{named.subject}{step}, {variant.replace('_', ' ')}: {choice.type} ...")
                found[choice.type] = measure(cls(config), subject, choice.layers)
        return found


def _of_no_run(named: Named, changes: Sequence[str], registry: Registry) -> Recipe:
    """A recipe for an encoder that has none, of which nothing but the images is read; these must be named.

    Raises:
        RecipeError: if they are not.
    """
    if not any(change.startswith("data.") for change in changes):
        text = f"{named.subject} comes from no run, so that there are no images to judge it by; name some"
        raise RecipeError(f"{text}: --train SOURCE --test SOURCE")
    slots = {"masker": "none", "encoder": "vit", "target": "pixels", "decoder": "linear", "loss": "mse"}
    around = {"optim": {"lr": 1.0}, "train": {"total_batch_size": 1, "steps": 1}, "evaluate": []}
    source = {"type": "folder", "root": NO_IMAGES}
    return recipe_of({"name": "eval", "data": {"source": source}, **slots, **around}, registry)


def _overlap(splits: Splits, trained_by: Recipe | None, registry: Registry) -> Overlap:
    """The images to be tested on that the encoder was trained on; without such a split, those to learn from."""
    test = splits.sources.get("test", splits.sources["train"])
    if trained_by is None:
        return Overlap(len(test), 0, not_compared="the encoder comes from no run")
    try:
        trained_on = build_source(trained_by, registry)
    except MimError as error:
        return Overlap(len(test), 0, not_compared=f"those of pre-training cannot be read: {error}")
    return find_overlap(test, trained_on)


def _in_train(splits: Splits) -> Overlap | None:
    """The images to be tested on that are also there to learn from; None without both splits."""
    if (test := splits.sources.get("test")) is None or (train := splits.sources.get("train")) is None:
        return None
    return replace(find_overlap(test, train), among="those to learn from")


def _changes(options: Options, names: Sequence[str], registry: Registry) -> list[str]:
    """The changes of a subject's recipe, those of --train and --test first."""
    labels = False
    for name in names:
        with suppress(UnknownName):  # which is told with all other problems
            labels |= bool(registry.find("evaluation", name).needs)
    keys = {"train": ("data.eval_train_source", options.train), "test": ("data.eval_source", options.test)}
    named = [
        f"{key}={json.dumps(source_of(text, f'--{flag}', registry, labels=labels))}"
        for flag, (key, text) in keys.items()
        if text is not None
    ]
    return [*named, *options.changes]


def source_of(text: str, flag: str, registry: Registry, *, labels: bool) -> dict[str, Any]:
    """A source as a recipe writes it, from what stands behind --train or --test.

    Args:
        labels: whether the class folders of a folder are wanted as labels.

    Raises:
        RecipeError: if it is neither a folder, nor a URL, nor the name of a source, or a folder and a name.
    """
    if text.lstrip().startswith("{"):
        found = read_yaml(text, flag).data
        return found if isinstance(found, dict) else {"type": ""}
    is_folder = is_url(text) or Path(local_path(text)).is_dir()
    try:
        registry.find("source", text)
    except UnknownName as error:
        if not is_folder and os.sep not in text:
            raise RecipeError(f"{flag} {text}: there is no such folder, and {error}") from error
        return {"type": "folder", "root": text, "labels": labels}
    if is_folder:
        raise RecipeError(f"{flag} {text} is a folder and a source; write ./{text} or '{{type: {text}}}'")
    return {"type": text}
