"""The records that pass between the slots of a training step, besides the mask.

Frozen dataclasses. They grow by optional fields; the signatures of the slots never change.
Letters for shapes: B images, N grid positions, n tokens, D width, K visible, M predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mim_framework.contract.mask import Grid, Mask, repeated_rows

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


@dataclass(frozen=True)
class Stretch:
    """Where the tokens of one view stand among those of several: `length` ones from `start`, on `grid`, at `ids`."""

    start: int
    length: int
    grid: Grid
    ids: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Latent:
    """What an encoder returns. `tokens` (B, n, D) never holds prefix tokens.

    `ids` (B, n): grid position of each token, None = every position in order. `prefix` (B, P, D): class and register
    tokens. `layers[i]` (B, P + n, D): prefix first. `attn[i]` (B, heads, P + n, P + n).
    `qkv[i]` (3, B, heads, P + n, d). `losses`: what the encoder itself has to minimise, by name, already weighted (the
    commitment of a quantiser). `stretches`: of an encoder that joins views, where the tokens of each view stand; `grid`
    and `ids` are then those of no view and not used. `whole`: of one view's stretch, the tokens of all views.
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
    stretches: Mapping[str, Stretch] = field(default_factory=dict)
    whole: Latent | None = field(default=None, repr=False)

    def pooled(self) -> Tensor:
        """(B, D): mean over the tokens, prefix excluded."""
        return self.tokens.mean(1)

    def of(self, view: str) -> Latent:
        """The tokens and layers of one view; all of it if the encoder joins none.

        Raises:
            ValueError: if the encoder joins views, and not this one.
        """
        if not self.stretches:
            return self
        if view not in self.stretches:
            raise ValueError(f"the encoder joins the views {', '.join(self.stretches)}; '{view}' is asked for")
        stretch = self.stretches[view]
        num_prefix_tokens = 0 if self.prefix is None else self.prefix.shape[1]
        stop = stretch.start + stretch.length
        layers = {
            i: torch.cat([x[:, :num_prefix_tokens], x[:, num_prefix_tokens:][:, stretch.start : stop]], dim=1)
            for i, x in self.layers.items()
        }
        tokens = self.tokens[:, stretch.start : stop]
        return Latent(tokens, stretch.grid, stretch.ids, self.prefix, layers, aux=self.aux, whole=self)


@dataclass(frozen=True, eq=False)
class Pred:
    """Values at grid positions: what a decoder predicts, and what a target may return.

    `values` (B, M, C), or (B, M) ids. `ids` (B, M): the grid position of each row, None = every position of the grid in
    order. Heads, targets and losses may work on the hidden positions only, which is exact and saves work.
    """

    values: Tensor
    grid: Grid
    ids: Tensor | None = None

    def at(self, ids: Tensor | None) -> Tensor:
        """values at the given positions (B, M), gathered if they are held for every position.

        Of several sets of positions, `ids` (S * B, M), every set gets those of its samples.

        Raises:
            ValueError: if the values are held for some other positions only.
        """
        if ids is None or ids is self.ids:
            if ids is None and self.ids is not None:
                raise ValueError("values are held for some positions only, all were asked for")
            return self.values
        if self.ids is not None:
            raise ValueError("values are held for other positions than those asked for")
        values = repeated_rows(self.values, len(ids))
        index = ids if values.ndim == 2 else ids[..., None].expand(*ids.shape, values.shape[-1])
        return values.gather(1, index)


# --- what builders publish, so that no dimension is typed twice in a recipe ------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One item of a source: bytes or anything a view builder understands, a name for messages, maybe a label.

    `page`: which one of an encoded file of several pages or frames, from 0.
    """

    data: Any
    name: str
    label: int | None = None
    page: int = 0


class Measured(NamedTuple):
    """What a loss may return instead of a plain number.

    `metrics`: detached scalars worth logging beside it, averaged like losses. `count`: what the loss was divided by,
    such as the hidden patches of the micro-batch, where a recipe divides by the sum over micro-batches and ranks
    (`train.average: over_positions`); a 0-dim tensor or a number.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = {}
    count: Tensor | float | None = None

    @classmethod
    def of(cls, value: Tensor | Measured) -> Measured:
        """A plain number is a loss without measures."""
        return value if isinstance(value, Measured) else cls(value)


class Outcome(NamedTuple):
    """What an objective makes of a micro-batch: its losses by name, already weighted, whose sum is minimised.

    `metrics` and `counts` as in `Measured`; `counts` by the name of the loss.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = {}
    counts: dict[str, Tensor | float] = {}

    @classmethod
    def of(cls, value: dict[str, Tensor] | Outcome) -> Outcome:
        """A plain dictionary holds losses."""
        return value if isinstance(value, Outcome) else cls(value)


def common_count(outcome: Outcome) -> Tensor | float:
    """What every loss of a micro-batch was divided by.

    Raises:
        ValueError: if a loss does not say it, or several may differ.
    """
    silent = [name for name in outcome.losses if name not in outcome.counts]
    if silent or len(outcome.counts) != 1:
        what = f"loss '{silent[0]}' has none" if silent else f"there are those of {', '.join(outcome.counts)}"
        raise ValueError(
            f"train.average is over_positions, which needs one loss that says its count (`Measured.count`): {what}; "
            "use train.average=per_micro_batch"
        )
    return next(iter(outcome.counts.values()))
