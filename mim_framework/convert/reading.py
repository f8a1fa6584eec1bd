"""Foreign checkpoint files as plain data. Nothing in a file is executed, whatever it holds."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mim_framework.base.errors import CheckpointError

WRAPPERS = ("model", "state_dict", "model_state", "module")
"""Keys under which training scripts keep the weights, beside an optimizer and the like; `module` is DeepSpeed's."""

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


def read_checkpoint(path: Path) -> ForeignCheckpoint:
    """Read a safetensors file, or one that `torch.save` wrote, without running code from it.

    Raises:
        CheckpointError: if the file is damaged, holds no weights, or would need code to be run; the message names it.
    """
    if path.suffix == ".safetensors":
        try:
            return ForeignCheckpoint(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    content = _load_without_code(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary with weights")
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    state = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(
            f"{path} holds no weights; its keys are {', '.join(sorted(map(str, inner))[:10]) or 'none'}"
        )
    if all(name.startswith("module.") for name in state):  # saved from inside DistributedDataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    options = content.get("args")
    return ForeignCheckpoint(state, dict(vars(options)) if isinstance(options, argparse.Namespace) else {})


def _load_without_code(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on files that are no torch checkpoints; they are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise CheckpointError(
                f"{path} cannot be read as a torch checkpoint: {str(error).splitlines()[0]}"
            ) from error
        raise CheckpointError(
            f"{path} is refused: it is no plain data, loading it would run '{named[1]}'. If you trust its source, save "
            "its weights as a safetensors file in the code base that wrote it"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint: {error}") from error
