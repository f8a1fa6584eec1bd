"""Checkpoints that are whole or not there: tensors as safetensors, the rest as JSON, everything hashed, no pickle.

`checkpoints/step_00001000/` holds one `GROUP.safetensors` per group of tensors, `state.json`, and `manifest.json` with
the size and SHA-256 of every file, and with what was known beside the state. Two runs that went the same way have the
same files, whatever stands beside them. It is written under a hidden temporary name on the same file system, flushed to
the disk and renamed, so a step that bears its final name is whole. A step is never overwritten. One run writes to a
folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_framework.base.errors import CheckpointError
from mim_framework.base.files import flush
from mim_framework.base.files import sha256_of as _sha256
from mim_framework.base.section import Section
from mim_framework.base.text import plain_logger

FORMAT = 1
"""Version of the layout. A reader refuses what it does not know."""

_STEP = re.compile(r"step_(\d{8,})")
_PLAIN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"

logger = plain_logger(__name__)

BEST = "best.json"
"""Name of the record of a run's best checkpoint, in its directory."""
IMPORTED_WEIGHTS = "weights.safetensors"
"""Name of the weights in a folder of `mim import`."""


class CheckpointSection(Section):
    """How often a run is saved and what is kept. The last step and an interrupted one are always saved."""

    every_epochs: float = Field(20.0, ge=0)
    """Epochs between two checkpoints; 0 for none."""
    every_steps: int = Field(0, ge=0)
    """Optimizer steps between two checkpoints, besides those of `every_epochs`; 0 for none."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints that are kept. With 2, a damaged one costs one interval and not the run."""
    keep_every_epochs: float = Field(0.0, ge=0)
    """Checkpoints that fall on a multiple of so many epochs are kept for good; 0 for none."""
    keep_best: str | None = Field(None, min_length=1)
    """Name of a number of an evaluation, such as `accuracy_top1`: the state at which it was highest is saved and kept
    too, and recorded in `best.json` of the run. null for none."""


class _File(Section):
    bytes: int
    sha256: str
    tensors: int | None = None


class _Manifest(Section):
    format: int
    step: int = Field(ge=0)
    files: dict[Annotated[str, Field(pattern=_PLAIN_NAME)], _File]
    beside: dict[str, str] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified."""

    path: Path
    step: int
    """Optimizer steps that had been made."""
    state: dict[str, Any]
    """What was saved besides tensors."""
    beside: dict[str, str] = field(default_factory=dict)
    """Facts of the run's surroundings, no part of its state."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group on the CPU; empty if the checkpoint has no such group."""
        path = self.path / f"{group}.safetensors"
        return _read_tensors(path) if path.exists() else {}


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    beside: dict[str, str] | None = None,
) -> Path:
    """Write `folder/step_NNNNNNNN`, whole or not at all. Call it on one rank.

    A whole checkpoint of the same step and content is kept as it is. Any other of this or a later step is set aside
    under the suffix `.aside`: it is damaged, or belongs to a continuation of the run that was given up.

    Args:
        folder: the run's `checkpoints` folder.
        tensors: groups of named tensors on the CPU. They may be views of each other; every name gets its own copy.
        state: what JSON can hold.
        beside: facts that are not the same wherever a run goes on, such as the sizes of files that only some stores
            tell; the first that were written of a step are kept.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full. Nothing of it is left then,
            and the earlier steps are as they were.
    """
    for group in tensors:
        if not re.fullmatch(_PLAIN_NAME, group):
            raise ValueError(f"group '{group}' cannot be a file name; use letters, digits, '_', '-' and '.'")
    final = folder / f"step_{step:08d}"
    temporary = _temporary(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        _write_files(temporary, step, tensors, state, beside or {})
        if final.exists():
            if _is_same(final, temporary):
                shutil.rmtree(temporary)
                return final
            _set_aside(final)
        os.rename(temporary, final)
        flush(folder)
        set_aside_from(folder, step + 1)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write checkpoint {final}: {error}. Earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The steps in `folder`, oldest first; empty if there is no such folder. They are not verified."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=step_of)


def newest_before(folder: Path, step: int) -> Path | None:
    """The newest checkpoint of fewer steps, not verified."""
    return next((path for path in reversed(list_checkpoints(folder)) if step_of(path) < step), None)


def set_aside_from(folder: Path, step: int) -> list[str]:
    """Take the checkpoints of this and later steps out of the run, under the suffix `.aside`; returns their names."""
    later = [path for path in list_checkpoints(folder) if step_of(path) >= step]
    for path in reversed(later):  # the newest first, so that a kill leaves no gap
        _set_aside(path)
    return [path.name for path in later]


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def find_latest(folder: Path, warn: Callable[[str], object] = logger.warning) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Args:
        warn: is told about every damaged checkpoint that is passed over.

    Raises:
        CheckpointError: if there are checkpoints and all are damaged; going on from nothing would hide the loss.
    """
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            damaged.append(str(error))
            warn(f"{error}; trying the checkpoint before it")
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Start the run under another name"
        )
    return None


def load(path: Path, *, verify: bool = True) -> Checkpoint:
    """Verify the checkpoint at `path` and open it; reads every byte once.

    Args:
        verify: False if another process has just done it; only the manifest and the state are read then.

    Raises:
        CheckpointError: naming the file that is missing, cut short or changed.
    """
    manifest = _read_manifest(path / "manifest.json")
    try:
        for name, written in manifest.files.items() if verify else ():
            file = path / name
            size = file.stat().st_size
            if size != written.bytes:
                raise CheckpointError(f"{file} is damaged: {size} bytes, {written.bytes} were written")
            if _sha256(file) != written.sha256:
                raise CheckpointError(f"{file} is damaged: its content is not what was written")
        return Checkpoint(path, manifest.step, _read_state(path / "state.json"), manifest.beside)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a model by name, from a run directory, a checkpoint or a safetensors file.

    Raises:
        CheckpointError: if there are none, or the file is damaged.
    """
    if path.is_file():
        return _read_tensors(path)
    if (path / "manifest.json").is_file():
        return load(path).tensors("model")
    if (path / IMPORTED_WEIGHTS).is_file():
        return _read_tensors(path / IMPORTED_WEIGHTS)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run directory, a checkpoint or a .safetensors file")
    found = find_latest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint: neither manifest.json nor checkpoints/step_...")
    return found.tensors("model")


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of a run at which the number of `keep_best` was highest so far.

    Raises:
        CheckpointError: if the run keeps none, or has not measured it yet, or its record is damaged.
    """
    file = run_dir / BEST
    if not file.is_file():
        raise CheckpointError(
            f"{run_dir} has no {BEST}: a run keeps its best checkpoint where checkpoint.keep_best names a number of "
            "its evaluations, such as accuracy_top1"
        )
    try:
        found = run_dir / json.loads(file.read_bytes())["checkpoint"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    if not (found / "manifest.json").is_file():
        raise CheckpointError(f"{file} names {found.name}, which is gone")
    return found


def prune(
    folder: Path,
    section: CheckpointSection,
    steps_per_epoch: int,
    *,
    before: int | None = None,
    best: int | None = None,
) -> None:
    """Delete all but the newest `section.keep` steps and those kept for good. A failure to delete only warns.

    Args:
        before: the newest of all steps before this one is kept too.
        best: the checkpoint of this step is kept too.
    """
    precious = None if before is None else newest_before(folder, before)
    for path in list_checkpoints(folder)[: -section.keep]:
        every = section.keep_every_epochs
        if path == precious or step_of(path) == best:
            continue
        if every and step_of(path) % max(1, round(every * steps_per_epoch)) == 0:
            continue
        try:  # renamed first, so that a kill cannot leave half a step under its final name
            shutil.rmtree(path.rename(_temporary(path)))
        except OSError as error:
            logger.warning(f"cannot delete the old checkpoint {path}: {error}")


def _write_files(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], beside: dict[str, str]
) -> None:
    for group, named in tensors.items():
        save_file(_independent(named), folder / f"{group}.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    files: dict[str, Any] = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
    }
    for group, named in tensors.items():
        files[f"{group}.safetensors"]["tensors"] = len(named)
    content = {"format": FORMAT, "step": step, "files": files, **({"beside": beside} if beside else {})}
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": _content_hash(content)}, indent=1))
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def _independent(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in named.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _read_manifest(path: Path) -> _Manifest:
    """The manifest holds a hash of itself, so that a change in it is noticed too."""
    try:
        content = json.loads(path.read_bytes())
        intact = content.pop("sha256") == _content_hash(content)
        if intact and content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {content['format']}; this version reads format {FORMAT}")
        if intact:
            return _Manifest.model_validate(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, ValidationError):
        pass  # not JSON, or not a manifest
    raise CheckpointError(f"{path} is damaged: its content is not what was written")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(state).__name__}, not the state of a run")
    return state


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def _is_same(final: Path, written: Path) -> bool:
    """Whether the checkpoint that is already there is whole and says the same."""
    try:
        load(final)
    except CheckpointError:
        return False
    there, here = (_read_manifest(path / "manifest.json") for path in (final, written))
    return (there.step, there.files) == (here.step, here.files)


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    logger.warning(f"set aside {path}: it is damaged, or newer than the step from which the run goes on")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of runs that were killed while saving."""
    for path in folder.glob(".step_*.tmp"):
        try:
            shutil.rmtree(path)
        except OSError as error:  # NFS keeps what somebody has open
            logger.warning(f"cannot delete the leftover {path}: {error}")
