"""HOG targets of a batch of images: ours beside the operator as its definition is usually written down in torch.

    python benchmarks/hog.py                               # 256 images of 224 pixels on the CPU
    python benchmarks/hog.py --device cuda --compile

Both sides take turns; medians are compared. The baseline takes the steps of SlowFast's `HOGLayerC` in our own words:
two depthwise convolutions, the norm, `atan2`, a scatter into one plane per bin of the size of the image, a sum over the
cells. Its values are checked against ours before anything is measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from mim_plugin_maskfeat.hog import hog
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, normalize, pad

BINS, CELL_SIZE, IMG_SIZE = 9, 8, 224


@torch.no_grad()
def step_by_step(images: Tensor) -> Tensor:
    """images (B, C, H, W) -> (B, C, bins, H / 8, W / 8)."""
    batch, chans, height, width = images.shape
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=images.device)
    padded = pad(images, (1, 1, 1, 1), mode="reflect")
    gx, gy = (conv2d(padded, kernel.expand(chans, 1, 3, 3), groups=chans) for kernel in (sobel, sobel.t()))
    magnitude = torch.stack([gx, gy]).norm(dim=0)
    bins = (torch.atan2(gx, gy) / math.pi * BINS).floor().long() % BINS
    planes = torch.zeros(batch, chans, BINS, height, width, device=images.device)
    planes.scatter_(2, bins[:, :, None], magnitude[:, :, None])
    cells = avg_pool2d(planes.flatten(1, 2), CELL_SIZE) * CELL_SIZE**2
    return normalize(cells.unflatten(1, (chans, BINS)), dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of each side")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU threads of torch; by default all")
    parser.add_argument("--compile", action="store_true", help="compile our side")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, IMG_SIZE, IMG_SIZE, device=args.device)
    ours = torch.compile(hog) if args.compile else hog
    sides: dict[str, Callable[[Tensor], Tensor]] = {"step by step": step_by_step, "ours": ours}

    few = images[:4]
    differing = (step_by_step(few) - ours(few)).abs().amax(2) > 1e-4  # a pixel at the edge of a bin may change sides
    if differing.float().mean() > 1e-3:
        raise SystemExit(f"the two sides disagree in {differing.sum()} of {differing.numel()} cells")

    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side(images)
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            measured[name].append(1000 * (time.perf_counter() - start) / args.batch_size)

    cuda = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if cuda else f"{torch.get_num_threads()} threads"
    print(f"HOG, {IMG_SIZE} px, batch {args.batch_size}, {args.device} ({device}), torch {torch.__version__}")
    medians = {name: statistics.median(values[1:]) for name, values in measured.items()}
    for name, values in measured.items():
        print(f"{name:13} {medians[name]:8.3f} ms/image   ({min(values[1:]):.3f} to {max(values[1:]):.3f})")
    print(f"{medians['step by step'] / medians['ours']:.1f} times")


if __name__ == "__main__":
    main()
