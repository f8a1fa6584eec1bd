"""`mim bench`: how fast a recipe trains on this machine, where the time goes, and what share of the device it uses."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from mim_framework.build import build_model, build_source, make_step
from mim_framework.cost import matmul_peak, measure_cost, synchronize
from mim_framework.data.loader import Batch, Loader
from mim_framework.distributed import choose_device
from mim_framework.optim import Optimizer, assign
from mim_framework.plugins import Registry
from mim_framework.recipe import Recipe
from mim_framework.run import batch_layout, uses_bfloat16

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


def run_bench(recipe: Recipe, registry: Registry, *, data: Data = "synthetic", steps: int = 10, warmup: int = 3) -> str:
    """Time training steps on one rank with the recipe's micro-batch, and return the table as text.

    Args:
        data: `synthetic` repeats one made-up batch, `real` reads the recipe's source, `loader-only` only reads.
        steps: steps timed after `warmup` others; the table gives medians.
    """
    device = choose_device(recipe.train.device)
    layout = batch_layout(recipe, 0, 1)
    watch = Stopwatch(device)
    model = build_model(recipe, registry, with_weights=False).to(device)
    batches = _synthetic(model.views.example(layout.batch_size), device) if data == "synthetic" else _read(
        recipe, registry, model.views, layout, device, warmup + steps
    )  # fmt: skip
    if data == "loader-only":
        for _ in range(warmup + steps):
            with watch.stage("data"):
                next(batches)
        return f"loader only  {layout.batch_size / watch.median('data', warmup):,.1f} images/s, micro-batch {layout.batch_size}"

    precision = torch.bfloat16 if uses_bfloat16(recipe.train.precision, device) else torch.float32
    sections = recipe.named_optimizers()
    chosen = assign(sections, list(model.objective.named_parameters()))
    optimizers = [Optimizer(name, section, chosen[name], [], layout.total_batch_size) for name, section in sections.items()]
    if recipe.train.compile:
        for component in model.objective.components():
            for block in component.repeated_blocks():
                block.compile()
    phase = recipe.phase_names()[0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup + steps):
        with watch.stage("data"):
            batch = next(batches)
        with watch.stage("forward"), torch.autocast(device.type, torch.bfloat16, precision == torch.bfloat16):
            step = make_step(recipe, batch.positions, phase=phase, teachers=model.teachers.session())
            losses = model.objective(step, model.views.prepare(step, batch.views))
        with watch.stage("backward"):
            sum(losses.values()).backward()
        with watch.stage("optimizer"):
            for optimizer in optimizers:
                optimizer.schedule(step)
                optimizer.clip()
                optimizer.step()
            model.objective.zero_grad(set_to_none=True)

    cost, peak = measure_cost(recipe, registry), matmul_peak(device, precision)
    medians = {name: watch.median(name, warmup) for name in ("data", "forward", "backward", "optimizer")}
    total = sum(medians.values())
    rate = layout.batch_size / total
    split = ", ".join(f"{name} {1000 * seconds:.1f} ms ({seconds / total:.0%})" for name, seconds in medians.items())
    name = str(precision).removeprefix("torch.")
    return "\n".join(
        [
            f"{recipe.name}: {rate:,.1f} images/s, micro-batch {layout.batch_size}, {device.type}, {name}, data {data}",
            f"one step    {1000 * total:.1f} ms: {split}",
            f"FLOPs       {cost.train_flops / 1e9:.2f} G an image, {rate * cost.train_flops / 1e12:.3f} T a second",
            f"matmul peak {peak / 1e12:.3f} T a second measured, of which {rate * cost.train_flops / peak:.0%} used",
            f"peak memory {_peak_memory(device) / 2**30:.2f} GiB",
        ]
    )


def _synthetic(views: dict[str, torch.Tensor], device: torch.device) -> Iterator[Batch]:
    size = len(next(iter(views.values())))
    batch = Batch({name: view.to(device) for name, view in views.items()}, torch.arange(size, device=device), 0, 0, [])
    while True:
        yield batch


def _read(recipe, registry, views, layout, device, count: int) -> Iterator[Batch]:
    loader = Loader(
        recipe.data, build_source(recipe, registry), views, seed=recipe.seed, layout=layout, start_step=0,
        total_steps=count, device=device,
    )  # fmt: skip
    yield from loader


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device where that is counted, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
