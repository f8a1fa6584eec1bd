"""Images per second of our loader against torchvision's ImageFolder with the official MAE transform, on the same JPEGs.

    python benchmarks/loader.py --workers 2 --batch-size 64

Both sides decode the same files to normalised float32 batches of 224x224, with the same number of worker processes and
the same batch size; our side includes the normalisation that it leaves to the device, here the CPU. Rounds of the two
alternate; the figures are medians over the rounds. The JPEGs (quality 90) are synthetic: smooth noise at several
scales, edges and sensor noise, so that they compress about as photographs do.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageDraw
from torchvision import transforms

from mim_framework.base.section import Choice
from mim_framework.data.loader import DataSection, Loader
from mim_framework.data.order import BatchLayout
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.views import ImageViews


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture with the rough statistics of a photograph: more contrast at coarse scales, edges, and some noise."""
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, contrast in ((4, 60), (16, 30), (64, 14), (256, 7)):
        rows, columns = cells * height // width + 2, cells + 2
        for channel in range(3):
            noise = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
            pixels[..., channel] += contrast * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    pixels += 3 * rng.standard_normal((height, width, 1), np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, width), rng.integers(0, height)
        size = int(rng.integers(width // 20, width // 4))
        draw.ellipse((x, y, x + size, y + size // 2), outline=tuple(rng.integers(0, 255, 3).tolist()), width=3)
    return image


def write_photos(folder: Path, count: int, distinct: int, width: int, height: int) -> int:
    """Write `count` JPEGs of which `distinct` differ, in one class folder as ImageFolder wants it; bytes of one."""
    (folder / "class").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(distinct):
        photo(rng, width, height).save(folder / "class" / f"{i:05}.jpg", quality=90)
    for i in range(distinct, count):
        (folder / "class" / f"{i:05}.jpg").write_bytes((folder / "class" / f"{i % distinct:05}.jpg").read_bytes())
    return (folder / "class" / "00000.jpg").stat().st_size


def ours(folder: Path, args: argparse.Namespace) -> Callable[[], int]:
    """One pass over the folder with our loader; returns the number of images."""
    views = ImageViews(ImageViews.Config(decoder=args.decoder, scaled_decode=not args.full_decode))
    source = FolderSource(FolderSource.Config(root=str(folder)))
    section = DataSection(source=Choice(type="folder"), workers=args.workers)
    layout = BatchLayout(total_batch_size=args.batch_size, batch_size=args.batch_size)

    def epoch() -> int:
        loader = Loader(
            section,
            source,
            views,
            seed=0,
            layout=layout,
            start_step=0,
            total_steps=len(source) // args.batch_size,
            device=torch.device("cpu"),
        )
        return sum(len(views.prepare(None, batch.views)["x"]) for batch in loader)

    return epoch


def official(folder: Path, args: argparse.Namespace) -> Callable[[], int]:
    """One pass with torchvision's loader and the transform of the official MAE pre-training."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    dataset = torchvision.datasets.ImageFolder(str(folder), transform=transform)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True
    )
    return lambda: sum(len(images) for images, _ in loader)


def measure(epoch: Callable[[], int]) -> tuple[float, float]:
    """Images per second, and milliseconds of processor time per image over all processes.

    The second figure says what the work costs where other programs disturb the first.
    """
    start, cpu_start = time.perf_counter(), cpu_seconds()
    count = epoch()
    gc.collect()  # ends workers that are still there, whose time counts only then
    return count / (time.perf_counter() - start), 1e3 * (cpu_seconds() - cpu_start) / count


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=["500x375:2048", "4000x3000:128"], metavar="WxH:COUNT")
    parser.add_argument("--distinct", type=int, default=16, help="different pictures per size; the rest are copies")
    parser.add_argument("--decoder", choices=["auto", "pillow", "torchcodec"], default="auto")
    parser.add_argument("--full-decode", action="store_true", help="our side without scaled decoding")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}; {vars(args)}")
    for spec in args.sizes:
        size, count = spec.split(":")
        width, height = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            num_bytes = write_photos(Path(folder), int(count), args.distinct, width, height)
            sides = {"ours": ours(Path(folder), args), "official": official(Path(folder), args)}
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for _ in range(args.rounds):
                for name, epoch in sides.items():
                    measured[name].append(measure(epoch))
        print(f"{size} ({num_bytes / 1e3:.0f} kB)")
        for name, rounds in measured.items():
            rate, cost = (statistics.median(values) for values in zip(*rounds, strict=True))
            print(f"    {name:8} {rate:7.1f} images/s, {cost:6.2f} ms of processor time per image")
        pairs = list(zip(measured["ours"], measured["official"], strict=True))
        faster, cheaper = [a[0] / b[0] for a, b in pairs], [b[1] / a[1] for a, b in pairs]
        print(
            f"    {statistics.median(faster):.2f} times the images/s (rounds: {', '.join(f'{r:.2f}' for r in faster)})"
        )
        print(f"    1/{statistics.median(cheaper):.2f} of the processor time")


if __name__ == "__main__":
    main()
