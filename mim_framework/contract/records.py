"""The records that pass between the slots of a training step, besides the mask.

Frozen dataclasses. They grow by optional fields; the signatures of the slots never change.
Letters for shapes: B images, N grid positions, n tokens, D width, K visible, M predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mim_framework.contract.mask import Grid, Mask

Views = dict[str, Any]
"""Named inputs of one batch on the device, usually {"x": images (B, C, H, W)}."""


@dataclass(frozen=True)
class Masked:
    """What a masker returns: masks per view, the views (rewritten or not), its own losses, what a target needs."""

    masks: dict[str, Mask]
    views: Views
    losses: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    originals: Views = field(default_factory=dict)

    def clean(self, view: str) -> Any:
        """The view before the masker rewrote it; a masker that rewrites one keeps it in `originals`."""
        return self.originals.get(view, self.views[view])


@dataclass(frozen=True)
class Ask:
    """What a caller wants from an encoder pass besides the last tokens. Asks are united with `|`.

    `layers`: block numbers from 0, whose output sequences are wanted, before the encoder's final norm.
    `attn`, `qkv`: block numbers whose attention or query/key/value are wanted. `aux`: names the encoder documents.
    """

    layers: frozenset[int] = frozenset()
    attn: frozenset[int] = frozenset()
    qkv: frozenset[int] = frozenset()
    aux: frozenset[str] = frozenset()

    def __or__(self, other: Ask) -> Ask:
        return Ask(self.layers | other.layers, self.attn | other.attn, self.qkv | other.qkv, self.aux | other.aux)


@dataclass(frozen=True, eq=False)
class Latent:
    """What an encoder returns. `tokens` (B, n, D) never holds prefix tokens.

    `ids` (B, n): grid position of each token, None = every position in order. `prefix` (B, P, D): class and register
    tokens. `layers[i]` (B, P + n, D): prefix first. `attn[i]` (B, heads, P + n, P + n).
    `qkv[i]` (3, B, heads, P + n, d). `losses`: what the encoder itself has to minimise, by name, already weighted (the
    commitment of a quantiser).
    """

    tokens: Tensor
    grid: Grid
    ids: Tensor | None = None
    prefix: Tensor | None = None
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    attn: Mapping[int, Tensor] = field(default_factory=dict)
    qkv: Mapping[int, Tensor] = field(default_factory=dict)
    aux: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    def pooled(self) -> Tensor:
        """(B, D): mean over the tokens, prefix excluded."""
        return self.tokens.mean(1)


@dataclass(frozen=True, eq=False)
class Pred:
    """Values at grid positions: what a decoder predicts, and what a target may return.

    `values` (B, M, C). `ids` (B, M): the grid position of each row, None = every position of the grid in order. Heads,
    targets and losses may work on the hidden positions only, which is exact and saves work.
    """

    values: Tensor
    grid: Grid
    ids: Tensor | None = None

    def at(self, ids: Tensor | None) -> Tensor:
        """values at the given positions (B, M), gathered if they are held for every position.

        Raises:
            ValueError: if the values are held for some other positions only.
        """
        if ids is None or ids is self.ids:
            if ids is None and self.ids is not None:
                raise ValueError("values are held for some positions only, all were asked for")
            return self.values
        if self.ids is not None:
            raise ValueError("values are held for other positions than those asked for")
        index = ids if self.values.ndim == 2 else ids[..., None].expand(*ids.shape, self.values.shape[-1])
        return self.values.gather(1, index)


# --- what builders publish, so that no dimension is typed twice in a recipe ------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One item of a source: bytes or anything a view builder understands, a name for messages, maybe a label."""

    data: Any
    name: str
    label: int | None = None
