"""From a checkpoint of another code base to weights and the slots of a recipe that fit them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.trained import IMPORTED_SLOTS
from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import IMPORTED_WEIGHTS
from mim_framework.contract.components import CheckpointFormat
from mim_framework.contract.mask import Grid
from mim_framework.convert.reading import ForeignCheckpoint, read_checkpoint
from mim_framework.layouts.tables import resize_bias_table, resize_position_table
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

_REST_OF_A_RECIPE: dict[str, Any] = {
    "name": "import",
    "data": {"source": {"type": "folder", "root": "."}},
    "optim": {"lr": 1.0},
    "train": {"total_batch_size": 1, "steps": 1},
}
"""What building a model takes besides the slots that a format describes; none of it is written."""


@dataclass(frozen=True)
class ImportReport:
    """What became of every tensor. `str()` is the table that `mim import` prints."""

    folder: Path
    format: str
    matched: dict[str, tuple[int, ...]]
    """Names in the recipe's model that the file filled, with their shapes."""
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Position tables that were interpolated: shape in the file, shape in the model."""
    missing: dict[str, tuple[int, ...]]
    """Names in the recipe's model that the file lacks; they start at random."""
    unexpected: dict[str, tuple[int, ...]]
    """Tensors of the file that the model has no place for, by the name they would have; they are left out."""

    def __str__(self) -> str:
        lines = [f"layout {self.format}: {len(self.matched)} tensors matched"]
        lines += [f"  resized     {name} {old} -> {new}" for name, (old, new) in self.resized.items()]
        lines += [f"  missing     {line}" for line in self._missing_lines()]
        lines += [f"  unexpected  {name} {shape}" for name, shape in self.unexpected.items()]
        lines += [
            f"weights: {self.folder / IMPORTED_WEIGHTS}",
            f"to paste into a recipe: {self.folder / IMPORTED_SLOTS}",
        ]
        return "\n".join(lines)

    def _missing_lines(self) -> Iterator[str]:
        """A part of the model of which the file holds nothing, such as the decoder, takes one line."""
        for part in dict.fromkeys(_part(name) for name in self.missing):
            inside = [name for name in self.missing if name.startswith(part)]
            if inside and not any(name.startswith(part) for name in self.matched):
                yield f"{part}* (all {len(inside)} tensors)"
            else:
                yield from (f"{name} {self.missing[name]}" for name in inside)


def import_checkpoint(
    file: Path,
    output: Path | None = None,
    registry: Registry | None = None,
    *,
    layout: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> ImportReport:
    """Write `weights.safetensors`, which a recipe takes as `init`, and `slots.yaml`, the slots that fit the weights.

    Args:
        output: folder to write to; by default one named after the file, in the current directory.
        layout: name of the checkpoint format; by default the only one that recognises the file.
        options: changes of the slots such as {"encoder.num_heads": 12}, which no tensor tells, or
            {"views.img_size": 448}: position tables are then interpolated.

    Raises:
        CheckpointError: if the file cannot be read or used; nothing is written then.
    """
    registry = registry or Registry()
    foreign = read_checkpoint(file)
    checkpoint_format = _format_for(foreign.state, file, registry, layout)
    slots = checkpoint_format.to_recipe(foreign.state)
    for where, value in (options or {}).items():
        slot, _, option = where.partition(".")
        slots.setdefault(slot, {})[option] = value
    if unknown := [f"{slot}.{name}" for slot, each in slots.items() for name, value in each.items() if value is None]:
        raise CheckpointError(f"{file} does not tell {', '.join(unknown)}; give the value, for example {unknown[0]}=12")

    model = build_model(Recipe.model_validate({**_REST_OF_A_RECIPE, **slots}), registry, with_weights=False)
    wanted = model.objective.state_dict()
    found = checkpoint_format.import_state(foreign.state)
    resized = {}
    for name, tensor in found.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            found[name] = _fit(name, tensor, wanted[name], model.specs.encoder.grid, checkpoint_format, file)
            resized[name] = tuple(tensor.shape), tuple(wanted[name].shape)
    kept = {name: tensor.contiguous() for name, tensor in found.items() if name in wanted}
    folder = output or Path(file.stem)
    report = ImportReport(
        folder,
        checkpoint_format.name,
        matched=_shapes({name: tensor for name, tensor in kept.items() if name not in resized}),
        resized=resized,
        missing=_shapes({name: tensor for name, tensor in wanted.items() if name not in kept}),
        unexpected=_shapes({name: tensor for name, tensor in found.items() if name not in wanted}),
    )
    _write(report, file, kept, slots, foreign)
    return report


def _part(name: str) -> str:
    """ "heads.main.decoder." or "encoder.": the component that a tensor belongs to."""
    if head := re.match(r"heads\.\w+\.\w+\.", name):
        return head[0]
    return name.partition(".")[0] + "."


def _format_for(state: dict[str, Tensor], file: Path, registry: Registry, layout: str | None) -> CheckpointFormat:
    if layout is not None:
        return registry.find("checkpoint_format", layout)()
    known = registry.classes("checkpoint_format")
    fitting = {name: each for name, cls in known.items() if (each := cls()).recognises(state)}
    if len(fitting) != 1:
        examples = ", ".join(list(state)[:3])
        which = f"several layouts, {', '.join(sorted(fitting))}; choose one" if fitting else "no installed layout"
        raise CheckpointError(
            f"{file} fits {which} (known: {', '.join(sorted(known)) or 'none'}); it holds {examples}, ..."
        )
    return next(iter(fitting.values()))


def _fit(
    name: str, tensor: Tensor, wanted: Tensor, grid: Grid, checkpoint_format: CheckpointFormat, file: Path
) -> Tensor:
    """A position or bias table of another square grid, interpolated; any other difference in shape is an error."""
    if name.endswith("pos_embed") and tensor.ndim == wanted.ndim == 3 and tensor.shape[2] == wanted.shape[2]:
        if name.endswith("absolute_pos_embed"):  # of the tokens that enter a hierarchical encoder
            side = isqrt(wanted.shape[1])
            grid = Grid((side, side))
        num_prefix_tokens = wanted.shape[1] - grid.num_patches
        side = isqrt(max(0, tensor.shape[1] - num_prefix_tokens))
        if side**2 + num_prefix_tokens == tensor.shape[1]:
            return resize_position_table(tensor, Grid((side, side)), grid)
    if name.endswith("relative_position_bias_table") and tensor.shape[1:] == wanted.shape[1:]:
        with suppress(ValueError):
            return resize_bias_table(tensor, len(wanted), checkpoint_format.bias_tables)
    raise CheckpointError(f"{file}: '{name}' is {tuple(tensor.shape)}, the model needs {tuple(wanted.shape)}")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _write(
    report: ImportReport, file: Path, weights: dict[str, Tensor], slots: dict[str, Any], foreign: ForeignCheckpoint
) -> None:
    comments = [f"Slots that fit the weights of {file.name}, layout {report.format}. Paste them into a recipe."]
    comments += [
        f"The script that wrote it ran with {name}: {value!r}" for name, value in sorted(foreign.options.items())
    ]
    text = "".join(f"# {' '.join(comment.split())}\n" for comment in comments)
    text += yaml.safe_dump({"init": str((report.folder / IMPORTED_WEIGHTS).resolve()), **slots}, sort_keys=False)
    try:
        report.folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, report.folder / IMPORTED_WEIGHTS)
        (report.folder / IMPORTED_SLOTS).write_text(text)
    except OSError as error:
        raise CheckpointError(f"cannot write to {report.folder}: {error.strerror}") from error
