"""Foreign checkpoint files as plain data. Nothing in a file is executed, whatever it holds."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mim_framework.base.errors import CheckpointError, did_you_mean
from mim_framework.convert.records import RECORD, ExportRecord

WRAPPERS = ("model", "state_dict", "model_state", "module")
"""Keys under which training scripts keep the weights, beside an optimizer and the like; `module` is DeepSpeed's."""

PREFIXES = ("module.", "_orig_mod.", "model.", "model_ema.", "ema_model.", "ema.", "teacher.", "student.", "net.")
"""What wrappers put before every name: DDP, `torch.compile`, Lightning, trainers of averaged or paired models."""

OPTIONS = ("config", "cfg", "hyper_parameters", "args")
"""Keys under which training scripts keep their options; a later one wins."""

_numpy_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(name)) for name in ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")},
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (OrderedDict, "yacs.config.CfgNode"),  # the configuration in checkpoints of SimMIM and Swin, as a plain dictionary
]
"""What a file may name besides tensors and plain containers: parsed options and numbers of a training script."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """The tensors of a file by name, and the options of the script that wrote it, if it keeps them."""

    state: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    """By name; those of a nested configuration as "DATA.IMG_SIZE". Plain values only."""
    record: ExportRecord | None = None
    """What `mim export` wrote beside the tensors."""
    key: str = ""
    """The key under which the tensors were found; empty for the top of the file."""
    prefix: str = ""
    """What was taken off the names."""
    others: dict[str, int] = field(default_factory=dict)
    """Other keys of the file that hold tensors, and how many."""


def read_checkpoint(path: Path, *, key: str | None = None, prefix: str | None = None) -> ForeignCheckpoint:
    """Read a safetensors file, or one that `torch.save` wrote, without running code from it.

    Args:
        key: where in the file the tensors are, such as "model_ema" or "state.teacher"; by default the usual places.
        prefix: take only the tensors whose names begin so, and take it off; by default what wrappers are known to add.

    Raises:
        CheckpointError: if the file is damaged, holds no weights, or would need code to be run; the message names it.
    """
    if path.is_dir():
        inside = sorted(each.name for each in path.iterdir() if each.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise CheckpointError(
            f"{path} is a folder; name a file in it: {', '.join(inside[:5]) or 'it holds no weights'}"
        )
    content, record = _content(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary with weights")
    holders = dict(_holders(content))
    found = _chosen(path, content, holders, key)
    state, taken = _without_prefix(path, holders[found], prefix)
    others = {name: len(tensors) for name, tensors in holders.items() if name != found}
    return ForeignCheckpoint(state, _options(content), record, found, taken, others)


def shown(holders: Mapping[str, int]) -> str:
    """ "teacher (50 tensors), student (52 tensors)", at most ten."""
    most = sorted(holders.items(), key=lambda each: -each[1])[:10]
    return ", ".join(f"{name or 'the top of the file'} ({_counted(count)})" for name, count in most)


def groups_of(state: Mapping[str, Tensor], depth: int = 3) -> dict[str, dict[str, Tensor]]:
    """The tensors under each prefix of up to three dotted parts, without it."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        for length in range(1, min(depth, len(parts) - 1) + 1):
            groups.setdefault(".".join(parts[:length]) + ".", {})[".".join(parts[length:])] = tensor
    return groups


def _counted(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"


def _content(path: Path) -> tuple[Any, ExportRecord | None]:
    if path.suffix != ".safetensors":
        content = _load_without_code(path)
        return content, ExportRecord.read(content.get(RECORD)) if isinstance(content, dict) else None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        return tensors, ExportRecord.read(json.loads(metadata.get(RECORD, "null")))
    except (ValueError, RecursionError):
        return tensors, None


def _holders(content: Mapping[Any, Any], where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in a file with named tensors, by the keys that lead to it; `""` is the file itself."""
    own = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if own:
        yield where, own
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, dict) and depth < 3:
            yield from _holders(value, f"{where}.{name}" if where else name, depth + 1)


def _chosen(path: Path, content: Mapping[str, Any], holders: Mapping[str, dict[str, Tensor]], key: str | None) -> str:
    counts = {name: len(tensors) for name, tensors in holders.items()}
    if key is not None:
        if key in holders:
            return key
        places = shown(counts) or "no key"
        raise CheckpointError(
            f"{path}: no tensors under key '{key}'{did_you_mean(key, holders)}; they are under {places}"
        )
    if not holders:
        keys = ", ".join(sorted(map(str, content))[:10]) or "none"
        raise CheckpointError(f"{path} holds no weights; its keys are {keys}")
    for usual in WRAPPERS:
        if usual in holders:
            return usual
    if "" in holders and counts[""] == max(counts.values()):
        return ""
    weights = {name: count for name, count in counts.items() if not name.startswith(("optimizer", "scaler", "rng"))}
    if len(weights) == 1:
        return next(iter(weights))
    named = {name: count for name, count in (weights or counts).items() if name}
    example = max(named, key=lambda name: named[name])
    raise CheckpointError(
        f"{path} holds weights under several keys, {shown(weights or counts)}; choose one, such as --key {example}"
    )


def _without_prefix(path: Path, state: dict[str, Tensor], prefix: str | None) -> tuple[dict[str, Tensor], str]:
    if prefix is not None:
        for each in dict.fromkeys((prefix.rstrip(".") + ".", prefix)):
            if part := {name.removeprefix(each): value for name, value in state.items() if name.startswith(each)}:
                return part, each
        counts = {each: len(part) for each, part in groups_of(state, depth=1).items()}
        raise CheckpointError(f"{path}: no name begins with '{prefix}'; there are {shown(counts) or 'no prefixes'}")
    taken = ""
    while each := next((known for known in PREFIXES if all(name.startswith(known) for name in state)), ""):
        state, taken = {name.removeprefix(each): value for name, value in state.items()}, taken + each
    return state, taken


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in OPTIONS:
        options = content.get(key)
        if isinstance(options, argparse.Namespace):
            options = vars(options)
        elif isinstance(options, str):
            options = _parsed(options)
        if isinstance(options, dict):
            found |= _flat(options)
    return found


def _parsed(text: str) -> Any:
    """A configuration that was saved as text: YAML, as of SlowFast; Python, as of mmpretrain, is never run."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _flat(options: Mapping[Any, Any], where: str = "", depth: int = 0) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict) and depth < 4:
            flat |= _flat(value, f"{where}{name}.", depth + 1)
        else:
            flat[f"{where}{name}"] = plain(value)
    return flat


def plain(value: Any) -> Any:
    """Numbers, texts and lists of them as Python's own; anything else as its text."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return repr(value)


def _load_without_code(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on files that are no torch checkpoints; they are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise CheckpointError(
                f"{path} is neither a safetensors file nor a torch checkpoint of tensors and plain data"
            ) from error
        raise CheckpointError(
            f"{path} is refused: it is no plain data, loading it would run '{named[1]}'. If you trust its source, save "
            "its weights as a safetensors file in the code base that wrote it"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint: {error}") from error
