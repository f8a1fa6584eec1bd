"""Histograms of oriented gradients (HOG): of a batch of images, and as a picture. Start at `hog`.

The descriptor is that of MaskFeat (SlowFast, `slowfast/models/operators.py`), exact where its code is at the mercy of
rounding: a gradient that is zero is zero here, and equal pixels have no orientation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, normalize, pad

CHUNK = 2**18
"""Pixel values that are worked on at a time on a CPU, so that intermediate results stay in its cache."""


@torch.no_grad()
def hog(
    images: Tensor, *, bins: int = 9, cell_size: int = 8, gaussian_window: int = 0, flat_threshold: float = 0.0
) -> Tensor:
    """images (B, C, H, W), in any scale -> (B, C, bins, H / cell_size, W / cell_size) float32, unit vectors of bins.

    Per channel: Sobel gradients with reflected borders; each pixel adds its magnitude to one of the `bins` unsigned
    orientations of its cell, bin = floor(atan2(gx, gy) / pi * bins) mod bins, so that bin 0 begins at a gradient that
    points straight down. A flat cell is zero.

    Args:
        gaussian_window: side of square windows that tile the image and in which a Gaussian weighs the magnitudes, as in
            mmpretrain; 0 for none.
        flat_threshold: gradients up to this size count as zero.

    Raises:
        ValueError: if the image is not a whole number of cells and windows.
    """
    for name, side in (("cell_size", cell_size), ("gaussian_window", gaussian_window)):
        require_whole(images.shape[-2:], name, side)
    images = images.float()
    window = None
    if gaussian_window:
        window = tiled_window(gaussian_window, images.shape[-2:]).to(images.device)
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        histogram = histogram_by_bins(*orientations(images, bins, flat_threshold, window), bins, cell_size)
    else:
        chunks = images.split(max(1, CHUNK // images[0].numel()))
        histogram = torch.cat(
            [
                histogram_by_scatter(*orientations(chunk, bins, flat_threshold, window), bins, cell_size)
                for chunk in chunks
            ]
        )
    return normalize(histogram, dim=2)


def orientations(images: Tensor, bins: int, flat_threshold: float, window: Tensor | None) -> tuple[Tensor, Tensor]:
    """images (B, C, H, W) float32 -> magnitude and bin number 0 ... bins (int64), both (B, C, H, W); `bins` means 0.

    Differences come before weights, so that equal pixels give exact zeros. Both signs of a gradient have one bin,
    therefore the angle of its line is enough: pi / 2 - atan(gy / gx), a fraction of the cost of atan2.
    """
    padded = pad(images, (1, 1, 1, 1), mode="reflect")
    step_x = padded[..., :-2] - padded[..., 2:]
    step_y = padded[..., :-2, :] - padded[..., 2:, :]
    gx = torch.add(step_x[..., :-2, :], step_x[..., 1:-1, :], alpha=2).add_(step_x[..., 2:, :])
    gy = torch.add(step_y[..., :-2], step_y[..., 1:-1], alpha=2).add_(step_y[..., 2:])
    if flat_threshold:
        gx, gy = hardshrink(gx, flat_threshold), hardshrink(gy, flat_threshold)
    magnitude = (gx * gx).addcmul_(gy, gy).sqrt_()
    if window is not None:
        magnitude.mul_(window)
    angle = torch.atan(gy.div_(gx)).mul_(-bins / math.pi).add_(bins / 2)
    return magnitude, angle.nan_to_num_(0.0).to(torch.int64)  # 0 / 0: no gradient, hence no weight in bin 0


def histogram_by_scatter(magnitude: Tensor, index: Tensor, bins: int, cell_size: int) -> Tensor:
    """magnitude and index (B, C, H, W) -> (B, C, bins, rows, columns): pixels go to their cells one by one, for CPUs.

    `index` is changed.
    """
    batch, chans, height, width = magnitude.shape
    rows, columns, slots = height // cell_size, width // cell_size, bins + 1
    index += torch.arange(width) // cell_size * slots
    lines = (batch * chans * rows, cell_size * width)
    histogram = magnitude.new_zeros(lines[0], columns * slots)
    histogram.scatter_add_(1, index.reshape(lines), magnitude.reshape(lines))
    histogram = histogram.reshape(batch, chans, rows, columns, slots)
    histogram[..., 0] += histogram[..., bins]
    return histogram[..., :bins].permute(0, 1, 4, 2, 3)


def histogram_by_bins(magnitude: Tensor, index: Tensor, bins: int, cell_size: int) -> Tensor:
    """The same, one bin after the other over the whole batch: without atomic additions, whose order changes the sums.

    `torch.compile` makes one pass of it.
    """
    batch, chans, height, width = magnitude.shape
    shape = (batch, chans, height // cell_size, cell_size, width // cell_size, cell_size)
    index = index.where(index < bins, 0)
    sums = [(magnitude * (index == bin_number)).reshape(shape).sum((3, 5)) for bin_number in range(bins)]
    return torch.stack(sums, dim=2)


def gaussian_kernel(size: int) -> Tensor:
    """(size, size) of sum 1, with standard deviation size // 2 (mmpretrain, `HOGGenerator.get_gaussian_kernel`)."""
    distance = torch.arange(size) - (size - 1) / 2
    line = (-0.5 * (distance / max(1, size // 2)) ** 2).exp()
    kernel = line[:, None] * line
    return kernel / kernel.sum()


def tiled_window(size: int, img_size: tuple[int, ...]) -> Tensor:
    """(H, W): the kernel, side by side."""
    return gaussian_kernel(size).repeat(*(side // size for side in img_size))


def require_whole(img_size: tuple[int, ...], name: str, side: int) -> None:
    height, width = img_size
    if side and (height % side or width % side):
        raise ValueError(f"image size {height}x{width} is not a multiple of {name} {side}")


def glyphs(bins: int, size: int) -> Tensor:
    """(bins, size, size) in [0, 1]: for each bin a line along the edge, across the middle of its gradients."""
    angle = (torch.arange(bins) + 0.5) * (math.pi / bins)
    x = torch.arange(size) - (size - 1) / 2
    distance = x[None, None, :] * angle.sin()[:, None, None] + x[None, :, None] * angle.cos()[:, None, None]
    inside = (x[None, :] ** 2 + x[:, None] ** 2).sqrt() <= size / 2
    return (1.25 - distance.abs()).clamp(0, 1) * inside
