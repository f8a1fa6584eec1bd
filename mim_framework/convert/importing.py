"""From a checkpoint of another code base to weights and the slots of a recipe that fit them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mim_framework.assembly.builder import Model, build_model
from mim_framework.assembly.trained import IMPORTED_SLOTS
from mim_framework.assembly.weights import some
from mim_framework.base.errors import CheckpointError, MimError
from mim_framework.base.files import new_folder, replacing
from mim_framework.checkpoints.checkpoint import IMPORTED_WEIGHTS
from mim_framework.contract.components import CheckpointFormat
from mim_framework.contract.mask import Grid
from mim_framework.convert.reading import WRAPPERS, ForeignCheckpoint, groups_of, read_checkpoint, shown
from mim_framework.convert.records import ExportRecord
from mim_framework.convert.slots import DraftedSlots, draft_slots
from mim_framework.layouts.tables import resized_table
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
    guesses: dict[str, str] = field(default_factory=dict)
    """Options that nothing in the file tells, such as "encoder.num_heads 12", and where the value comes from."""
    told: dict[str, Any] = field(default_factory=dict)
    """Options that no tensor tells and the script that wrote the file did."""
    remarks: list[str] = field(default_factory=list)
    """What the file is, and what became of it."""

    def __str__(self) -> str:
        lines = [f"layout {self.format}: {len(self.matched)} tensors matched"]
        lines += [f"  resized     {name} {old} -> {new}" for name, (old, new) in self.resized.items()]
        lines += [f"  missing     {line}" for line in self._missing_lines()]
        lines += [f"  unexpected  {name} {shape}" for name, shape in self.unexpected.items()]
        lines += [
            f"  told        {where} {value}, by the script that wrote the file" for where, value in self.told.items()
        ]
        lines += [f"  guess       {what}: {why}" for what, why in self.guesses.items()]
        if self.guesses:
            lines.append("guesses are marked in the slots; KEY=VALUE after the file says what is right")
        lines += self.remarks
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


def _foreign_faults(function: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever the layouts of plugins and torch raise on a file that is not what they expect, as a CheckpointError."""

    @wraps(function)
    def told(file: Path, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(file, *args, **kwargs)
        except MimError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{file} cannot be imported, it is not what its names promise: {what}") from error

    return told


@_foreign_faults
def import_checkpoint(
    file: Path,
    output: Path | None = None,
    registry: Registry | None = None,
    *,
    layout: str | None = None,
    options: Mapping[str, Any] | None = None,
    key: str | None = None,
    prefix: str | None = None,
    allow_nonfinite: bool = False,
) -> ImportReport:
    """Write `weights.safetensors`, which a recipe takes as `init`, and `slots.yaml`, the slots that fit the weights.

    Args:
        output: folder to write to; by default one named after the file, in the current directory.
        layout: name of the checkpoint format; by default the only one that recognises the file.
        options: changes of the slots such as {"encoder.num_heads": 12}, which no tensor tells, or
            {"views.img_size": 448}: position tables are then interpolated.
        key: where in the file the tensors are, such as "model_ema".
        prefix: take only the tensors whose names begin so, without it.
        allow_nonfinite: take tensors that hold NaN or infinite values too.

    Raises:
        CheckpointError: if the file cannot be read or used; nothing is written then.
    """
    registry = registry or Registry()
    foreign = read_checkpoint(file, key=key, prefix=prefix)
    checkpoint_format = _format_for(foreign, file, registry, layout)
    read = _read_model(file, foreign, checkpoint_format, options or {}, registry)
    wanted, drafted = read.model.objective.state_dict(), read.drafted
    _check_finite(read.weights, file, allow_nonfinite)
    folder = output or Path(file.stem)
    report = ImportReport(
        folder,
        checkpoint_format.name,
        matched=_shapes({name: tensor for name, tensor in read.weights.items() if name not in read.resized}),
        resized=read.resized,
        missing=_shapes({name: tensor for name, tensor in wanted.items() if name not in read.weights}),
        unexpected=read.unexpected,
        guesses={f"{where} {drafted.value(where)}": why for where, why in drafted.guesses.items()},
        told=drafted.told,
        remarks=read.remarks,
    )
    _write(report, file, read.weights, drafted, foreign)
    return report


@_foreign_faults
def read_export(file: Path, registry: Registry) -> tuple[Model, dict[str, Tensor], ExportRecord]:
    """What `mim export` wrote: the model of its slots, on the CPU and at random, its weights, and its record.

    Raises:
        CheckpointError: if the file cannot be used, or is none of these: nothing is guessed.
    """
    foreign = read_checkpoint(file)
    if foreign.record is None:
        raise CheckpointError(
            f"{file} was not written by `mim export`, and does not say what its encoder is; `mim import {file}` makes "
            "a folder that can be named instead"
        )
    layouts = registry.classes("checkpoint_format")
    if foreign.record.layout not in layouts:
        raise CheckpointError(
            f"{file} is of layout '{foreign.record.layout}', and no installed plugin knows it{_list_of(layouts)}"
        )
    read = _read_model(file, foreign, layouts[foreign.record.layout](), {}, registry)
    return read.model, read.weights, foreign.record


def _list_of(layouts: Mapping[str, object]) -> str:
    return f" (known: {', '.join(sorted(layouts))})" if layouts else ""


@dataclass(frozen=True)
class _ReadModel:
    """A foreign file under our names, with the model of its slots, which still has random weights."""

    drafted: DraftedSlots
    model: Model
    weights: dict[str, Tensor]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: dict[str, tuple[int, ...]]
    remarks: list[str]


def _read_model(
    file: Path,
    foreign: ForeignCheckpoint,
    checkpoint_format: CheckpointFormat,
    options: Mapping[str, Any],
    registry: Registry,
) -> _ReadModel:
    try:
        drafted = draft_slots(checkpoint_format, foreign, options, registry, file)
        imported = checkpoint_format.import_state(foreign.state)
    except (ValueError, LookupError) as error:
        text = str(error) if isinstance(error, ValueError) else f"it lacks {error}"
        raise CheckpointError(f"{file} cannot be read in layout '{checkpoint_format.name}': {text}") from error
    try:
        recipe = Recipe.model_validate({**_REST_OF_A_RECIPE, **drafted.slots})
        model = build_model(recipe, registry, with_weights=False)
    except (MimError, ValueError) as error:
        raise CheckpointError(
            f"{file}: its slots make no model: {_cause(error)}; KEY=VALUE changes an option"
        ) from error
    wanted = model.objective.state_dict()
    found = checkpoint_format.adapt(imported, wanted)
    remarks = [*_renamed_norms(found, wanted), *drafted.remarks, *_remarks(foreign, found)]
    resized = {}
    for name, tensor in found.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            found[name] = _fit(name, tensor, wanted[name], model.specs.encoder.grid, checkpoint_format, file)
            resized[name] = tuple(tensor.shape), tuple(wanted[name].shape)
    weights = {name: tensor.contiguous() for name, tensor in found.items() if name in wanted}
    unexpected = _shapes({name: tensor for name, tensor in found.items() if name not in wanted})
    return _ReadModel(drafted, model, weights, resized, unexpected, remarks)


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())


def _renamed_norms(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterator[str]:
    """The last norm of a fine-tuned file is called `fc_norm`; it takes the place of the `norm` that the file lacks."""
    for name in [name for name in found if "fc_norm." in name and name not in wanted]:
        ours = name.replace("fc_norm.", "norm.")
        if ours in wanted and ours not in found and found[name].shape == wanted[ours].shape:
            found[ours] = found.pop(name)
            yield (
                f"{ours} is the file's {name}: that of a fine-tuned model, where it followed the mean of the patch "
                "tokens; here it normalises every token"
            )


def _remarks(foreign: ForeignCheckpoint, found: Mapping[str, Tensor]) -> Iterator[str]:
    if foreign.prefix or foreign.key not in ("", *WRAPPERS):
        where = f" under the key {foreign.key}" if foreign.key else ""
        without = f", without the prefix {foreign.prefix}" if foreign.prefix else ""
        yield f"taken: the tensors{where}{without}"
    enough = len(foreign.state) / 2
    others = {key: n for key, n in foreign.others.items() if n >= enough and not key.startswith("optimizer")}
    if others:
        yield f"the file also holds {shown(others)}; --key NAME takes those instead"


def _check_finite(tensors: Mapping[str, Tensor], file: Path, allow: bool) -> None:
    if allow:
        return
    bad = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (wrong := tensor.numel() - int(tensor.isfinite().sum())):
            nan = int(tensor.isnan().sum())
            bad.append(f"{name} ({nan} NaN, {wrong - nan} infinite of {tensor.numel()} values)")
    if bad:
        raise CheckpointError(
            f"{file} holds values that are no numbers: {some(bad)}. A model with them computes nothing else; look for "
            "another copy of the file, or take them all the same with --allow-nonfinite"
        )


def _part(name: str) -> str:
    """ "heads.main.decoder." or "encoder.": the component that a tensor belongs to."""
    if head := re.match(r"heads\.\w+\.\w+\.", name):
        return head[0]
    return name.partition(".")[0] + "."


def _format_for(foreign: ForeignCheckpoint, file: Path, registry: Registry, layout: str | None) -> CheckpointFormat:
    if layout is not None:
        return registry.find("checkpoint_format", layout)()
    known = registry.classes("checkpoint_format")
    if foreign.record is not None and foreign.record.layout in known:
        return known[foreign.record.layout]()
    fitting = {name: each for name, cls in known.items() if (each := cls()).recognises(foreign.state)}
    special = {name: each for name, each in fitting.items() if not each.fallback}
    fitting = special or fitting
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    names = ", ".join(sorted(fitting))
    which = f"several layouts, {names}; choose one with --layout" if fitting else "no installed layout"
    examples = ", ".join(list(foreign.state)[:3])
    text = f"{file} fits {which} (known: {', '.join(sorted(known)) or 'none'}); it holds {examples}, ..."
    if not fitting:
        text += f" under the key {foreign.key}" if foreign.key else ""
        text += f". Other tensors: {shown(foreign.others)}; --key NAME takes those" if foreign.others else ""
        for prefix, part in groups_of(foreign.state).items():
            if layouts := [name for name, cls in known.items() if cls().recognises(part)]:
                text += f". --prefix {prefix} takes {len(part)} tensors that fit {' and '.join(layouts)}"
    raise CheckpointError(text)


def _fit(
    name: str, tensor: Tensor, wanted: Tensor, grid: Grid, checkpoint_format: CheckpointFormat, file: Path
) -> Tensor:
    """A position or bias table of another square grid, interpolated; any other difference in shape is an error."""
    resized = resized_table(name, tensor, wanted, grid, checkpoint_format.bias_tables)
    if resized is not None:
        return resized
    raise CheckpointError(f"{file}: '{name}' is {tuple(tensor.shape)}, the model needs {tuple(wanted.shape)}")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _write(
    report: ImportReport, file: Path, weights: dict[str, Tensor], drafted: DraftedSlots, foreign: ForeignCheckpoint
) -> None:
    comments = [f"Slots that fit the weights of {file.name}, layout {report.format}. Paste them into a recipe."]
    comments += report.remarks
    comments += [
        f"The script that wrote it ran with {name}: {_short(value)}" for name, value in sorted(foreign.options.items())
    ]
    if drafted.guesses:
        comments.append("What is marked as a guess stands in nothing that the file holds: check it.")
    text = "".join(f"# {' '.join(comment.split())}\n" for comment in comments)
    text += yaml.safe_dump({"init": str((report.folder / IMPORTED_WEIGHTS).resolve())}) + drafted.yaml()
    try:
        _write_folder(report.folder, weights, text)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write to {report.folder}: {getattr(error, 'strerror', None) or error}"
        ) from error


def _write_folder(folder: Path, weights: dict[str, Tensor], slots: str) -> None:
    """A new folder appears whole. In an old one the slots are taken away first, so that no two imports are mixed."""
    if not folder.exists():
        with new_folder(folder) as aside:
            save_file(weights, aside / IMPORTED_WEIGHTS)
            (aside / IMPORTED_SLOTS).write_text(slots)
        return
    whole_weights = replacing(folder / IMPORTED_WEIGHTS, in_folder=True)
    with replacing(folder / IMPORTED_SLOTS) as new_slots, whole_weights as new_weights:
        save_file(weights, new_weights)
        new_slots.write_text(slots)
        (folder / IMPORTED_SLOTS).unlink(missing_ok=True)


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
