"""Images to patches and back, along any number of axes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mim_framework.contract.mask import Grid

Patch = int | Sequence[int]
"""Side of a patch in pixels: one for all axes, or one for each."""


def sides(patch_size: Patch, num_axes: int) -> tuple[int, ...]:
    """The side of a patch along every axis.

    Raises:
        ValueError: if there is another number of sides than axes.
    """
    if isinstance(patch_size, int):
        return (patch_size,) * num_axes
    if len(patch_size) != num_axes:
        raise ValueError(f"patch_size {list(patch_size)} has {len(patch_size)} sides, the image has {num_axes} axes")
    return tuple(patch_size)


def shown(sizes: Patch) -> str:
    """16 for (16, 16), 2x16x16 for (2, 16, 16)."""
    if isinstance(sizes, int):
        return str(sizes)
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))


def patch_grid(img_size: Sequence[int], patch_size: Patch) -> Grid:
    """The grid of patches of an image of (height, width), or of a clip of (frames, height, width).

    Raises:
        ValueError: if the image is not a whole number of patches.
    """
    patch = sides(patch_size, len(img_size))
    if any(size % side for size, side in zip(img_size, patch, strict=True)):
        size = "x".join(map(str, img_size))
        raise ValueError(f"image size {size} is not a multiple of patch_size {shown(patch_size)}")
    return Grid(tuple(size // side for size, side in zip(img_size, patch, strict=True)))


def patchify(images: Tensor, patch_size: Patch) -> Tensor:
    """images (B, C, H, W) -> (B, L, P*P*C), patches in raster order, inside a patch (row, column, channel) as in MAE.

    With more axes, (B, C, T, H, W) -> (B, L, P0*P1*P2*C), alike.

    Raises:
        ValueError: if the image is not a whole number of patches.
    """
    batch, chans, *img_size = images.shape
    patch = sides(patch_size, len(img_size))
    grid = patch_grid(img_size, patch)
    split = [size for pair in zip(grid.shape, patch, strict=True) for size in pair]
    cells = images.reshape(batch, chans, *split)
    of_grid, of_patch = range(2, cells.ndim, 2), range(3, cells.ndim, 2)
    return cells.permute(0, *of_grid, *of_patch, 1).flatten(1 + len(patch)).flatten(1, -2)


def unpatchify(patches: Tensor, patch_size: Patch, grid: Grid) -> Tensor:
    """Inverse of `patchify`: patches (B, L, P*P*C) on `grid` -> images (B, C, H, W)."""
    patch = sides(patch_size, len(grid.shape))
    num_axes = len(patch)
    cells = patches.reshape(len(patches), *grid.shape, *patch, -1)
    order = [axis for i in range(1, 1 + num_axes) for axis in (i, i + num_axes)]
    size = [number * side for number, side in zip(grid.shape, patch, strict=True)]
    return cells.permute(0, cells.ndim - 1, *order).reshape(len(patches), -1, *size)


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """patches (B, M, P) -> (normalised, mean, std) per patch; unbiased variance, eps under the root, as in MAE."""
    mean = patches.mean(-1, keepdim=True)
    std = (patches.var(-1, keepdim=True) + eps).sqrt()
    return (patches - mean) / std, mean, std


class PatchEmbed(nn.Module):
    """A linear map of every patch, as a convolution whose stride is its kernel; the names are timm's.

    Args:
        grid: of the patches; its number of axes, 1 to 3, is that of the images.
    """

    def __init__(self, grid: Grid, patch_size: Patch, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(grid.shape)]
        patch = sides(patch_size, len(grid.shape))
        self.proj = convolution(in_chans, embed_dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *size) -> (B, L, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)
