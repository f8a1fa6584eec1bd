"""Weights by name and shape into a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import load_weights

LEAST_SHARE = 0.5
"""Share of the encoder's parameters, by number of values, that a file for `init` must hold."""

OF_POSITIONS = ("pos_embed", "relative_position_bias_table")
"""Last parts of names of tables that depend on the image size."""


@dataclass
class Part:
    """How much of one component a file fills, in tensors and in values."""

    tensors: int = 0
    matched: int = 0
    mismatched: int = 0
    values: int = 0
    values_matched: int = 0


@dataclass(frozen=True)
class Filled:
    """What a file for `init` holds of a model, by component: "encoder", "heads.main.decoder"."""

    parts: dict[str, Part]

    def share(self, part: str) -> float:
        """Share of the values of a component that the file holds."""
        return self.parts[part].values_matched / max(1, self.parts[part].values)

    @property
    def complete(self) -> bool:
        return all(part.matched == part.tensors for part in self.parts.values())

    def __str__(self) -> str:
        """A line a component."""
        return "".join(
            f"\n  {name}: {part.matched} of {part.tensors} tensors"
            + (f", {part.mismatched} of other shapes" if part.mismatched else "")
            + f" ({part.values_matched:,} of {part.values:,} values)"
            for name, part in self.parts.items()
        )


def filled_by(objective: nn.Module, weights: Mapping[str, Tensor]) -> Filled:
    """How much of each component of an objective the weights fill, by name and shape."""
    parts: dict[str, Part] = {}
    for name, own in objective.state_dict().items():
        part = parts.setdefault(_part_of(name), Part())
        fits = name in weights and weights[name].shape == own.shape
        part.tensors += 1
        part.matched += fits
        part.mismatched += name in weights and not fits
        part.values += own.numel()
        part.values_matched += own.numel() if fits else 0
    return Filled(parts)


def load_init(objective: nn.Module, path: Path, img_size: int | None = None) -> Filled:
    """Load the weights of `init`; returns how much of each component they fill.

    Args:
        img_size: of the recipe's view, for the way to weights of another one.

    Raises:
        CheckpointError: as `load_into`, or if hardly anything of the encoder (without one: of the model) is filled.
    """
    weights = load_weights(path)
    filled = filled_by(objective, weights)
    own = objective.state_dict()
    other = [name for name, tensor in weights.items() if name in own and tensor.shape != own[name].shape]
    if other and all(name.endswith(OF_POSITIONS) for name in other) and not weights.keys() - own.keys():
        shapes = [f"{name} {tuple(weights[name].shape)}, needed {tuple(own[name].shape)}" for name in other]
        size = f"views.img_size={img_size}" if img_size else "views.img_size=SIZE"
        raise CheckpointError(
            f"init {path}: shapes that do not fit the recipe: {some(shapes)}. Only tables of positions differ, as for "
            f"another image size: `mim export RUN --to LAYOUT`, then `mim import FILE {size}` resizes them, and `init` "
            f"takes its folder. What fits:{filled}"
        )
    try:
        load_tensors(objective, weights, path)
    except CheckpointError as error:
        raise CheckpointError(f"init {error}. What fits:{filled}") from error
    judged = ["encoder"] if "encoder" in filled.parts else list(filled.parts)
    values = sum(filled.parts[part].values for part in judged)
    matched = sum(filled.parts[part].values_matched for part in judged)
    if matched < LEAST_SHARE * values:
        what = "the encoder" if judged == ["encoder"] else "the model"
        raise CheckpointError(
            f"init {path} holds {matched / values:.2%} of {what}, less than {LEAST_SHARE:.0%}; the rest would start at "
            "random. Name a run, a checkpoint or a folder of `mim import` of such a model, or leave init out. "
            f"What fits:{filled}"
        )
    return filled


def _part_of(name: str) -> str:
    """ "heads.main.decoder" or "encoder": the component that a tensor belongs to."""
    head = re.match(r"heads\.[^.]+\.[^.]+", name)
    return head[0] if head else name.partition(".")[0]


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
