"""`mim bench`: how fast a recipe trains on this machine, where the time goes, and what share of the device it uses."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from mim_framework.assembly.builder import build_model, build_optimizers, build_source
from mim_framework.assembly.cost import matmul_peak, measure_cost, synchronize
from mim_framework.assembly.length import batch_layout
from mim_framework.assembly.preflight import preflight
from mim_framework.base.precision import uses_bfloat16
from mim_framework.data.loader import Batch, Loader
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import choose_device
from mim_framework.runtime.metrics import peak_memory
from mim_framework.runtime.sharding import compile_blocks

Data = Literal["synthetic", "real", "loader-only"]


class Stopwatch:
    """Seconds by stage, one entry per step; waits for the device at the end of each stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name].append(time.perf_counter() - start)

    def median(self, name: str, warmup: int) -> float:
        return statistics.median(self.seconds[name][warmup:]) if self.seconds[name] else 0.0


@dataclass(frozen=True)
class Measured:
    """One training step on one rank, as it was measured; the text is `mim bench`'s table."""

    recipe: str
    batch_size: int
    """Images in the micro-batch."""
    device: str
    precision: str
    data: Data
    stages: dict[str, float]
    """Median seconds of a step by stage: data, forward, backward and optimizer, over all phases."""
    first: float
    """Seconds of the very first step, with compilation where the recipe asks for it."""
    fastest: float
    """Seconds of the fastest step that was timed."""
    slowest: float
    flops_per_image: float
    peak_flops: float
    """Operations a second of the device's best large matrix product in this precision, measured."""
    peak_memory: int | None
    """Bytes; None where it is not known."""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(self.stages.values())

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds

    @property
    def share_of_peak(self) -> float:
        """Operations a second beside those of the measured peak."""
        return self.images_per_second * self.flops_per_image / self.peak_flops

    def __str__(self) -> str:
        rate, flops, peak, memory = self.images_per_second, self.flops_per_image, self.peak_flops, self.peak_memory
        split = ", ".join(
            f"{name} {1000 * seconds:.1f} ms ({seconds / self.seconds:.0%})" for name, seconds in self.stages.items()
        )
        where = f"micro-batch {self.batch_size}, {self.device}, {self.precision}, data {self.data}"
        return "\n".join(
            [
                f"{self.recipe}: {rate:,.1f} images/s, {where}",
                f"one step    {1000 * self.seconds:.1f} ms: {split}",
                f"FLOPs       {flops / 1e9:.2f} G an image, {rate * flops / 1e12:.3f} T a second",
                f"matmul peak {peak / 1e12:.3f} T a second measured, of which {self.share_of_peak:.0%} used",
                f"peak memory {'not known here' if memory is None else f'{memory / 2**30:.2f} GiB'}",
            ]
        )


def run_bench(recipe: Recipe, registry: Registry, *, data: Data = "synthetic", steps: int = 10, warmup: int = 3) -> str:
    """Time training steps on one rank with the recipe's micro-batch, and return the table as text.

    Args:
        data: `synthetic` repeats one made-up batch, `real` reads the recipe's source, `loader-only` only reads.
        steps: steps timed after `warmup` others; the table gives medians.

    Raises:
        MimError: for everything in the recipe that would stop a run.
    """
    if data == "loader-only":
        return _time_loader(recipe, registry, steps, warmup)
    return str(measure_step(recipe, registry, data=data, steps=steps, warmup=warmup))


def measure_step(
    recipe: Recipe, registry: Registry, *, data: Data = "synthetic", steps: int = 10, warmup: int = 3
) -> Measured:
    """Time training steps on one rank with the recipe's micro-batch; arguments and errors are those of `run_bench`.

    A step is that of `Trainer.train_step`: the same `StepEngine.forward`, backward, then every optimizer's `schedule`,
    `clip` and `step`, once per phase. Left out are accumulation, the reduction over ranks, logging and the movement of
    teachers.
    """
    device = choose_device(recipe.train.device)
    layout = batch_layout(recipe, 0, 1)
    watch, whole = Stopwatch(device), []
    model = build_model(recipe, registry, with_weights=False).to(device)
    if data == "synthetic":
        batches = _synthetic(model.example(layout.batch_size), device)
    else:
        batches = _read(recipe, registry, model, layout, device, warmup + steps)
    bfloat16 = uses_bfloat16(recipe.train.precision, device)
    preflight(model, device, bfloat16=bfloat16)
    engine = model.engine(device, bfloat16=bfloat16)
    optimizers = build_optimizers(recipe, model.objective, layout.total_batch_size)
    if recipe.train.compile:
        compile_blocks(block for component in engine.components for block in component.repeated_blocks())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for index in range(warmup + steps):
        start = time.perf_counter()
        with watch.stage("data"):
            batch = next(batches)
        for phase in recipe.named_phases():
            with watch.stage("forward"):
                step = engine.step(seed=recipe.seed, positions=batch.positions, index=index, phase=phase.name)
                loss = sum(engine.forward(step, batch.views).losses.values())
            with watch.stage("backward"):
                (phase.sign * loss).backward()
            with watch.stage("optimizer"):
                engine.before_step(step)
                for optimizer in [optimizers[name] for name in phase.optimizers]:
                    optimizer.schedule(step)
                    optimizer.clip()
                    optimizer.step()
                engine.after_step(step)
                model.objective.zero_grad(set_to_none=True)
        whole.append(time.perf_counter() - start)

    memory = peak_memory(device)
    precision = torch.bfloat16 if bfloat16 else torch.float32
    num_phases = len(recipe.named_phases())
    stages = {"data": watch.median("data", warmup)}
    for name in ("forward", "backward", "optimizer"):
        stages[name] = num_phases * watch.median(name, warmup * num_phases)
    return Measured(
        recipe=recipe.name,
        batch_size=layout.batch_size,
        device=device.type,
        precision=str(precision).removeprefix("torch."),
        data=data,
        stages=stages,
        first=whole[0],
        fastest=min(whole[warmup:]),
        slowest=max(whole[warmup:]),
        flops_per_image=num_phases * measure_cost(recipe, registry).train_flops,
        peak_flops=matmul_peak(device, precision),
        peak_memory=memory,
    )


def _time_loader(recipe: Recipe, registry: Registry, steps: int, warmup: int) -> str:
    device = choose_device(recipe.train.device)
    layout = batch_layout(recipe, 0, 1)
    watch = Stopwatch(device)
    model = build_model(recipe, registry, with_weights=False)
    batches = _read(recipe, registry, model, layout, device, warmup + steps)
    for _ in range(warmup + steps):
        with watch.stage("data"):
            next(batches)
    rate = layout.batch_size / watch.median("data", warmup)
    return f"loader only  {rate:,.1f} images/s, micro-batch {layout.batch_size}"


def _synthetic(views: dict[str, torch.Tensor], device: torch.device) -> Iterator[Batch]:
    size = len(next(iter(views.values())))
    batch = Batch({name: view.to(device) for name, view in views.items()}, torch.arange(size, device=device), 0, 0, [])
    while True:
        yield batch


def _read(recipe, registry, model, layout, device, count: int) -> Iterator[Batch]:
    loader = Loader(
        recipe.data, build_source(recipe, registry), model.views, seed=recipe.seed, layout=layout, start_step=0,
        total_steps=count, device=device, companions=model.companions,
    )  # fmt: skip
    yield from loader
