"""Tensors under other names: what the checkpoint formats of several plugins share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Renames = tuple[tuple[str, str], ...]
"""Regular expressions and what they become, applied one after the other."""

INSIDE_BLOCKS: Renames = (
    (r"\.projection\.", ".proj."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
"""mmpretrain's names inside a transformer block and a patch embedding, as timm and official code have them."""


def renamed(state: Mapping[str, Tensor], renames: Renames, leave_out: str | tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors by their new names, without those whose old name starts with `leave_out`."""
    found = {}
    for name, tensor in state.items():
        if name.startswith(leave_out):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def part_of(state: Mapping[str, Tensor], prefix: str, new_prefix: str = "") -> dict[str, Tensor]:
    """The tensors under a prefix, which is left out or replaced."""
    return {new_prefix + name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}


def depth_of(names: Iterable[str], blocks: str = "blocks") -> int:
    """Number of blocks `BLOCKS.I.…`."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{blocks}.")})


class ReadByOfficialNames:
    """In front of the class of an official layout: the same weights under other names, which is read and never written.

    A subclass gives `renames`, or its own `official`.
    """

    renames: Renames = ()

    def official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as the official layout has them."""
        return renamed(state, self.renames)

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """The recipe that the official layout gives."""
        return super().to_recipe(self.official(state))  # type: ignore[misc]

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by our names, through the official ones."""
        return super().import_state(self.official(state))  # type: ignore[misc]

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: always; the official layout is the one to write.
        """
        raise ValueError("it can be read only; use 'official'")
