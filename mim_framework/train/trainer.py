"""The training loop. Read `Trainer.train_step` and then `objective.py`: the two are one whole training step.

Plugins hook in around the step, never inside it. Everything random follows from the sample positions, schedules are
pure functions of the step, and a checkpoint holds the rest; so a resumed run goes on bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_framework.assembly.builder import build_model, build_optimizers, build_source
from mim_framework.assembly.length import batch_layout, run_length
from mim_framework.assembly.preflight import preflight
from mim_framework.base import rng
from mim_framework.base.errors import CheckpointError, DataError, TrainingError
from mim_framework.checkpoints import checkpoint, state
from mim_framework.contract.components import Component
from mim_framework.contract.world import World
from mim_framework.data.companions import CachedTokenViews
from mim_framework.data.loader import Batch, Loader
from mim_framework.evaluate.base import Splits
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import STOP_SIGNALS, process_group
from mim_framework.runtime.metrics import MetricsWriter, Throughput, as_picture
from mim_framework.runtime.sharding import compile_blocks, gradient_sync, shard, whole_weights, wrap
from mim_framework.train.directory import prepare_directory, sole_run
from mim_framework.train.evaluations import Evaluations, planned
from mim_framework.train.pictures import draw_fixed
from mim_framework.train.progress import Progress
from mim_framework.train.run import Run

logger = logging.getLogger(__name__)


def train(recipe: Recipe, registry: Registry, *, fresh: bool = False) -> Path:
    """Train a recipe, or go on with it if its run directory holds a checkpoint; returns the run directory.

    Args:
        fresh: refuse a run directory that already holds a run.

    Raises:
        MimError: for everything that a user can cause and cure.
    """
    with process_group(recipe.train.device) as (world, device), sole_run(recipe, world):
        trainer = Trainer(recipe, registry, world, device, fresh=fresh)
        trainer.fit()
        return trainer.run.dir


def all_finite(measured: dict[str, float]) -> bool:
    """Whether what was measured of a step or phase lets it count."""
    return all(math.isfinite(value) for value in measured.values())


class Trainer:
    """One run on one rank."""

    def __init__(
        self, recipe: Recipe, registry: Registry, world: World, device: torch.device, *, fresh: bool = False
    ) -> None:
        self.hook = registry.hook
        self.failed_listeners: set[str] = set()
        source = build_source(recipe, registry)  # the cheapest to fail comes first
        if len(source) == 0:
            raise DataError(f"data.source '{recipe.data.source.type}' has no images")
        layout = batch_layout(recipe, world.rank, world.size)
        directory = prepare_directory(recipe, registry, world, fresh=fresh)
        model = build_model(recipe, registry).to(device)
        if isinstance(model.views, CachedTokenViews):
            model.views.cache.check_images(len(source))
            world.on_main(model.views.cache.verify)
        preflight(model, device)
        self.run = Run(directory, recipe, world, device, model, source, layout, *run_length(recipe, len(source)))
        self.objective, self.teachers = model.objective, model.teachers
        self.components = list(self.objective.components())
        splits = Splits.of(source)
        self.held_out = splits.sources.get("test", source)
        self.phases = recipe.named_phases()
        self.model = self._distribute()
        self.optimizers = build_optimizers(recipe, self.objective, layout.total_batch_size)
        self.autocast = torch.autocast(device.type, torch.bfloat16, self.run.bfloat16)
        self.evaluations = Evaluations(
            planned(recipe, registry), getattr(self.objective, "encoder", None), model.views, splits,
            device=device, world=world, workers=recipe.data.num_workers, precision=self._outside_a_step,
        )  # fmt: skip
        self.stop_signal, self.stop_agreed = 0, False
        self.window: dict[str, float] = {}  # sums of what was measured since the last line of the log
        self.nonfinite_in_a_row = 0
        self.start = self._resume()

    # --- one step ----------------------------------------------------------------------------------------------------

    def train_step(self, index: int, micro_batches: Iterable[Batch]) -> dict[str, float]:
        """One optimizer step per phase. Returns the means over micro-batches and ranks of what was measured."""
        torch.manual_seed(self._step_seed(index))  # dropout and the like, so that they resume exactly
        accum_steps = self.run.layout.accum_steps
        measured: dict[str, float] = {}
        for phase in self.phases:
            optimizers = [self.optimizers[name] for name in phase.optimizers]
            history, positions = [], []
            for micro, batch in enumerate(micro_batches, start=1):
                step = self.run.step(index, batch, phase.name)
                views = self.run.model.views.prepare(step, batch.views)
                for component in self.components:
                    component.begin_step(step)
                with gradient_sync(self.model, enabled=micro == accum_steps):
                    with self.autocast:
                        losses = self.model(step, views)
                    loss = sum(losses.values())
                    (phase.sign * loss / accum_steps).backward()
                history.append(
                    {"loss": loss.detach(), **{f"loss/{name}": part.detach() for name, part in losses.items()}}
                )
                positions.append(batch.positions)
            for component in self.components:
                component.before_step(step)
            for optimizer in optimizers:
                optimizer.schedule(step)
            grad_norms = {optimizer.name: optimizer.clip() for optimizer in optimizers}
            summary = self._summarise(history, grad_norms)  # the one wait for the device
            if all_finite(summary):
                for optimizer in optimizers:
                    optimizer.step()
                for component in self.components:
                    component.after_step(step)
            else:
                self._record_nonfinite(index, phase.name, positions, history)
            self.objective.zero_grad(set_to_none=True)
            measured |= summary if len(self.phases) == 1 else {f"{phase.name}/{key}": v for key, v in summary.items()}
        if all_finite(measured):
            self.teachers.update(step, self.objective)  # once per step, however many phases it has
        return measured

    def fit(self) -> None:
        """All steps that are left, with logging, evaluation and checkpoints after each."""
        run, error = self.run, None
        self._announce("mim_run_started")
        try:
            with self._stop_on_signal(), self._observed(), closing(iter(self.loader)) as batches:
                for doubt in run.recipe.doubts(run.epochs):
                    self.progress.note(doubt)
                for index in range(self.start, run.total_steps):
                    micro_batches: Iterable[Batch] = islice(
                        batches, run.layout.accum_steps
                    )  # read while the device works
                    if index == 0 and any(type(each).calibrate is not Component.calibrate for each in self.components):
                        micro_batches = list(micro_batches)
                        self._calibrate(micro_batches)
                    if len(self.phases) > 1:
                        micro_batches = list(micro_batches)
                    self._after_step(index + 1, self.train_step(index, micro_batches))
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._announce("mim_run_finished", error=error)

    @torch.no_grad()
    def _calibrate(self, micro_batches: list[Batch]) -> None:
        """Let components begin from the data of the first step."""
        steps = [self.run.step(0, batch, self.phases[0].name) for batch in micro_batches]
        batches = [
            (step, self.run.model.views.prepare(step, batch.views))
            for step, batch in zip(steps, micro_batches, strict=True)
        ]
        with self.autocast, whole_weights(self.objective):
            for component in self.components:
                component.calibrate(batches)

    def _summarise(self, history: list[dict[str, Tensor]], grad_norms: dict[str, Tensor]) -> dict[str, float]:
        """Means over micro-batches and ranks, gradient norms, and whether any rank was told to stop; one reduction."""
        values = {name: torch.stack([entry[name].float() for entry in history]).mean() for name in history[0]}
        for name, norm in grad_norms.items():
            values["grad_norm" if len(grad_norms) == 1 else f"grad_norm/{name}"] = norm.float()
        told = torch.tensor(float(self.stop_signal > 0), device=self.run.device)
        *means, stop = self.run.world.mean(torch.stack([*values.values(), told])).tolist()
        self.stop_agreed = self.stop_agreed or stop > 0
        return dict(zip(values, means, strict=True))

    def _record_nonfinite(
        self, index: int, phase: str, positions_read: list[Tensor], history: list[dict[str, Tensor]]
    ) -> None:
        """A line of nonfinite.jsonl: the samples of the micro-batches, on any rank, whose loss was not finite."""
        world = self.run.world
        losses = world.gather(torch.stack([entry["loss"].float() for entry in history]))
        positions = world.gather(torch.stack(positions_read))
        bad = ~losses.isfinite()
        cause = "loss" if bool(bad.any()) else "gradient"
        if world.is_main:
            samples = positions[bad] if cause == "loss" else positions
            line = {"step": index, "phase": phase, "cause": cause, "positions": samples.flatten().tolist()}
            with (self.run.dir / "nonfinite.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.progress.note(f"step {index}: the {cause} is not finite, no update (see nonfinite.jsonl)")

    def _step_seed(self, index: int) -> int:
        """Seed of the global generators for a step, another on every rank."""
        position = torch.tensor([index * self.run.world.size + self.run.world.rank])
        return int(rng.random_bits(self.run.recipe.seed, "global generator", position, 1)) & (2**63 - 1)

    # --- after a step; `done` counts the finished ones -------------------------------------------------------------

    def _after_step(self, done: int, measured: dict[str, float]) -> None:
        run, recipe = self.run, self.run.recipe
        last = done == run.total_steps
        self._count(done, measured)
        self.throughput.step(run.layout.total_batch_size, self.loader.wait_seconds)
        self.progress.update(done, measured, lr=self._rates(), throughput=self.throughput)
        if done % recipe.log.every_steps == 0 or last:
            self._log(done)
        if last or self.stop_agreed or self._checkpoint_due(done):
            self._save(done)
        if self.stop_agreed and not last:
            self.progress.note(f"stopped by signal after step {done}; the same command goes on from here")
            raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))
        self.evaluations.run_due(
            done, lambda every: last or run.due(done, every), log=self._log_evaluation, note=self.progress.note
        )
        if last or run.due(done, recipe.log.images_every_epochs):
            self._draw(done)

    def _count(self, done: int, measured: dict[str, float]) -> None:
        if all_finite(measured):
            self.nonfinite_in_a_row = 0
            for name, value in {**measured, "steps": 1.0}.items():
                self.window[name] = self.window.get(name, 0.0) + value
            return
        self.nonfinite_in_a_row += 1
        self.window["skipped_steps"] = self.window.get("skipped_steps", 0.0) + 1.0
        if self.nonfinite_in_a_row > self.run.recipe.train.max_nonfinite_steps:
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.nonfinite_in_a_row} steps in a row, up to step "
                f"{done}; the samples are in {self.run.dir / 'nonfinite.jsonl'}. Lower the learning rate, set "
                "optim.clip_grad_norm or use train.precision=float32. The last checkpoint is from before"
            )

    def _log(self, done: int) -> None:
        run = self.run
        steps, skipped = self.window.pop("steps", 0.0), self.window.pop("skipped_steps", 0.0)
        line = {
            "epoch": run.epoch(done),
            **{name: total / steps for name, total in self.window.items()},
            **self._rates(),
        }
        self.window = {}
        if skipped:
            line["skipped_steps"] = skipped
        for path, module in self.objective.named_modules():
            if isinstance(module, Component):  # by place, as two heads may hold components of one name
                line |= {f"{path or module.name}/{name}": value.item() for name, value in module.metrics().items()}
        line |= {f"broken/{cause}": float(count) for cause, count in self.loader.broken_counts.items()}
        line |= self.throughput.take()
        if run.world.is_main:
            self.metrics.write(done, line)
            self._announce("mim_metrics_logged", step=done, metrics=line)

    @contextmanager
    def _outside_a_step(self) -> Iterator[None]:
        """Forward passes of parts of the model, in the precision of the run."""
        with self.autocast, whole_weights(self.objective):
            yield

    def _log_evaluation(self, done: int, numbers: dict[str, float]) -> None:
        if self.run.world.is_main:
            self.metrics.write(done, numbers)

    def _draw(self, done: int) -> None:
        with self._outside_a_step():
            picture = draw_fixed(self.objective, self.run, self.held_out)
        if not self.run.world.is_main:
            return
        if picture is not None:
            self.metrics.image("reconstructions", picture, done)
        for path, module in self.objective.named_modules():
            for name, pixels in module.pictures().items() if isinstance(module, Component) else ():
                self.metrics.image(f"{path or module.name}.{name}", as_picture(pixels), done)

    def _save(self, done: int) -> None:
        run, recipe = self.run, self.run.recipe
        groups = state.gather(self.objective, self.teachers.moving(), self.optimizers, run.world)
        numbers = {
            "num_images": len(run.source),
            "window": self.window,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "optimizer_scalars": state.scalars(self.optimizers),
        }

        def write() -> Path:
            path = checkpoint.save_checkpoint(run.dir / "checkpoints", done, groups, numbers)
            checkpoint.prune(run.dir / "checkpoints", recipe.checkpoint, run.steps_per_epoch)
            return path

        path = run.world.on_main(write)
        if path is not None:
            self._announce("mim_checkpoint_saved", path=path)

    def _announce(self, event: str, **details: Any) -> None:
        """Tell the plugins that listen to a run event. One that raises is named once, and cannot end the run."""
        details["run"] = self.run
        for listener in reversed(getattr(self.hook, event).get_hookimpls()):  # the last registered first, as in pluggy
            try:
                listener.function(*[details[name] for name in listener.argnames])
            except Exception as error:
                if listener.plugin_name not in self.failed_listeners:
                    self.failed_listeners.add(listener.plugin_name)
                    logger.warning(
                        f"plugin '{listener.plugin_name}' failed in {event}: {type(error).__name__}: {error}. "
                        "The run goes on; further errors of this plugin are not shown"
                    )

    def _checkpoint_due(self, done: int) -> bool:
        section = self.run.recipe.checkpoint
        every_steps = bool(section.every_steps) and done % section.every_steps == 0
        return every_steps or self.run.due(done, section.every_epochs)

    def _rates(self) -> dict[str, float]:
        """The learning rates of the last step."""
        return {"lr" if len(self.optimizers) == 1 else f"lr/{name}": o.lr for name, o in self.optimizers.items()}

    # --- set-up ------------------------------------------------------------------------------------------------------

    def _distribute(self) -> torch.nn.Module:
        """Compile the blocks, shard or replicate the objective, and shard copied teachers like their source."""
        run, section = self.run, self.run.recipe.train
        blocks = [block for component in self.components for block in component.repeated_blocks()]
        if section.compile:
            compile_blocks([*blocks, *self.teachers.repeated_blocks()])
        if section.distributed == "fsdp" and run.world.size > 1:
            for teacher in self.teachers.moving().values():
                for unit, unit_blocks in teacher.units():
                    shard(unit, unit_blocks, run.device, reshard_after_forward=True)
        return wrap(self.objective, blocks, section.distributed, run.world, run.device, phases=len(self.phases))

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the step to go on with."""
        run, folder = self.run, self.run.dir / "checkpoints"
        found = run.world.on_main(lambda: self._same_images(checkpoint.find_latest(folder)))
        name = run.world.share(None if found is None else found.path.name)
        if name is None:
            return 0
        if found is None:  # rank 0 has verified it
            found = self._same_images(self._opened(folder / name))
        state.restore(found, self.objective, self.teachers.moving(), self.optimizers)
        state.restore_scalars(self.optimizers, found.state["optimizer_scalars"])
        self.window = found.state["window"]
        self.nonfinite_in_a_row = found.state["nonfinite_in_a_row"]
        return found.step

    @staticmethod
    def _opened(path: Path) -> checkpoint.Checkpoint:
        if not path.is_dir():
            raise CheckpointError(
                f"rank 0 resumes from {path}, which this machine does not have; "
                "output_dir must be a folder that all machines of the run share"
            )
        return checkpoint.load(path, verify=False)

    def _same_images(self, found: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint | None:
        """The checkpoint, if the source has as many images as when it was written."""
        now = len(self.run.source)
        if found is not None and found.state["num_images"] != now:
            raise DataError(
                f"data.source has changed since {found.path}: {found.state['num_images']} images -> {now}. The number "
                "decides the order of the samples, so the run would silently go on with others. Bring the images back, "
                f"or start a run of its own from these weights: name=... init={found.path}"
            )
        return found

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Open the loader and what watches the run: metrics, progress, throughput."""
        run, recipe = self.run, self.run.recipe
        views, seed = run.model.views, recipe.seed
        self.loader = Loader(
            recipe.data, run.source, views, seed=seed, layout=run.layout, start_step=self.start,
            total_steps=run.total_steps, device=run.device, run_dir=run.dir,
        )  # fmt: skip
        self.throughput = Throughput(run.device)
        self.metrics = run.world.on_main(lambda: MetricsWriter(run.dir, resume_step=self.start, section=recipe.log))
        with Progress(run, start=self.start) as self.progress:
            try:
                yield
            finally:
                if self.metrics is not None:
                    self.metrics.close()

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1, Ctrl-C: finish the step, save, leave with 128 + signal. A second Ctrl-C leaves at once."""

        def note(number: int, frame: Any) -> None:
            if self.stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            # Ranks that stop leave together, and the launcher may pass its signal on once more meanwhile.
            if not (self.stop_signal and self.run.world.size > 1):
                for number, handler in previous.items():
                    signal.signal(number, handler)
