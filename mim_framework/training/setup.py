"""Everything that stands before the first step of a run. Start at `set_up`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from mim_framework.assembly.builder import build_model, build_source
from mim_framework.assembly.cost import refuse_too_large_recipe
from mim_framework.assembly.length import batch_layout, run_length
from mim_framework.assembly.preflight import preflight
from mim_framework.base.errors import DataError
from mim_framework.base.files import SideFile
from mim_framework.base.precision import uses_bfloat16
from mim_framework.contract.world import World
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.sharding import compile_blocks, shard, wrap
from mim_framework.training.run import Run


def set_up(
    recipe: Recipe, registry: Registry, world: World, device: torch.device, directory: Callable[[], Path]
) -> Run:
    """Source, run directory, model and preflight, the cheapest to fail first; then the model on all ranks.

    Args:
        directory: makes or checks the run directory, once the source is known to be good.

    Raises:
        MimError: for everything that a user can cause and cure.
    """
    source = build_source(recipe, registry)
    if len(source) == 0:
        raise DataError(f"data.source '{recipe.data.source.type}' has no images")
    layout = batch_layout(recipe, world.rank, world.size)
    run_dir = directory()
    refuse_too_large_recipe(recipe, registry, source)
    model = build_model(recipe, registry, source=source).to(device)
    for companion in model.companions:
        if changes := companion.check(source, world):
            line = {"tokens": recipe.data.tokens, "changes": changes, "now": source.identity()}
            SideFile(run_dir / "source_changes.jsonl").append([json.dumps(line)])
    bfloat16 = uses_bfloat16(recipe.train.precision, device)
    preflight(model, device, bfloat16=bfloat16)
    engine = model.engine(device, bfloat16=bfloat16)
    run = Run(run_dir, recipe, world, device, model, source, layout, *run_length(recipe, len(source)), engine)
    distribute(run)
    return run


def distribute(run: Run) -> None:
    """Compile the blocks, shard or replicate the objective, and shard copied teachers like their source."""
    section, model = run.recipe.train, run.model
    blocks = [block for component in run.engine.components for block in component.repeated_blocks()]
    if section.compile:
        compile_blocks([*blocks, *model.teachers.repeated_blocks()])
    if section.distributed == "fsdp" and run.world.size > 1:
        for teacher in model.teachers.moving().values():
            for unit, unit_blocks in teacher.units():
                shard(unit, unit_blocks, run.device, reshard_after_forward=True)
    phases = len(run.recipe.named_phases())
    run.engine.model = wrap(model.objective, blocks, section.distributed, run.world, run.device, phases=phases)
