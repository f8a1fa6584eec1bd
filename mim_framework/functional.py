"""Small tensor functions that several components share: gathering tokens, cutting patches, position tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.specs import ViewSpec


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: q (B, heads, M, d), k and v (B, heads, T, d) -> (B, heads, M, d).

    `bias` (1 or B, heads or 1, M, T), floating point and perhaps learned, is added to the logits. On a GPU the fused
    kernel does it all. On a CPU two cases are faster as batched products: bfloat16, where the fused backward pass is
    slow, and a learned bias, for which torch has no fused CPU kernel and falls back to one four times as slow.
    """
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if q.device.type != "cpu" or not (learned or q.dtype == torch.bfloat16):
        return scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    q, k, v, scale = q.contiguous(), k.contiguous(), v.contiguous(), q.shape[-1] ** -0.5
    logits = q * scale @ k.mT
    if bias is not None:
        logits += bias.to(q.dtype)
    return logits.softmax(-1) @ v


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens (B, N, D), ids (B, K) -> (B, K, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))


def paste(values: Tensor, ids: Tensor | None, onto: Tensor, mask: Mask) -> Tensor:
    """onto (B, N, C) with `values` (B, M, C), held at the positions `ids` (None = all), wherever the mask predicts."""
    if ids is not None:
        values = onto.scatter(1, ids[..., None].expand_as(values), values)
    return values.where(mask.where[..., None].bool(), onto)


class Renormalize(nn.Module):
    """A view (B, C, H, W) normalised as `view` says, in another normalisation; mean 0 and std 1 is [0, 1].

    It leaves images as they are, to the bit, where both are the same or one of the two is not known.
    """

    def __init__(self, view: ViewSpec, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        scale = shift = None
        if None not in (view.mean, view.std, mean, std) and (view.mean, view.std) != (tuple(mean), tuple(std)):
            old_mean, old_std, mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (view.mean, view.std, mean, std))
            scale, shift = old_std / std, (old_mean - mean) / std
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, view: Tensor) -> Tensor:
        """view (B, C, H, W) -> the same images in the other normalisation."""
        return view if self.scale is None else view * self.scale + self.shift


def patch_grid(img_size: Sequence[int], patch_size: int) -> Grid:
    """The grid of square patches of an image of (height, width).

    Raises:
        ValueError: if the image is not a whole number of patches.
    """
    height, width = img_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} is not a multiple of patch_size {patch_size}")
    return Grid((height // patch_size, width // patch_size))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """images (B, C, H, W) -> (B, L, P*P*C), patches in raster order, inside a patch (row, column, channel) as in MAE.

    Raises:
        ValueError: if the image is not a whole number of patches.
    """
    batch, chans, *img_size = images.shape
    rows, columns = patch_grid(img_size, patch_size).shape
    cells = images.reshape(batch, chans, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * chans)


def unpatchify(patches: Tensor, patch_size: int, grid: Grid) -> Tensor:
    """Inverse of `patchify`: patches (B, L, P*P*C) on `grid` -> images (B, C, H, W)."""
    rows, columns = grid.shape
    cells = patches.reshape(len(patches), rows, columns, patch_size, patch_size, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch_size, columns * patch_size)


def unfold_to_places(tensor: Tensor) -> Tensor:
    """Inputs of a patch-merging layer (..., 4C), from mmpretrain's order to that of Swin.

    mmpretrain merges with `Unfold`: channel by channel, in each the four places row by row. Swin's order is place by
    place, (0, 0), (1, 0), (0, 1), (1, 1) as (row, column), in each all channels.
    """
    by_place = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return by_place[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def sincos_position_table(dim: int, grid: Grid, *, row_first: bool = False) -> Tensor:
    """Fixed 2-D sin-cos positions (N, dim) float32, angles in float64, in the order of MAE's `util/pos_embed.py`.

    The first half of the channels encodes the column, the second half the row; within a half all sines come first.
    `row_first` exchanges the halves, as mmpretrain has them.

    Raises:
        ValueError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos position table needs a width that is a multiple of 4, got {dim}")
    rows, columns = grid.shape
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4.0))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    halves = []
    for coordinate in (row, column) if row_first else (column, row):
        angles = coordinate.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def perplexity(counts: Tensor) -> Tensor:
    """counts (..., K) of how often each of K codes was used -> (...): exp of the entropy; K if all are used alike."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(-1).exp()


def usage_picture(counts: Tensor, height: int = 128, width: int = 512) -> Tensor:
    """counts (K,) -> (1, height, width) in [0, 1]: a dark bar of logarithmic height for each code, longest first."""
    heights = counts.float().sort(descending=True).values.log1p()
    columns = torch.arange(width, device=counts.device) * len(counts) // width
    bars = heights[columns] / heights[0].clamp(min=1e-12) * height
    rows = torch.arange(height, 0, -1, device=counts.device)[:, None] - 0.5
    return (bars < rows).float()[None]
