"""Weights by name and shape into a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import load_weights
from mim_framework.contract.components import Encoder, Objective
from mim_framework.layouts.tables import resized_table

LEAST_SHARE = 0.5
"""Share of the encoder's parameters, by number of values, that a file for `init` must hold."""


@dataclass
class Part:
    """How much of one component a file fills, in tensors and in values."""

    tensors: int = 0
    matched: int = 0
    mismatched: int = 0
    values: int = 0
    values_matched: int = 0

    def __str__(self) -> str:
        other = f", {self.mismatched} of other shapes" if self.mismatched else ""
        counts = f"{self.matched} of {self.tensors} tensors{other}"
        return f"{counts} ({self.values_matched:,} of {self.values:,} values)"


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
        return "".join(f"\n  {name}: {part}" for name, part in self.parts.items())


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


def load_init(objective: Objective, path: Path, *, only_compare: bool = False) -> Filled:
    """Load the weights of `init`; returns how much of each component they fill.

    Tables of positions and biases of another image size are resized. An objective that starts from an encoder takes
    nothing else, unless the file has the whole of its heads too, as that of an earlier fine-tuning.

    Args:
        only_compare: read the file and refuse what does not fit, but leave the objective as it is.

    Raises:
        CheckpointError: as of `load_into`, or if hardly anything of the encoder (without one: of the model) is filled.
    """
    try:
        weights = _finite_weights(path)
    except CheckpointError as error:
        raise CheckpointError(f"init {error}") from error
    own = objective.state_dict()
    if objective.starts_from_encoder:
        weights = _of_encoder_and_same_heads(weights, own)
    if objective.encoder is not None:
        weights = adopted(objective.encoder, weights, own, "encoder.")
    filled = filled_by(objective, weights)
    try:
        names_lacking(objective, weights, path)
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
    if not only_compare:
        load_tensors(objective, weights, path)
    return filled


def _of_encoder_and_same_heads(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    wanted = [name for name in own if not name.startswith("encoder.")]
    same = all(name in weights and weights[name].shape == own[name].shape for name in wanted)
    return {**encoder, **{name: weights[name] for name in wanted}} if same else encoder


def adopted(
    encoder: Encoder, weights: dict[str, Tensor], own: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """Weights of a model as one with this encoder takes them: its names, and tables of positions of its size.

    Args:
        own: the state that the weights are for, by the same names.
        prefix: of the names of the encoder's.
    """
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    others = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    found = {**others, **{prefix + name: tensor for name, tensor in encoder.adopt(inside).items()}}
    for name, tensor in found.items():
        if name in own and tensor.shape != own[name].shape:
            resized = resized_table(name, tensor, own[name], encoder.spec.grid, encoder.bias_tables)
            found[name] = tensor if resized is None else resized
    return found


def _part_of(name: str) -> str:
    """ "heads.main.decoder" or "encoder": the component that a tensor belongs to."""
    head = re.match(r"heads\.[^.]+\.[^.]+", name)
    return head[0] if head else name.partition(".")[0]


def load_into(module: nn.Module, path: Path, prefix: str = "", *, only_compare: bool = False) -> list[str]:
    """Load weights by name from a file into a module; returns the names the file lacks.

    Args:
        path: a run directory, a checkpoint folder or a safetensors file with the names of an objective.
        prefix: take only names with this prefix, and strip it.
        only_compare: read the file and refuse what does not fit, but leave the module as it is.

    Raises:
        CheckpointError: if no name fits, a shape differs, a value is not finite, or the file holds names that the
            module lacks.
    """
    weights = _finite_weights(path)
    weights = named_part(weights, prefix, path) if prefix else weights
    return (names_lacking if only_compare else load_tensors)(module, weights, path)


def _finite_weights(path: Path) -> dict[str, Tensor]:
    weights = load_weights(path)
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(f"{path}: values that are not finite: {some(bad)}; every loss would be NaN")
    return weights


def load_tensors(module: nn.Module, weights: dict[str, Tensor], path: Path) -> list[str]:
    """Load weights by name into a module; returns the names that are lacking. `path` is for messages."""
    lacking = names_lacking(module, weights, path)
    module.load_state_dict(weights, strict=False)
    return lacking


def names_lacking(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> list[str]:
    """The names of a module that weights lack.

    Raises:
        CheckpointError: if a shape differs, or there are names that the module lacks.
    """
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
