"""Images to patches and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mim_framework.contract.mask import Grid


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


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """patches (B, M, P) -> (normalised, mean, std) per patch; unbiased variance, eps under the root, as in MAE."""
    mean = patches.mean(-1, keepdim=True)
    std = (patches.var(-1, keepdim=True) + eps).sqrt()
    return (patches - mean) / std, mean, std
