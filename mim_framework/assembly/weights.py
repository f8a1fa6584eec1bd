"""Weights by name and shape into a module."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import load_weights


def load_into(module: nn.Module, path: Path, prefix: str = "") -> list[str]:
    """Load weights by name from a file into a module; returns the names the file lacks.

    Args:
        path: a run directory, a checkpoint folder or a safetensors file with the names of an objective.
        prefix: take only names with this prefix, and strip it.

    Raises:
        CheckpointError: if no name fits, a shape differs, or the file holds names that the module lacks.
    """
    weights = load_weights(path)
    return load_tensors(module, named_part(weights, prefix, path) if prefix else weights, path)


def load_tensors(module: nn.Module, weights: dict[str, Tensor], path: Path) -> list[str]:
    """Load weights by name into a module; returns the names that are lacking. `path` is for messages."""
    own = module.state_dict()
    if unknown := sorted(weights.keys() - own.keys()):
        raise CheckpointError(f"{path}: names that the recipe's model lacks: {some(unknown)}")
    wrong = [
        f"{name} {tuple(tensor.shape)}, needed {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if tensor.shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{path}: shapes that do not fit the recipe: {some(wrong)}")
    module.load_state_dict(weights, strict=False)
    return sorted(own.keys() - weights.keys())


def named_part(weights: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    part = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not part:
        raise CheckpointError(f"{path}: no name starting with '{prefix}'")
    return part


def some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
