"""`mim eval health RUN --report`: the page on a run's health, as it is also written at the end of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mim_framework.assembly.doubts import doubts
from mim_framework.assembly.opened import load_run
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base.errors import MimError, RecipeError
from mim_framework.evaluate.base import EncoderSubject
from mim_framework.evaluate.health.evaluation import Health
from mim_framework.evaluate.health.report import write_report
from mim_framework.evaluate.health.verdicts import Judgement
from mim_framework.recipe.draft import with_evaluations
from mim_framework.registry.registry import Registry
from mim_framework.training.health import training_of


def report_health(run_dir: Path, changes: Sequence[str] = (), registry: Registry | None = None) -> Judgement:
    """Measure the health of a run at its newest checkpoint, and write `report.html` and `report.md` into its directory.

    Args:
        changes: "health.KEY=VALUE" for options of the evaluation, else those of the run's recipe or the defaults.

    Raises:
        MimError: if the directory holds no run with a checkpoint, an option is wrong, or the page cannot be written.
    """
    registry = registry or Registry()
    run = load_run(run_dir, registry=registry)
    recipe = with_evaluations(run.recipe, [Health.name], changes, registry)
    [choice] = recipe.evaluate
    cls, config = registry.resolve("evaluation", choice)
    evaluation = cls(config)
    encoder = run.objective.encoder
    if encoder is None:
        raise MimError(f"{run_dir}: its objective has no part `encoder` whose health could be measured")
    try:
        evaluation.check(encoder.spec)
    except ValueError as error:
        raise RecipeError(f"evaluation 'health' of {run_dir}: {error}") from error
    splits = evaluation_splits(recipe, registry, run.source)
    subject = EncoderSubject(
        encoder, run.views, splits, device=run.device, workers=recipe.data.num_workers,
        batch_size=choice.forward_batch_size, method=run.method(),
    )  # fmt: skip
    notes = [*run.notes, *doubts(run.recipe, registry, run.source, run.device)]
    judgement = write_report(subject, run_dir, evaluation(subject), training_of(run.recipe, notes))
    assert judgement is not None
    return judgement


def lines(run_dir: Path, judgement: Judgement) -> Iterator[str]:
    """What is printed of a report."""
    yield f"{run_dir}: {judgement.diagnosis}. {judgement.sentence}"
    for each in judgement.verdicts:
        yield f"{each.level}: {each.topic}: {each.text} {each.cure}".rstrip()
    yield f"report: {run_dir / 'report.html'}"
