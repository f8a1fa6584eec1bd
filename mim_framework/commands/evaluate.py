"""`mim eval`: what encoders are worth, beside raw pixels and the encoders from which they started."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mim_framework.assembly.builder import build_source
from mim_framework.assembly.opened import LoadedEncoder, load_encoder
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base.errors import DataError, RecipeError
from mim_framework.base.paths import local_path
from mim_framework.contract.evaluation import Evaluation, Split
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.base import EncoderSubject, PixelSubject
from mim_framework.evaluate.splits import Splits
from mim_framework.recipe.draft import with_evaluations
from mim_framework.registry.registry import Registry

PIXELS = "raw_pixels"


@dataclass(frozen=True)
class Judged:
    """What evaluations measured of a subject: images of each split, and numbers by variant and by name."""

    subject: str
    images: dict[Split, int]
    numbers: dict[str, dict[str, float]]

    @property
    def names(self) -> list[str]:
        """The names of all numbers."""
        return list(dict.fromkeys(name for row in self.numbers.values() for name in row))


def evaluate(
    names: Sequence[str], subjects: Iterable[str | Path], changes: Sequence[str] = (), registry: Registry | None = None
) -> list[Judged]:
    """Make several evaluations of several subjects; those of one subject share its features.

    Args:
        subjects: see `open_subject`.
        changes: "NAME.KEY=VALUE" for options of an evaluation, else those of the subject's recipe or the defaults;
            "data.KEY=VALUE" for other images than those of its recipe.

    Raises:
        RecipeError: if there is no such evaluation, option or subject, or the encoder cannot be judged so.
        DataError: if there are no labelled images and one is needed.
        CheckpointError: if there is no whole checkpoint, or its model has no part named `encoder`.
    """
    registry = registry or Registry()
    return [_judge(str(subject), names, changes, registry) for subject in subjects]


def report(names: Sequence[str], subjects: Sequence[str], changes: Sequence[str], registry: Registry) -> str:
    """What `mim eval` prints; see `evaluate`."""
    return "\n".join(lines(evaluate(names, subjects, changes, registry)))


def open_subject(subject: str, registry: Registry) -> LoadedEncoder:
    """What a subject names: an encoder before and after its training, and what it looks at.

    A subject is a run directory, whose newest checkpoint is taken, or a checkpoint folder inside one.
    """
    try:
        path = Path(local_path(subject))
    except ValueError as error:
        raise RecipeError(f"{subject}: {error}") from error
    run_dir, checkpoint = path, None
    if path.parent.name == "checkpoints" and (path.parent.parent / "recipe.yaml").is_file():
        run_dir, checkpoint = path.parent.parent, path
    if not (run_dir / "recipe.yaml").is_file():
        what = "does not exist" if not path.exists() else "has no recipe.yaml"
        raise RecipeError(f"{subject} is neither a run directory nor a checkpoint folder inside one: it {what}")
    return load_encoder(run_dir, checkpoint=checkpoint, registry=registry)


def _judge(subject: str, names: Sequence[str], changes: Sequence[str], registry: Registry) -> Judged:
    opened = open_subject(subject, registry)
    recipe = with_evaluations(opened.recipe, names, changes, registry)
    evaluations = [cls(config) for cls, config in (registry.resolve("evaluation", each) for each in recipe.evaluate)]
    splits = evaluation_splits(recipe, registry, build_source(recipe, registry))
    _check(evaluations, opened.trained.spec, splits, subject)
    encoders = {
        variant: EncoderSubject(
            encoder, opened.views, splits, device=opened.device, workers=recipe.data.num_workers,
            batch_size=min(choice.forward_batch_size for choice in recipe.evaluate),
        )
        for variant, encoder in {"untrained": opened.untrained, "trained": opened.trained}.items()
    }  # fmt: skip
    numbers = {}
    for variant, judged in {PIXELS: PixelSubject(encoders["trained"]), **encoders}.items():
        measured = {
            f"{evaluation.name}_{key}": value
            for evaluation in evaluations
            if variant != PIXELS or evaluation.of_pixels
            for key, value in evaluation(judged).items()
        }
        numbers |= {variant: measured} if measured else {}
    return Judged(subject, {split: len(source) for split, source in splits.sources.items()}, numbers)


def _check(evaluations: list[Evaluation], spec: EncoderSpec, splits: Splits, subject: str) -> None:
    for evaluation in evaluations:
        try:
            evaluation.check(spec)
        except ValueError as error:
            raise RecipeError(f"evaluation '{evaluation.name}' of {subject}: {error}") from error
        if lacking := splits.lacks(evaluation):
            raise DataError(f"evaluation '{evaluation.name}' of {subject}: {lacking}")


def lines(judged: Sequence[Judged]) -> Iterator[str]:
    """'variant: number', under a title where there is more than one table, and how many images there are."""
    tables = [(each, name) for each in judged for name in each.names]
    for each, name in tables:
        if len(tables) > 1:
            yield f"{each.subject}: {name}"
        yield from (f"{variant}: {row[name]:.4f}" for variant, row in each.numbers.items() if name in row)
    for images in dict.fromkeys(", ".join(f"{n} {split}" for split, n in each.images.items()) for each in judged):
        yield f"images: {images}"
