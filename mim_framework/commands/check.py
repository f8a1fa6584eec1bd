"""`mim check`: everything that can be said of a recipe before any time is spent on it."""

from __future__ import annotations

from mim_framework.assembly.builder import build_source
from mim_framework.assembly.cost import compare_weights, measure_cost
from mim_framework.assembly.doubts import doubts
from mim_framework.assembly.length import batch_layout, run_length
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.assembly.weights import Filled
from mim_framework.base.precision import uses_bfloat16
from mim_framework.evaluate.splits import Splits
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import choose_device
from mim_framework.training.directory import run_directory


def report(recipe: Recipe, registry: Registry, *, world_size: int = 1) -> str:
    """A page on the model, its cost, the batch and the length of the run.

    Raises:
        MimError: for everything in the recipe that would stop a run.
    """
    cost = measure_cost(recipe, registry)
    layout = batch_layout(recipe, 0, world_size)
    source = build_source(recipe, registry)
    steps_per_epoch, total_steps = run_length(recipe, len(source))
    splits = evaluation_splits(recipe, registry, source)
    device = choose_device(recipe.train.device)
    filled = compare_weights(recipe, registry, source=source).init_fills
    precision = "bfloat16 autocast" if uses_bfloat16(recipe.train.precision, device) else "float32"
    parameters = ", ".join(f"{name} {_millions(count)}" for name, count in cost.parameters.items())
    lines = {
        "recipe": recipe.name,
        "parameters": f"{parameters}; trainable {_millions(cost.trainable)}",
        "tokens per image": f"{cost.tokens} of {cost.positions} reach the encoder",
        "FLOPs per image": f"forward {_giga(cost.forward_flops)}, training step {_giga(cost.train_flops)}",
        "weights and optimizer": f"{cost.state_bytes / 2**30:.2f} GiB in float32, activations not counted",
        "batch": f"{layout.total_batch_size} images a step = {layout.batch_size} x {world_size} ranks x "
        f"{layout.accum_steps} accumulation steps",
        "data": f"{len(source):,} images ({recipe.data.source.type})",
        **({} if filled is None else {"init": _what_fits(recipe.init, filled)}),
        **({"left out": ", ".join(out)} if (out := source.left_out()) else {}),
        "evaluation": _evaluation(recipe, splits),
        "length": f"{total_steps:,} steps, {steps_per_epoch:,} an epoch",
        "device": f"{device.type}, {precision}",
        "output": str(run_directory(recipe)),
    }
    for name, section in recipe.named_optimizers().items():
        label = "optimizer" if len(recipe.named_optimizers()) == 1 else f"optimizer {name}"
        lines[label] = f"{section.type}, peak learning rate {section.peak_lr(layout.total_batch_size):.3g}"
    if found := doubts(recipe, registry, source, device, cost=cost):
        lines["warning"] = "; ".join(found)
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def _evaluation(recipe: Recipe, splits: Splits) -> str:
    names = ", ".join(choice.type for choice in recipe.evaluate) or "none"
    purposes = {"train": "to learn from", "test": "to be tested on"}
    images = (f"{len(each):,} images {purposes[split]} ({each.name})" for split, each in splits.sources.items())
    return f"{names}; {', '.join(images)}"


def _what_fits(path: str | None, filled: Filled) -> str:
    rest = "" if filled.complete else "; what it lacks starts at random"
    return f"{path} fills {', '.join(f'{name} {part}' for name, part in filled.parts.items())}{rest}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.2f} G"
