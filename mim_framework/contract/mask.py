"""The positions of an image, and which of them are hidden and predicted. One convention, always: True = hidden.

Letters for shapes: B images, N grid positions, K visible, M predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

MAX_PATCHES = 2**18
"""Positions of a grid, those of 4096 pixels in patches of 8."""


@dataclass(frozen=True)
class Grid:
    """The positions of a token sequence, axis by axis, in raster order.

    (rows, columns) of an image, (frames, rows, columns) of a clip, (groups,) of a cloud of points. `()` is the image as
    a whole: one position, at which labels and pooled features stand.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: if no device could attend to so many positions: an image size has a digit too many.
        """
        if self.num_patches > MAX_PATCHES:
            raise ValueError(
                f"a grid of {self} has {self.num_patches:,} positions, at most {MAX_PATCHES:,} are allowed"
            )

    @property
    def num_patches(self) -> int:
        """The number of positions."""
        return prod(self.shape)

    def __str__(self) -> str:
        return "x".join(str(n) for n in self.shape) or "of whole images"


@dataclass(frozen=True, eq=False)
class Mask:
    """What the encoder must not see, and what must be predicted.

    `hidden` (B, N) bool, True = the encoder must not see the position. One convention, always; floats are refused.
    `predict` (B, N) bool or float weights; None = exactly the hidden positions. It may be any subset of the grid.
    `max_predict`: a number of predicted positions that no row exceeds, so that heads can work on these alone
    (`ids_predict`); without it a `predict` of its own makes them work on every position.
    `equal` promises that every row hides the same number, `shared` that all rows are the same; both are checked by
    `validate()`, which the preflight and the contract tests call (it reads the device, a training step does not).
    `num_hidden`: hidden positions per row of an `equal` mask, None for others. Give it: counting waits for the device.
    `max_hidden`: for other masks, a number that no row exceeds, so that heads can work on the hidden positions alone.
    `partner` (B,) int64: the row whose patches stand at this row's hidden positions, where a masker has mixed images
    (`MaskerSpec.mixes`); None = hidden positions hold nothing. Partners are mutual and hide the same positions, so that
    each row shows what the other hides.
    Several masks of a sample stand one after the other: `hidden` (M * B, N), the first masks of all samples, then the
    second ones; the encoder's rows are then those of the masks (`per_mask`). Several sets of positions to predict from
    one pass stand so in `predict` (S * B, N) alone (I-JEPA): what heads and targets give has these rows (`per_set`).
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
    max_predict: int | None = None
    _ids_shuffle: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.hidden.dtype != torch.bool:
            raise ValueError(f"Mask.hidden must be bool with True = hidden, got {self.hidden.dtype}")
        if self.hidden.ndim != 2 or self.hidden.shape[1] != self.grid.num_patches:
            raise ValueError(
                f"Mask.hidden has shape {tuple(self.hidden.shape)}, "
                f"the grid {self.grid} needs (B, {self.grid.num_patches})"
            )
        if self.predict is not None and (
            self.predict.shape[1:] != self.hidden.shape[1:] or len(self.predict) % len(self.hidden)
        ):
            raise ValueError(
                f"Mask.predict has shape {tuple(self.predict.shape)}, hidden {tuple(self.hidden.shape)}: it needs as "
                "many positions, and as many rows or a multiple of them"
            )
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

        A row that predicts fewer than the bound is filled up with other positions, where `where` is 0.
        """
        if self.predict is not None:
            return None if self.max_predict is None else _first(self.predict > 0, self.max_predict)
        if self.equal:
            return self.ids_hidden if self.num_hidden > 0 else None
        return None if self.max_hidden is None else _first(self.hidden, self.max_hidden)

    @property
    def where(self) -> Tensor:
        """(B, N) bool or float: the positions (or weights) over which the loss is taken."""
        return self.hidden if self.predict is None else self.predict

    def as_shared(self) -> Mask:
        """The same mask, with the promise that all rows are equal."""
        return replace(self, shared=True)

    @property
    def num_sets(self) -> int:
        """Sets of positions to predict from one pass of the encoder; 1 where heads follow the rows of `hidden`."""
        return 1 if self.predict is None else len(self.predict) // len(self.hidden)

    def per_mask(self, values: Tensor) -> Tensor:
        """values (B, ...) of the samples -> (M * B, ...), one row for each of a sample's masks."""
        return repeated_rows(values, len(self.hidden))

    def per_set(self, values: Tensor) -> Tensor:
        """values (B, ...) of the samples, or of their masks -> (S * B, ...), one row for each row that is predicted."""
        return repeated_rows(values, len(self.hidden) * self.num_sets)

    def predicting(self, predict: Tensor | None, max_predict: int | None = None) -> Mask:
        """The same mask with other positions to predict, of which no row has more than `max_predict`."""
        return replace(self, predict=predict, max_predict=max_predict)

    def complement(self) -> Mask:
        """Hidden and visible exchanged; predicts what is now hidden. The same object whenever it is asked for."""
        return self._complement

    @cached_property
    def _complement(self) -> Mask:
        """So that several who pass the encoder over what was hidden share the pass (`Step.detached`)."""
        shuffle = None if self._ids_shuffle is None else self._ids_shuffle.flip(1)
        num_hidden = self.num_keep if self.equal else None
        return replace(
            self, hidden=~self.hidden, predict=None, num_hidden=num_hidden, max_hidden=None, max_predict=None,
            _ids_shuffle=shuffle,
        )  # fmt: skip

    def at(self, grid: Grid) -> Mask:
        """The mask on another grid of the same image.

        On a finer grid every value is repeated. On a coarser one a cell is hidden if all of it is, and `predict` holds
        the predicted share of the cell as float weights. The image as a whole (`Grid(())`) is always predicted.

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
        if not grid.shape:
            whole = torch.zeros_like(self.hidden[:, :1])
            return Mask(whole, grid, ~whole, equal=True, shared=True, num_hidden=0, partner=self.partner)
        pairs = list(zip(grid.shape, self.grid.shape, strict=False))
        if len(grid.shape) != len(self.grid.shape):
            raise ValueError(f"cannot resample a mask of grid {self.grid} to {grid}: another number of axes")
        if all(new % old == 0 for new, old in pairs):
            factor = prod(new // old for new, old in pairs)
            bounds = (self.num_hidden, self.max_hidden, self.max_predict)
            num_hidden, max_hidden, max_predict = (None if n is None else n * factor for n in bounds)
            predict = None if self.predict is None else self._repeat(self.predict, grid)
            hidden = self._repeat(self.hidden, grid)
            return Mask(
                hidden, grid, predict, self.equal, self.shared, num_hidden, self.partner, max_hidden, max_predict
            )
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
        predicted = self.where.count_nonzero(1)
        if self.max_predict is not None and not bool((predicted <= self.max_predict).all()):
            raise ValueError(
                f"mask says max_predict={self.max_predict} but predicts {predicted.tolist()} positions per row"
            )
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


def _first(chosen: Tensor, count: int) -> Tensor:
    """chosen (B, N) bool -> (B, count): the chosen positions in order, then others."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def repeated_rows(values: Tensor, num_rows: int) -> Tensor:
    """values (B, ...) -> (num_rows, ...), the whole batch again and again; as they are if there are so many already.

    Raises:
        ValueError: if `num_rows` is no multiple of B.
    """
    repeats, rest = divmod(num_rows, len(values))
    if rest or not repeats:
        raise ValueError(
            f"{len(values)} rows cannot stand for {num_rows}: masks or sets of each sample need a multiple"
        )
    return values if repeats == 1 else values.repeat(repeats, *[1] * (values.ndim - 1))
