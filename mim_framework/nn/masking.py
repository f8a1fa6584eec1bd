"""What maskers and those who read masks share: noise to masks, cells of a mask, gathering and pasting tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mim_framework.contract.mask import Grid, Mask, repeated_rows
from mim_framework.contract.specs import Specs
from mim_framework.nn.patches import patch_grid, shown


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens (B, N, D), ids (B, K) -> (B, K, D); of several sets of ids, (S * B, K), each takes from all samples."""
    tokens = repeated_rows(tokens, len(ids))
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))


def paste(values: Tensor, ids: Tensor | None, onto: Tensor, mask: Mask) -> Tensor:
    """onto (B, N, C) with `values` (B, M, C), held at the positions `ids` (None = all), wherever the mask predicts."""
    if ids is not None:
        values = onto.scatter(1, ids[..., None].expand_as(values), values)
    return values.where(mask.where[..., None].bool(), onto)


def put_mask_token(tokens: Tensor, mask_token: Tensor, mask: Mask, *, always: bool = False) -> Tensor:
    """tokens (B, N, D) or (B, h, w, D), of the grid of `mask`, with `mask_token` (1, 1, D) wherever it hides.

    Of several masks of a sample each gives a row: (M * B, N, D).

    Args:
        always: also where the mask is known to hide nothing, as in training: a parameter that is unused once would stop
            distributed training.
    """
    tokens = mask.per_mask(tokens)
    if mask.num_hidden == 0 and not always:
        return tokens
    return torch.where(mask.hidden.unflatten(1, tokens.shape[1:-1])[..., None], mask_token, tokens)


def mask_from_noise(noise: Tensor, num_keep: int, grid: Grid) -> Mask:
    """noise (B, N): in every row the `num_keep` smallest stay visible, in ascending order (MAE, appendix A.1)."""
    return Mask.from_shuffle(noise.argsort(dim=1, stable=True), num_keep, grid)


def hide_smallest(noise: Tensor, num_hidden: int) -> Tensor:
    """noise (B, N) -> bool (B, N): the smallest are hidden (MixMIM), unlike MAE's, which are kept."""
    order = noise.argsort(dim=1, stable=True)
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(1, order[:, :num_hidden], True)


def cell_grid(
    specs: Specs, mask_patch_size: int | None, view: str = "x", *, tube: bool = False
) -> tuple[tuple[int, ...], Grid]:
    """Sides in pixels and grid of the cells that a masker hides: the encoder's tokens, or cells of another size.

    Args:
        mask_patch_size: side along height and width; along time a cell is as long as a token.
        tube: one cell holds for all times of a clip.

    Raises:
        ValueError: if the cells do not fill the image, or do not fit the encoder's tokens.
    """
    encoder = specs.encoder.of(view)
    stride, grid = encoder.stride, encoder.grid
    if mask_patch_size is not None:
        img_size, sides = specs.view(view).img_size, (*stride[:-2], mask_patch_size, mask_patch_size)
        if any(size % side for size, side in zip(img_size, sides, strict=True)):
            size = "x".join(map(str, img_size))
            raise ValueError(f"image size {size} is not a multiple of mask_patch_size {mask_patch_size}")
        if any(side % token and token % side for side, token in zip(sides, stride, strict=True)):
            text = f"mask_patch_size {mask_patch_size} and the encoder's stride {shown(stride)} must divide one another"
            raise ValueError(text)
        stride, grid = sides, patch_grid(img_size, sides)
    if not tube:
        return stride, grid
    if len(grid.shape) != 3:
        raise ValueError(f"tube needs a clip of the axes time, height and width; the grid of view '{view}' is {grid}")
    return (specs.view(view).img_size[0], *stride[1:]), Grid((1, *grid.shape[1:]))
