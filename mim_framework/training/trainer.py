"""The training loop. Read `Trainer.train_step` and then `builtins/objectives.py`: the two are one whole training step.

Plugins hook in around the step, never inside it. Everything random follows from the sample positions, schedules are
pure functions of the step, and a checkpoint holds the rest; so a resumed run goes on bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mim_framework.assembly.builder import build_optimizers
from mim_framework.assembly.doubts import doubts
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base import rng
from mim_framework.base.errors import DataError, MimError, TrainingError, Unreachable
from mim_framework.checkpoints.checkpoint import Checkpoint
from mim_framework.contract.components import Component
from mim_framework.contract.world import World
from mim_framework.data.loader import Batch, Loader
from mim_framework.evaluate.health.evaluation import Health
from mim_framework.evaluate.health.report import NUM_IMAGES, write_report
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import process_group
from mim_framework.runtime.metrics import MetricsWriter, as_picture
from mim_framework.runtime.sharding import gradient_sync, whole_weights
from mim_framework.training.best import Best
from mim_framework.training.directory import prepare_directory, sole_run
from mim_framework.training.evaluations import Evaluations, planned
from mim_framework.training.explosion import Watch
from mim_framework.training.explosions import Explosions, GoneBack, merged
from mim_framework.training.health import training_of
from mim_framework.training.listeners import Listeners
from mim_framework.training.log import Log, counted_before
from mim_framework.training.measured import History, Summary
from mim_framework.training.pictures import draw_fixed
from mim_framework.training.progress import Progress
from mim_framework.training.published import comparison
from mim_framework.training.run import Run
from mim_framework.training.saving import Saver
from mim_framework.training.setup import set_up
from mim_framework.training.stopping import StepGivenUp, StopSignal
from mim_framework.training.troubles import Trouble, explained
from mim_framework.training.untouched import Untouched
from mim_framework.training.watchdog import LAST_RESORT_SECONDS, Watchdog

LEAST_GROUP_TIMEOUT = 600.0
"""Seconds that ranks wait for each other at least: rank 0 saves and hashes checkpoints meanwhile."""


def train(
    recipe: Recipe | str | Path,
    registry: Registry | None = None,
    *,
    fresh: bool = False,
    allow_change: Sequence[str] = (),
    **overrides: Any,
) -> Path:
    """Train a recipe, or go on with it if its run directory holds a checkpoint; returns the run directory.

    Args:
        recipe: a checked one, a file, or the name of a shipped one.
        fresh: refuse a run directory that already holds a run.
        allow_change: keys such as "train.epochs" or "optim.lr" that a run which goes on may change; it is recorded.
        overrides: changes of a file or shipped recipe by key, such as `output_dir="/runs"`, `optim={"lr": 1e-3}` or
            `**{"optim.lr": 1e-3}`.

    Raises:
        MimError: for everything that a user can cause and cure.
    """
    if not isinstance(recipe, Recipe):
        changes = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        recipe, overrides = load_recipe(recipe, changes, registry), {}
    if overrides:
        raise ValueError(f"a checked recipe takes no overrides, got {', '.join(overrides)}; give them to load_recipe")
    registry = registry or Registry()
    with joined(recipe) as (world, device):
        while True:
            prepare = partial(prepare_directory, recipe, registry, world, fresh=fresh, allow_change=allow_change)
            with Trainer._ready(recipe, registry, world, device, prepare) as trainer, suppress(GoneBack):
                trainer.fit()
                return trainer.run.dir
            del trainer  # before its successor is built
            fresh = False


@contextmanager
def joined(recipe: Recipe) -> Iterator[tuple[World, torch.device]]:
    """Together with the other ranks, and the only run in the directory."""
    limit = recipe.train.step_timeout
    timeout = None if limit is None else max(limit, LEAST_GROUP_TIMEOUT) + LAST_RESORT_SECONDS
    with process_group(recipe.train.device, timeout=timeout) as (world, device), sole_run(recipe, world):
        yield world, device


class Trainer:
    """One run on one rank. `Trainer.opened` gives one that is ready for its next step."""

    loader: Loader
    log: Log

    def __init__(self, run: Run, registry: Registry) -> None:
        """A run as `set_up` makes it, before its first step."""
        self.registry, self.listeners = registry, Listeners(registry.hook, run)
        self.run, self.engine, self.objective = run, run.engine, run.model.objective
        self.teachers = run.model.teachers
        splits = evaluation_splits(run.recipe, registry, run.source)
        self.held_out = splits.sources.get("test", run.source)
        self.phases = run.recipe.named_phases()
        self.optimizers = build_optimizers(run.recipe, self.objective, run.layout.total_batch_size)
        self.stop = StopSignal(self._until_the_stop)
        self.untouched = Untouched(self.objective)
        self.watchdog = Watchdog(run.dir, run.world, run.recipe.train.step_timeout)
        self.checkpoints = Saver(run, self.optimizers, saved=self._saved)
        self.evaluations = Evaluations(
            planned(run.recipe, registry), self.objective.encoder, run.model.views, splits,
            device=run.device, world=run.world, workers=run.recipe.data.num_workers, precision=self._outside_a_step,
            objective=self.objective, method=run.method,
        )  # fmt: skip
        self.watch, self.explosions = Watch(run.recipe), Explosions(run.dir)
        self.best = Best(run.recipe.checkpoint.keep_best, run.dir)
        self.measured: dict[str, float] = {}
        self.start, self.resumed = 0, None

    @classmethod
    @contextmanager
    def opened(cls, recipe: Recipe, registry: Registry | None = None, *, fresh: bool = False) -> Iterator[Trainer]:
        """A trainer on this rank, with its loader and log open, at the step where its run directory stands.

        Raises:
            MimError: for everything that a user can cause and cure.
        """
        registry = registry or Registry()
        with joined(recipe) as (world, device):
            prepare = partial(prepare_directory, recipe, registry, world, fresh=fresh)
            with cls._ready(recipe, registry, world, device, prepare) as trainer:
                yield trainer

    @classmethod
    @contextmanager
    def _ready(
        cls, recipe: Recipe, registry: Registry, world: World, device: torch.device, directory: Callable[[], Path]
    ) -> Iterator[Trainer]:
        """The same on a rank that has joined the others; `directory` makes or checks the run directory."""
        trainer = cls(set_up(recipe, registry, world, device, directory), registry)
        trainer.go_on_from(trainer.checkpoints.newest())
        world.on_main(lambda: trainer.explosions.forget_after(trainer.start))
        with trainer._observed():
            yield trainer

    def go_on_from(self, found: Checkpoint | None) -> None:
        """Take the state of a checkpoint, if there is one, and stand at its step."""
        holes = self.explosions.holes()
        if found is not None:
            self.checkpoints.restore(found)
            self.start, self.resumed = found.step, found
            self.watch = Watch(self.run.recipe, found.state.get("watch"))
            self.best = Best(self.best.metric, self.run.dir, found.state.get("best"))
            holes += found.state.get("left_out", [])
        self.run.layout = replace(self.run.layout, left_out=merged(holes))

    # --- one step ----------------------------------------------------------------------------------------------------

    def train_step(self, index: int, micro_batches: Iterable[Batch]) -> Summary:
        """One optimizer step per phase. Returns the means over micro-batches and ranks of what was measured."""
        torch.manual_seed(self.step_seed(index))  # dropout and the like, so that they resume exactly
        accum_steps = self.run.layout.accum_steps
        summaries: dict[str, Summary] = {}
        for phase in self.phases:
            self.watchdog.at(f"phase {phase.name}, before its first micro-batch")
            optimizers = [self.optimizers[name] for name in phase.optimizers]
            history = History(accum_steps, over_positions=self.run.recipe.train.average == "over_positions")
            for micro, batch in enumerate(micro_batches, start=1):
                step = self.run.step(index, batch, phase.name)
                self.watchdog.at(f"phase {phase.name}, micro-batch {micro} of {accum_steps}")
                with gradient_sync(self.engine.model, enabled=micro == accum_steps):
                    loss = history.add(batch, self.engine.forward(step, batch.views))
                    (phase.sign * loss).backward()
            self.watchdog.at(f"phase {phase.name}, after its micro-batches")
            self.engine.before_step(step)
            history.divide(self.objective.parameters(), self.run.world)
            for optimizer in optimizers:
                optimizer.schedule(step)
            grad_norms = {optimizer.name: optimizer.clip() for optimizer in optimizers}
            told, unread = self.stop.told(self.run.device), self.loader.failure is not None
            summary = history.reduce(self.run.world, grad_norms, told, unread=unread)  # the one wait for the device
            self.watchdog.at(f"phase {phase.name}, after the wait for the other ranks")
            if summary.unread:
                raise self._saved_after_failed_reading(index)
            if summary.finite:
                self.untouched.forget()
                for optimizer in optimizers:
                    optimizer.step()
                self.engine.after_step(step)
            else:
                self.log.skipped(index, phase.name, history, summary)
            self.objective.zero_grad(set_to_none=True)
            summaries[phase.name] = summary
        measured = Summary.of_phases(summaries)
        if measured.finite:
            self.teachers.update(step, self.objective)  # once per step, however many phases it has
        return measured

    def fit(self) -> None:
        """All steps that are left, with logging, evaluation and checkpoints after each."""
        run, error = self.run, None
        self.listeners.tell("mim_run_started")
        try:
            with self.watchdog.watched(), self.stop.watched(run.world), closing(iter(self.loader)) as batches:
                if self.start >= run.total_steps:
                    self.log.note(
                        f"the run is finished: its {run.total_steps} steps were made before. To make more, give it a "
                        "new length, for example train.epochs=N --allow-change train.epochs"
                    )
                for doubt in self._doubts():
                    self.log.note(doubt)
                self._say_what_is_left_out()
                for index in range(self.start, run.total_steps):
                    if (trouble := self._one_step(index, batches)) is not None:
                        failure = TrainingError(f"{trouble.text}. {self._save_what_there_is(index)}")
                        failure.told_by_another_rank = trouble.of_another_rank
                        raise failure
                self._say_what_is_left_out()
        except BaseException as raised:
            error = raised
            if isinstance(raised, Unreachable) and self.loader.failure is None:
                self.log.reading_failed_at_once(self.start)
            raise
        finally:
            self.listeners.tell("mim_run_finished", error=error)

    def _saved_after_failed_reading(self, index: int) -> DataError:
        """Save the state before this step, in which some rank had no images; the error that ends the run.

        Every rank must call it.
        """
        self.log.reading_failed(index)
        if index > self.start and self.untouched.yet:
            self._save_before(index)
            self.log.note(f"reading failed; saved after step {index}, the same command goes on from here")
        if self.loader.failure is not None:
            return self.loader.failure
        error = DataError("another rank could not read its images")
        error.told_by_another_rank = True
        return error

    def _one_step(self, index: int, batches: Iterator[Batch]) -> Trouble | None:
        """A step and what comes after it, or what has kept the run from it.

        The error itself is let go here: its traceback would hold the memory that ran out, or the workers that are left.
        """
        try:
            with self.watchdog.over_a_step(index):
                measured = self.whole_step(index, batches)
            self._after_step(index + 1, measured)
        except StepGivenUp:
            self._leave_before(index)
        except Exception as error:
            if (trouble := explained(error, self.run, index)) is None:
                raise
            return trouble
        return None

    def whole_step(self, index: int, batches: Iterator[Batch]) -> Summary:
        """A step with what the first one needs before it."""
        self.untouched.begin()
        read = islice(batches, self.run.layout.accum_steps)  # while the device works
        micro_batches: Iterable[Batch] = self._until_told(read)
        if len(self.phases) > 1 or self._begins_from_data(index):
            micro_batches = list(micro_batches)
        self.calibrate(index, micro_batches)
        return self.train_step(index, micro_batches)

    def _until_told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Micro-batches until a signal comes, if the step can still be given up. Several ranks agree at its end."""
        for batch in batches:
            if self.stop.received and self.run.world.size == 1 and self.untouched.yet:
                raise StepGivenUp
            yield batch

    def _leave_before(self, index: int) -> None:
        """Stop with the state before a step.

        Raises:
            SystemExit: always.
        """
        if index:
            self._save_before(index)
        self._leave_after(index)

    def _save_what_there_is(self, index: int) -> str:
        """Save the state before a step that failed, where it is still there; says from where the run goes on."""
        if index and self.run.world.size == 1 and self.untouched.yet:
            with suppress(Exception):  # what stopped the step may stop this too
                self._save_before(index)
                return f"The same command goes on from step {index}, which was saved"
        return "The same command goes on from the last checkpoint"

    def _save_before(self, index: int) -> None:
        """Save the state before a step that does not count. Every rank must call it."""
        self.objective.zero_grad(set_to_none=True)
        self.checkpoints.save(index, self._numbers(before_step=True), rising=self.watch.rising)

    def _leave_after(self, done: int) -> None:
        """
        Raises:
            SystemExit: always.
        """
        self.log.note(f"stopped by signal after step {done}; the same command goes on from here")
        self.stop.leave()

    def _until_the_stop(self) -> str:
        """For what the run waits when it is told to stop, and for how long; one rank of each machine says it."""
        if self.run.world.local_rank:
            return ""
        speed = self.log.throughput.recent()
        long = f", about {speed['step_s']:.1f} s" if speed else ""
        micro = self.run.world.size == 1 and self.run.layout.accum_steps > 1
        what = "next micro-batch or the end of the step" if micro else "end of the step"
        return f"stopping at the {what}{long}, with a checkpoint; Ctrl-C once more leaves at once, without one"

    def _doubts(self) -> list[str]:
        """What is allowed but hardly meant, on rank 0 of a run that begins."""
        run = self.run
        if self.start or not run.world.is_main:
            return []
        return [*run.model.notes, *doubts(run.recipe, self.registry, run.source, run.device)]

    def _begins_from_data(self, index: int) -> bool:
        return index == 0 and self.engine.begins_from_data()

    def calibrate(self, index: int, micro_batches: Iterable[Batch]) -> None:
        """Before the first step, let components begin from its data."""
        if not self._begins_from_data(index):
            return
        name = self.phases[0].name
        self.engine.calibrate([(self.run.step(0, batch, name), batch.views) for batch in micro_batches])

    def step_seed(self, index: int) -> int:
        """Seed of the global generators for a step, another on every rank."""
        position = torch.tensor([index * self.run.world.size + self.run.world.rank])
        return int(rng.random_bits(self.run.recipe.seed, "global generator", position, 1)) & (2**63 - 1)

    # --- after a step; `done` counts the finished ones -------------------------------------------------------------

    def _after_step(self, done: int, measured: Summary) -> None:
        run, recipe = self.run, self.run.recipe
        last = done == run.total_steps
        self.stop.agreed = self.stop.agreed or measured.stop
        line = self.log.step(done, measured)
        if line is not None and run.world.is_main:
            self.listeners.tell("mim_metrics_logged", step=done, metrics=line)
        if measured.finite:
            rise = self.watch.step(done - 1, measured.losses, epoch=run.epoch(done - 1), last=last)
            if rise is not None:
                self.explosions.answer(rise, run, self.checkpoints, self.log.note)
                self.watch.accept()
        better = self.best.metric is not None and self._evaluate(done, last=last)  # before it is saved, with the state
        if last or better or self.stop.agreed or self.checkpoints.due(done) or self._first_skipped(done, measured):
            must = last or self.stop.agreed
            self.checkpoints.save(done, self._numbers(), rising=self.watch.rising, must=must)
        if better and run.world.is_main:
            self.best.write()
        if self.stop.agreed and not last:
            self._leave_after(done)
        if self.best.metric is None:
            self._evaluate(done, last=last)
        if last or run.due(done, recipe.log.images_every_epochs):
            self._draw(done)
        if last and run.world.is_main and (line := comparison(recipe, self._reached(), self.registry)) is not None:
            self.log.note(line)
        if last:
            self._report_health(done)

    def _evaluate(self, done: int, *, last: bool) -> bool:
        """Make the evaluations that are due; whether the number that decides about the best state was never higher."""
        due = lambda every: last or self.run.due(done, every)  # noqa: E731
        found = self.evaluations.run_due(done, due, log=self.log.numbers, note=self.log.note)
        self.measured |= found
        return self.best.take(done, found)

    def _reached(self) -> float | None:
        """The number of this run that stands beside the published one: the best one kept, else the last."""
        published, best = self.run.recipe.published, self.best.state
        if published is None:
            return None
        return best["value"] if best and best["metric"] == published.metric else self.measured.get(published.metric)

    def _numbers(self, *, before_step: bool = False) -> dict[str, Any]:
        """What a resumed run must remember besides tensors; `before_step`: as it was before the step in the making."""
        best = {} if self.best.state is None else {"best": self.best.state}
        return {**self.log.state(before_step=before_step), "watch": self.watch.state(), **best}

    def _first_skipped(self, done: int, measured: Summary) -> bool:
        """Whether to keep the state for `mim replay`: at the first skipped step of a row, if its weights are finite."""
        return self.log.nonfinite_in_a_row == 1 and not measured.finite and self.checkpoints.worth_keeping(done)

    @contextmanager
    def _outside_a_step(self) -> Iterator[None]:
        """For passes beside the step: whole weights, in the precision of the run."""
        with self.engine.autocast(), whole_weights(self.objective):
            yield

    def _say_what_is_left_out(self) -> None:
        """What lies beside the images and is not read, of training and of evaluation."""
        if not self.run.world.is_main:
            return
        for source, what in {self.held_out: "the images of evaluations", self.run.source: "data.source"}.items():
            if out := source.left_out():
                self.log.note(f"left out of {what}: {', '.join(out)}")

    def _draw(self, done: int) -> None:
        with self._outside_a_step():
            picture = draw_fixed(self.run, self.held_out)
        if self.log.metrics is None:
            return
        if picture is not None:
            self.log.metrics.image("reconstructions", picture, done)
        for path, module in self.objective.named_modules():
            for name, pixels in module.pictures().items() if isinstance(module, Component) else ():
                self.log.metrics.image(f"{path or module.name}.{name}", as_picture(pixels), done)

    def _report_health(self, done: int) -> None:
        """Write the page on the run's health, where its recipe asks for the evaluation."""
        run, wanted = self.run, any(isinstance(each.evaluation, Health) for each in self.evaluations.plan)
        if not wanted or self.objective.encoder is None:
            return
        subject = self.evaluations.subject(done, NUM_IMAGES)
        notes = [*run.model.notes, *doubts(run.recipe, self.registry, run.source, run.device)]
        try:
            judgement = write_report(subject, run.dir, None, training_of(run.recipe, notes))
        except MimError as error:  # a page is not worth a run
            self.log.note(f"no report: {error}")
            return
        if judgement is not None:
            self.log.note(f"health: {judgement.diagnosis}. {judgement.sentence} See {run.dir / 'report.html'}")

    def _saved(self, path: Path) -> None:
        self.listeners.tell("mim_checkpoint_saved", path=path)

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Open the loader and what watches the run: metrics, progress, throughput."""
        run, recipe = self.run, self.run.recipe
        self.loader = Loader(
            recipe.data, run.source, run.model.views, seed=recipe.seed, layout=run.layout, start_step=self.start,
            total_steps=run.total_steps, device=run.device, run_dir=run.dir, companions=run.model.companions,
            counted=counted_before(self.resumed, run.world), finish_step=True,
        )  # fmt: skip
        metrics = run.world.on_main(lambda: MetricsWriter(run.dir, resume_step=self.start, section=recipe.log))
        with Progress(run, start=self.start) as progress:
            state = {} if self.resumed is None else self.resumed.state
            self.log = Log(run, self.optimizers, self.loader, metrics, progress, state)
            try:
                yield
            finally:
                if metrics is not None:
                    metrics.close()
