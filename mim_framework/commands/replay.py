"""`mim replay`: a step of a run once more, to see where its loss stops being finite. Start at `replay`.

Everything random follows from the positions, so the steps between a kept checkpoint and the one that is asked for come
out as they did. The run directory is read and never written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mim_framework.assembly.opened import recipe_of_run
from mim_framework.base.errors import MimError
from mim_framework.checkpoints.checkpoint import Checkpoint, list_checkpoints, load, newest_before, step_of
from mim_framework.contract.records import Outcome
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.data.loader import Batch, Loader
from mim_framework.evaluate.pictures import flat
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import as_picture
from mim_framework.training.setup import set_up
from mim_framework.training.trainer import Trainer

SAMPLES_SHOWN = 8


@dataclass(frozen=True)
class Bad:
    """A tensor that is not finite: where it was seen first, and in which micro-batch of which phase."""

    what: str
    tensor: Tensor
    step: Step

    def __str__(self) -> str:
        """Shape, type, how much is not finite, and the range of the rest."""
        values = self.tensor.detach().float()
        finite = values[values.isfinite()]
        between = f"the others from {finite.min():.4g} to {finite.max():.4g}" if len(finite) else "no other values"
        counts = f"{int(values.isnan().sum())} NaN, {int(values.isinf().sum())} Inf of {values.numel()}"
        kind = str(self.tensor.dtype).removeprefix("torch.")
        return f"{self.what}: {tuple(self.tensor.shape)} {kind}, {counts}, {between}"

    def positions(self) -> list[int]:
        """Those of the samples that it touches, or of all if its first axis does not count samples."""
        positions, size = self.step.positions, len(self.step.positions)
        if self.tensor.ndim and self.tensor.shape[0] % size == 0:
            by_sample = self.tensor.detach().isfinite().unflatten(0, (-1, size)).movedim(1, 0).flatten(1)
            positions = positions[~by_sample.all(1)]
        return positions.tolist()


class Watch:
    """The first module of a model whose output is not finite in a step, and the first gradient that is not."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.losses: list[str] = []
        self.output: Bad | None = None
        self.gradient: Bad | None = None
        self.inputs_were_finite = True
        self.step: Step | None = None

    @contextmanager
    def over_a_step(self) -> Iterator[None]:
        """Look at every module inside, innermost first, as each one is done before those around it."""
        named, engine = list(self.trainer.objective.named_modules())[1:], self.trainer.engine
        hooks = [module.register_forward_hook(partial(self._see_output, name)) for name, module in named]
        hooks += [
            parameter.register_post_accumulate_grad_hook(partial(self._see_weight, name))
            for name, parameter in self.trainer.objective.named_parameters()
            if parameter.requires_grad
        ]
        forward, engine.forward = engine.forward, partial(self._forward, engine.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            engine.forward = forward  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()

    def _forward(self, forward: Callable[..., Outcome], step: Step, batch: dict[str, Tensor]) -> Outcome:
        self.step = step
        outcome = forward(step, batch)
        first, last = int(step.positions[0]), int(step.positions[-1])
        found = ", ".join(f"{name} {loss.item():.6g}" for name, loss in outcome.losses.items())
        self.losses.append(f"phase {step.phase}, positions {first} to {last}: {found}")
        return outcome

    def _see_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        where = f"{name} ({type(module).__name__})"
        for tensor in tensors_of(output):
            if self.output is None and not all_finite(tensor):
                self.output = Bad(f"output of {where}", tensor, self.step)
                self.inputs_were_finite = all(map(all_finite, tensors_of(inputs)))
            if tensor.requires_grad:
                tensor.register_hook(partial(self._see_gradient, f"the output of {where}"))

    def _see_weight(self, name: str, parameter: nn.Parameter) -> None:
        self._see_gradient(f"the weight {name}", parameter.grad)

    def _see_gradient(self, of: str, gradient: Tensor) -> None:
        if self.gradient is None and not all_finite(gradient):
            self.gradient = Bad(f"gradient of {of}", gradient, self.step)


def all_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in nested records, tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_of(getattr(value, name))


class Quiet:
    """In the place of the log of a run that is only looked at."""

    def note(self, text: str) -> None:
        """Nothing."""

    def skipped(self, *details: Any) -> None:
        """Nothing: the run has written it down."""


def replay(
    run_dir: Path,
    step: int | None = None,
    *,
    from_start: bool = False,
    images: Path | None = None,
    registry: Registry | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> str:
    """Repeat the steps up to `step`, feed it once more and say, in a page, where something is not finite first.

    Args:
        step: counted from 0; by default the newest one of `nonfinite.jsonl`.
        from_start: repeat all steps, where no checkpoint at or before it is kept.
        images: folder to write the images of the step to, as PNG files.
        report: told how far it is.

    Raises:
        MimError: if the run has no such step, or it cannot be reached; it says which can.
    """
    registry = registry or Registry()
    recipe, device = recipe_of_run(run_dir, registry)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    wanted = last_nonfinite(run_dir) if step is None else step
    run = set_up(recipe, registry, World(), device, lambda: run_dir)
    if not 0 <= wanted < run.total_steps:
        raise MimError(f"{run_dir} has the steps 0 to {run.total_steps - 1}; {wanted} is none of them")
    found = start_for(run_dir, wanted, from_start=from_start)
    trainer = Trainer(run, registry)
    trainer.log = Quiet()  # type: ignore[assignment]
    trainer.go_on_from(found)
    begin = min(trainer.start, wanted)  # a state kept after a skipped step is that before it
    trainer.loader = Loader(
        recipe.data, run.source, run.model.views, seed=recipe.seed, layout=run.layout, start_step=begin,
        total_steps=wanted + 1, device=device, companions=run.model.companions,
    )  # fmt: skip
    with closing(iter(trainer.loader)) as batches:
        for index in range(begin, wanted):
            trainer.whole_step(index, batches)
            report(f"repeated step {index} of {wanted}")
        micro_batches = list(islice(batches, run.layout.accum_steps))
    trainer.calibrate(wanted, micro_batches)
    lines = [f"run {run_dir}, step {wanted}, from {'the beginning' if found is None else found.path.name}"]
    lines += look_at(trainer, wanted, micro_batches)
    for batch in micro_batches if images is not None else ():
        save_images(trainer, batch, images)
    hint = "--images FOLDER saves the images of the step" if images is None else f"images: {images}"
    return "\n".join([*lines, hint])


def look_at(trainer: Trainer, index: int, micro_batches: list[Batch]) -> list[str]:
    """What a step gives: its losses, the first tensor that is not finite, and the samples that it touches."""
    spoilt = [name for name, p in trainer.objective.named_parameters() if not all_finite(p)]
    watch = Watch(trainer)
    with watch.over_a_step():
        trainer.train_step(index, micro_batches)
    lines = list(watch.losses)
    if spoilt:
        lines.append(f"weights that are not finite before the step: {', '.join(spoilt[:3])}")
    bad = watch.output or watch.gradient
    if bad is None:
        return [*lines, "every output, gradient and loss of this step is finite"]
    if watch.output is not None:
        inputs = "were finite" if watch.inputs_were_finite else "were not finite either"
        lines.append(f"first not finite: {watch.output}; its inputs {inputs}")
    else:
        lines.append(f"all outputs are finite; going backward, first not finite: {watch.gradient}")
    return [*lines, sample_names(trainer, bad.positions())]


def sample_names(trainer: Trainer, positions: list[int]) -> str:
    """The samples at some positions, by name."""
    run = trainer.run
    indices = trainer.loader.order.indices(positions[:SAMPLES_SHOWN])
    names = [f"{name_of(run.source, index)} (position {p})" for p, index in zip(positions, indices, strict=False)]
    more = f" and {len(positions) - SAMPLES_SHOWN} more" if len(positions) > SAMPLES_SHOWN else ""
    return f"samples: {', '.join(names)}{more}"


def name_of(source: Any, index: int) -> str:
    """The name of a sample, or its number where it cannot be read."""
    try:
        return source.read(index).name
    except MimError as error:
        return f"sample {index} ({error})"


def save_images(trainer: Trainer, batch: Batch, folder: Path) -> None:
    """The view "x" of a micro-batch as PNG files, named by position; of clips some frames, side by side.

    Raises:
        MimError: if it holds no images, or they cannot be written.
    """
    view = trainer.engine.prepare(trainer.run.step(0, batch, trainer.phases[0].name), batch.views).get("x")
    if view is None or trainer.run.model.specs.view("x").kind != "image":
        raise MimError("--images: the views of this recipe hold no images")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for position, pixels in zip(batch.positions.tolist(), trainer.run.model.views.to_image(view), strict=True):
            as_picture(flat(pixels).cpu()).save(folder / f"position_{position:08d}.png")
    except OSError as error:
        raise MimError(f"cannot write to {folder}: {error.strerror}") from error


def last_nonfinite(run_dir: Path) -> int:
    """The step in the last line of `nonfinite.jsonl`.

    Raises:
        MimError: if the run has had no such step.
    """
    file = run_dir / "nonfinite.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    if not lines:
        raise MimError(f"{run_dir} has had no step whose loss or gradient was not finite; choose one with --step N")
    return int(json.loads(lines[-1])["step"])


def start_for(run_dir: Path, step: int, *, from_start: bool) -> Checkpoint | None:
    """The newest whole checkpoint from which `step` can be reached; None for the beginning.

    That of the step after it serves too, if the step was skipped: a skipped step changes no weights.

    Raises:
        MimError: naming the steps that can be replayed, if there is none.
    """
    kept = {step_of(path): path for path in list_checkpoints(run_dir / "checkpoints")}
    after = kept.get(step + 1)
    if step not in kept and after is not None and (found := load(after)).state.get("nonfinite_in_a_row"):
        return found
    if (before := newest_before(run_dir / "checkpoints", step + 1)) is not None:
        return load(before)
    if step == 0 or from_start:
        return None
    reach = f"{min(kept)} and later ones" if kept else "none"
    raise MimError(
        f"{run_dir} keeps no checkpoint at or before step {step}; steps that can be replayed: {reach}. --from-start "
        f"repeats all {step} steps before it"
    )
