"""The records that pass between the slots of a training step.

Frozen dataclasses. They grow by optional fields; the signatures of the slots never change.
Letters for shapes: B images, N grid positions, n tokens, D width, K visible, M predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.schedule import Curve, value_at

if TYPE_CHECKING:
    from mim_framework.distributed import World
    from mim_framework.teachers import TeacherSession

Views = dict[str, Any]
"""Named inputs of one batch on the device, usually {"x": images (B, C, H, W)}."""


@dataclass(frozen=True)
class Grid:
    """The positions of a token sequence: (rows, columns), (frames, rows, columns) or (groups,), in raster order."""

    shape: tuple[int, ...]

    @property
    def num_patches(self) -> int:
        """The number of positions."""
        return prod(self.shape)

    def __str__(self) -> str:
        return "x".join(str(n) for n in self.shape)


@dataclass(frozen=True, eq=False)
class Mask:
    """What the encoder must not see, and what must be predicted.

    `hidden` (B, N) bool, True = the encoder must not see the position. One convention, always; floats are refused.
    `predict` (B, N) bool or float weights; None = exactly the hidden positions.
    `equal` promises that every row hides the same number, `shared` that all rows are the same; both are checked by
    `validate()`, which the preflight and the contract tests call (it reads the device, a training step does not).
    `num_hidden`: hidden positions per row of an `equal` mask, None for others. Give it: counting waits for the device.
    `max_hidden`: for other masks, a number that no row exceeds, so that heads can work on the hidden positions alone.
    `partner` (B,) int64: the row whose patches stand at this row's hidden positions, where a masker has mixed images
    (`MaskerSpec.mixes`); None = hidden positions hold nothing. Partners are mutual and hide the same positions, so that
    each row shows what the other hides.
    Gather indices are derived here and cached, never stored by a masker as a second truth.
    """

    hidden: Tensor
    grid: Grid
    predict: Tensor | None = None
    equal: bool = False
    shared: bool = False
    num_hidden: int | None = None
    partner: Tensor | None = None
    max_hidden: int | None = None
    _ids_shuffle: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.hidden.dtype != torch.bool:
            raise ValueError(f"Mask.hidden must be bool with True = hidden, got {self.hidden.dtype}")
        if self.hidden.ndim != 2 or self.hidden.shape[1] != self.grid.num_patches:
            raise ValueError(
                f"Mask.hidden has shape {tuple(self.hidden.shape)}, "
                f"the grid {self.grid} needs (B, {self.grid.num_patches})"
            )
        if self.predict is not None and self.predict.shape != self.hidden.shape:
            raise ValueError(f"Mask.predict has shape {tuple(self.predict.shape)}, hidden {tuple(self.hidden.shape)}")
        if self.equal and self.num_hidden is None:
            object.__setattr__(self, "num_hidden", int(self.hidden[0].sum()))

    @classmethod
    def none(cls, batch_size: int, grid: Grid, device: torch.device | str | None = None) -> Mask:
        """Nothing is hidden."""
        hidden = torch.zeros(batch_size, grid.num_patches, dtype=torch.bool, device=device)
        return cls(hidden, grid, equal=True, shared=True, num_hidden=0)

    @classmethod
    def from_shuffle(cls, ids_shuffle: Tensor, num_keep: int, grid: Grid) -> Mask:
        """ids_shuffle (B, N), a permutation of each row: the first `num_keep` positions stay visible, in that order."""
        hidden = torch.ones_like(ids_shuffle, dtype=torch.bool)
        hidden.scatter_(1, ids_shuffle[:, :num_keep], False)
        num_hidden = ids_shuffle.shape[1] - num_keep
        return cls(hidden, grid, equal=True, num_hidden=num_hidden, _ids_shuffle=ids_shuffle)

    @property
    def num_keep(self) -> int:
        """Visible positions per row; only for `equal` masks."""
        self._require_equal("num_keep")
        return self.grid.num_patches - self.num_hidden

    @cached_property
    def ids_shuffle(self) -> Tensor:
        """(B, N): visible positions first, then the hidden ones."""
        self._require_equal("ids_shuffle")
        return (
            self.hidden.to(torch.uint8).argsort(dim=1, stable=True) if self._ids_shuffle is None else self._ids_shuffle
        )

    @cached_property
    def ids_keep(self) -> Tensor:
        """(B, K): the visible positions, in the order in which a visible-only encoder receives them."""
        return self.ids_shuffle[:, : self.num_keep]

    @cached_property
    def ids_hidden(self) -> Tensor:
        """(B, N - K): the hidden positions."""
        return self.ids_shuffle[:, self.num_keep :]

    @cached_property
    def ids_restore(self) -> Tensor:
        """(B, N): inverse of `ids_shuffle`."""
        order = torch.arange(self.grid.num_patches, device=self.hidden.device).expand_as(self.ids_shuffle)
        return torch.empty_like(self.ids_shuffle).scatter_(1, self.ids_shuffle, order)

    @cached_property
    def ids_predict(self) -> Tensor | None:
        """(B, M) positions that heads may restrict themselves to, or None = work on every position.

        A row that hides fewer than `max_hidden` is filled up with visible positions, where `where` is 0.
        """
        if self.predict is not None:
            return None
        if self.equal:
            return self.ids_hidden if self.num_hidden > 0 else None
        if self.max_hidden is None:
            return None
        return (~self.hidden).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.max_hidden]

    @property
    def where(self) -> Tensor:
        """(B, N) bool or float: the positions (or weights) over which the loss is taken."""
        return self.hidden if self.predict is None else self.predict

    def as_shared(self) -> Mask:
        """The same mask, with the promise that all rows are equal."""
        return replace(self, shared=True)

    def predicting(self, predict: Tensor | None) -> Mask:
        """The same mask with other positions to predict."""
        return replace(self, predict=predict)

    def complement(self) -> Mask:
        """Hidden and visible exchanged; predicts what is now hidden."""
        shuffle = None if self._ids_shuffle is None else self._ids_shuffle.flip(1)
        num_hidden = self.num_keep if self.equal else None
        return replace(
            self, hidden=~self.hidden, predict=None, num_hidden=num_hidden, max_hidden=None, _ids_shuffle=shuffle
        )

    def at(self, grid: Grid) -> Mask:
        """The mask on another grid of the same image.

        On a finer grid every value is repeated. On a coarser one a cell is hidden if all of it is, and `predict` holds
        the predicted share of the cell as float weights.

        Raises:
            ValueError: if one grid does not divide the other along every axis.
        """
        if grid == self.grid:
            return self
        if grid not in self._resampled:
            self._resampled[grid] = self._resample(grid)
        return self._resampled[grid]

    @cached_property
    def _resampled(self) -> dict[Grid, Mask]:
        """So that a decoder and a target that ask for the same grid hold the very same indices (`Pred.at`)."""
        return {}

    def _resample(self, grid: Grid) -> Mask:
        pairs = list(zip(grid.shape, self.grid.shape, strict=False))
        if len(grid.shape) != len(self.grid.shape):
            raise ValueError(f"cannot resample a mask of grid {self.grid} to {grid}: another number of axes")
        if all(new % old == 0 for new, old in pairs):
            factor = prod(new // old for new, old in pairs)
            num_hidden, max_hidden = (None if n is None else n * factor for n in (self.num_hidden, self.max_hidden))
            predict = None if self.predict is None else self._repeat(self.predict, grid)
            hidden = self._repeat(self.hidden, grid)
            return Mask(hidden, grid, predict, self.equal, self.shared, num_hidden, self.partner, max_hidden)
        if all(old % new == 0 for new, old in pairs):
            hidden = self._cells(self.hidden, grid).all(-1)
            predict = self._cells(self.where, grid).float().mean(-1)
            return Mask(hidden, grid, predict, shared=self.shared, partner=self.partner)
        raise ValueError(
            f"cannot resample a mask of grid {self.grid} to {grid}: one must divide the other on every axis"
        )

    def validate(self) -> None:
        """Check the promises `equal`, `shared` and those of `partner` (reads the device).

        Raises:
            ValueError: naming the promise that does not hold.
        """
        counts = self.hidden.sum(1)
        if self.equal and not bool((counts == self.num_hidden).all()):
            raise ValueError(f"mask says equal=True but hides {counts.tolist()} positions per row")
        if self.max_hidden is not None and not bool((counts <= self.max_hidden).all()):
            raise ValueError(f"mask says max_hidden={self.max_hidden} but hides {counts.tolist()} positions per row")
        if self.shared and not bool((self.hidden == self.hidden[:1]).all()):
            raise ValueError("mask says shared=True but its rows differ")
        if self.partner is not None:
            rows = torch.arange(len(self.partner), device=self.partner.device)
            if not torch.equal(self.partner[self.partner], rows):
                raise ValueError(f"mask has partners that are not mutual: {self.partner.tolist()}")
            if not torch.equal(self.hidden, self.hidden[self.partner]):
                raise ValueError("mask has partners that hide different positions: parts of their images are lost")

    def _repeat(self, values: Tensor, grid: Grid) -> Tensor:
        values = values.reshape(-1, *self.grid.shape)
        for axis, (new, old) in enumerate(zip(grid.shape, self.grid.shape, strict=True), start=1):
            values = values.repeat_interleave(new // old, dim=axis)
        return values.reshape(len(values), -1)

    def _cells(self, values: Tensor, grid: Grid) -> Tensor:
        """(B, N) -> (B, N of the coarser grid, positions inside a cell)."""
        split = [size for new, old in zip(grid.shape, self.grid.shape, strict=True) for size in (new, old // new)]
        axes = len(grid.shape)
        order = [0, *range(1, 2 * axes + 1, 2), *range(2, 2 * axes + 1, 2)]
        return values.reshape(-1, *split).permute(order).reshape(len(values), grid.num_patches, -1)

    def _require_equal(self, what: str) -> None:
        if not self.equal:
            raise ValueError(f"Mask.{what} needs a mask whose rows hide the same number (equal=True)")


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


@dataclass(frozen=True, eq=False)
class Step:
    """One training step as the components see it.

    `index` counts optimizer steps from 0, `total` is their planned number, `epoch` the fractional epoch,
    `steps_per_epoch` None outside of a run.
    `positions` (B,): global positions of this micro-batch's samples; everything random is a function of them.
    """

    index: int
    total: int
    epoch: float
    epochs: float
    positions: Tensor
    seed: int
    world: World
    steps_per_epoch: int | None = None
    phase: str = "main"
    teachers: TeacherSession | None = field(default=None, repr=False)

    def rand(self, stream: str, n: int) -> Tensor:
        """(B, n) uniform float32 in [0, 1): the same for the same sample position on any rank, worker and device."""
        return rng.uniform(self.seed, stream, self.positions, n)

    def rand_shared(self, stream: str, n: int) -> Tensor:
        """(1, n) uniform float32 in [0, 1): one draw for all samples of an optimizer step, on any rank."""
        index = torch.full((1,), self.index, device=self.positions.device)  # filled there: a copy would wait for it
        return rng.uniform(self.seed, f"{stream} of a step", index, n)

    def teacher(self, name: str, view: Tensor, mask: Mask | None = None) -> Latent:
        """The named teacher's pass over `view`, computed once per step however many components ask for it.

        It answers the union of what all components declared at build time (`Component.teacher_asks`).
        """
        if self.teachers is None:
            raise ValueError(f"this step has no teachers, '{name}' was asked for")
        return self.teachers.encode(name, view, mask)

    def value(self, schedule: Curve | float) -> float:
        """The value of a schedule (or plain number) at this step."""
        return value_at(schedule, self.epoch, self.epochs, self.steps_per_epoch)


# --- what builders publish, so that no dimension is typed twice in a recipe ------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One item of a source: bytes or anything a view builder understands, a name for messages, maybe a label."""

    data: Any
    name: str
    label: int | None = None


@dataclass(frozen=True)
class ViewSpec:
    """A view: `shape` of one sample, (C, H, W) for images.

    `mean` and `std` of each channel, if images in [0, 1] were normalised by them; `unit_range` takes that back.
    A view of kind `ids` holds token ids (N,), of `num_classes` classes, on `grid`. A plugin may have a kind of its own,
    such as `points`, for its own components; those that look at images refuse it.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "image"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    grid: Grid | None = None
    num_classes: int | None = None

    @property
    def in_chans(self) -> int:
        """Channels.

        Raises:
            ValueError: if the view does not hold images.
        """
        return self._image_shape[0]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width.

        Raises:
            ValueError: if the view does not hold images.
        """
        return self._image_shape[1], self._image_shape[2]

    @property
    def _image_shape(self) -> tuple[int, ...]:
        if self.kind != "image":
            raise ValueError(f"view '{self.name}' holds {self.kind}, images are needed")
        return self.shape


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder: output width, token grid, pixels per token, blocks, attention heads, and what it can be asked for.

    `visible_only`: hidden tokens are dropped, so that `Latent.tokens` holds the visible positions only.
    `accepts`: masks whose rows hide equal numbers, masks whose rows vary, no mask at all, and mixed images (an encoder
    that accepts masks only of mixed images never sees an empty position).
    `num_classes`: of a tokenizer, the size of the vocabulary of the ids (B, N) that it gives as `Latent.aux["ids"]`.
    `mean`, `std`: the normalisation of the images that its weights were made for; None = that of the view it is built
    for.
    """

    dim: int
    grid: Grid
    stride: int
    depth: int
    num_heads: int
    num_prefix_tokens: int = 0
    in_chans: int = 3
    visible_only: bool = False
    accepts: frozenset[Literal["equal", "varies", "none", "mixed"]] = frozenset({"equal", "varies", "none"})
    offers: Ask = Ask()
    layers: Mapping[int, tuple[int, Grid]] = field(default_factory=dict)
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def lacks(self, ask: Ask) -> str:
        """What of `ask` this encoder cannot answer, in words; empty if it can answer all of it."""
        wanted = {
            name: sorted(getattr(ask, name) - getattr(self.offers, name)) for name in ("layers", "attn", "qkv", "aux")
        }
        return ", ".join(f"{name} {missing}" for name, missing in wanted.items() if missing)


@dataclass(frozen=True)
class MaskerSpec:
    """A masker: the views it masks, on which grid, whether rows hide equal numbers, and how many on average.

    `mixes`: hidden positions show another image of the batch (`Mask.partner`), which only some encoders and decoders
    can tell apart.
    """

    grid: Grid
    equal: bool
    shared: bool = False
    num_hidden: float = 0.0
    views: tuple[str, ...] = ("x",)
    rewrites: tuple[str, ...] = ()
    mixes: bool = False


Kind = Literal["dense", "ids", "probs", "map", "opaque"]


@dataclass(frozen=True)
class TargetSpec:
    """A target: kind, size of each vector (or number of classes) and the grid it lives on."""

    kind: Kind
    dim: int
    grid: Grid


@dataclass(frozen=True)
class PredSpec:
    """A decoder's prediction: kind `dense` (vectors), `probs` (logits over classes) or `opaque`, its size and grid."""

    kind: Kind
    dim: int
    grid: Grid
