"""Tables of positions and biases for another image or window size, and weights whose inputs change places."""

from __future__ import annotations

from contextlib import suppress
from math import isqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mim_framework.contract.mask import Grid


def resize_position_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """table (1, prefix + N, D) of a token grid -> the table of another; rows of prefix tokens are kept.

    Bicubic, without antialiasing, as MAE's `util/pos_embed.py` does it when fine-tuning.

    Raises:
        ValueError: if the table is too short for the old grid.
    """
    num_prefix_tokens = table.shape[1] - old.num_patches
    if num_prefix_tokens < 0:
        raise ValueError(f"a position table of {table.shape[1]} rows cannot be that of a grid {old}")
    if old == new:
        return table
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = patches.unflatten(1, old.shape).permute(0, 3, 1, 2)
    resized = interpolate(image.float(), size=new.shape, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize_bias_table(table: Tensor, num_rows: int, method: Literal["geometric", "bicubic"]) -> Tensor:
    """table (rows, heads) of relative position biases in a square window -> (num_rows, heads); kept: rows of tokens.

    `geometric` takes the known values to stand at distances from the centre that grow geometrically, so that near
    positions keep theirs, and reads a cubic spline through them (BEiT, `run_class_finetuning.py`; SimMIM). `bicubic` is
    a plain resize (MixMIM).

    Raises:
        ValueError: if one of the two is no table of a square window, or only one has rows for a class token.
    """
    (old, old_extra), (new, new_extra) = _square_window(len(table)), _square_window(num_rows)
    if old_extra != new_extra:
        raise ValueError(f"a bias table of {len(table)} rows cannot be resized to {num_rows}")
    if old == new:
        return table
    patches, extra = table[: len(table) - old_extra], table[len(table) - old_extra :]
    image = patches.t().unflatten(1, (2 * old - 1, 2 * old - 1))
    if old == 1:
        resized = image.expand(-1, 2 * new - 1, 2 * new - 1)
    elif method == "bicubic":
        size = (2 * new - 1, 2 * new - 1)
        resized = interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False)[0]
    else:
        wanted = torch.arange(-new + 1, new, dtype=torch.float64)
        known = _geometric_distances(old - 1, new - 1)
        matrix = _spline_matrix(known, wanted.clamp(known[0], known[-1]))  # beyond, the value at the border
        resized = matrix @ image.double() @ matrix.t()
    return torch.cat([resized.flatten(1).t().to(table.dtype), extra])


def resized_table(
    name: str, table: Tensor, wanted: Tensor, grid: Grid, method: Literal["geometric", "bicubic"]
) -> Tensor | None:
    """A table of positions or biases of another square grid, interpolated; None if it is none, or differs otherwise.

    Args:
        name: ends as tables do, in `pos_embed` or `relative_position_bias_table`.
        wanted: a tensor of the shape that is needed.
        grid: of the tokens that `wanted` is for.
        method: of tables of biases, see `resize_bias_table`.
    """
    if name.endswith("pos_embed") and table.ndim == wanted.ndim == 3 and table.shape[2] == wanted.shape[2]:
        if name.endswith("absolute_pos_embed"):  # of the tokens that enter a hierarchical encoder
            side = isqrt(wanted.shape[1])
            grid = Grid((side, side))
        num_prefix_tokens = wanted.shape[1] - grid.num_patches
        side = isqrt(max(0, table.shape[1] - num_prefix_tokens))
        if side**2 + num_prefix_tokens == table.shape[1]:
            return resize_position_table(table, Grid((side, side)), grid)
    if name.endswith("relative_position_bias_table") and table.shape[1:] == wanted.shape[1:]:
        with suppress(ValueError):
            return resize_bias_table(table, len(wanted), method)
    return None


def _square_window(num_rows: int) -> tuple[int, int]:
    """(side of the window, rows for a class token) of a bias table."""
    for extra in (0, 3):
        side = isqrt(max(0, num_rows - extra))
        if side**2 == num_rows - extra and side % 2:
            return (side + 1) // 2, extra
    raise ValueError(f"a bias table of {num_rows} rows is not that of a square window")


def _geometric_distances(num: int, reach: int) -> Tensor:
    """0 and `num` distances 1, 1 + q, 1 + q + q^2, ... to either side, q such that the last one is `reach`; float64.

    As in the official code q lies between 1.01 and 1.5, to 1e-6: a smaller window is cut out of the larger one, hardly
    compressed, and a much larger one has places beyond the last distance.
    """
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(num)) > reach else (q, high)
    steps = torch.tensor([q**i for i in range(num)], dtype=torch.float64).cumsum(0)
    return torch.cat([-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])


def _spline_matrix(x: Tensor, wanted: Tensor) -> Tensor:
    """(M, N): values at x (N) -> values at wanted (M) of the cubic spline through them, not-a-knot at its ends.

    Through fewer than four points a line from each to the next.
    """
    num, step = len(x), x.diff()
    curvature = torch.zeros(num, num, dtype=x.dtype)  # second derivatives at x for the values at x
    if num >= 4:
        system, values = torch.zeros_like(curvature), torch.zeros_like(curvature)
        for i in range(1, num - 1):
            before, after = step[i - 1], step[i]
            system[i, i - 1 : i + 2] = torch.stack([before, 2 * (before + after), after])
            values[i, i - 1 : i + 2] = torch.stack([6 / before, -6 / before - 6 / after, 6 / after])
        system[0, :3] = torch.stack([step[1], -step[0] - step[1], step[0]])
        system[-1, -3:] = torch.stack([step[-1], -step[-2] - step[-1], step[-2]])
        curvature = torch.linalg.solve(system, values)
    unit = torch.eye(num, dtype=x.dtype)
    left = (torch.searchsorted(x, wanted, right=True) - 1).clamp(0, num - 2)
    width = step[left, None]
    b = (wanted[:, None] - x[left, None]) / width
    a = 1 - b
    bend = (a**3 - a) * curvature[left] + (b**3 - b) * curvature[left + 1]
    return a * unit[left] + b * unit[left + 1] + bend * width**2 / 6


def unfold_to_places(tensor: Tensor) -> Tensor:
    """Inputs of a patch-merging layer (..., 4C), from mmpretrain's order to that of Swin.

    mmpretrain merges with `Unfold`: channel by channel, in each the four places row by row. Swin's order is place by
    place, (0, 0), (1, 0), (0, 1), (1, 1) as (row, column), in each all channels.
    """
    by_place = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return by_place[..., [0, 2, 1, 3], :].flatten(-2).contiguous()
