"""kNN on frozen features beside the plain product and top-k that it cannot do without.

    python benchmarks/knn.py                                # 50,000 x 10,000 features of 768, k = 20, CPU
    python benchmarks/knn.py --device cuda

Both sides take turns; printed are medians in seconds, and their ratio. On a CPU these are seconds of processor time,
which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mim_framework.evaluate.knn import knn_predict

K, NUM_CLASSES = 20, 1000


def features(num_train: int, num_test: int, dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normal features to learn from and to be classified, and classes of the first."""
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, dim, generator=generator).to(device) for n in (num_train, num_test))
    return train, torch.randint(NUM_CLASSES, (num_train,), generator=generator).to(device), test


def ours(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> Tensor:
    """(m,) classes."""
    return knn_predict(train_x, train_y, test_x, k=K, temperature=0.07, num_classes=NUM_CLASSES)


def plain(train_x: Tensor, test_x: Tensor, chunk: int) -> Tensor:
    """(m, k) neighbours of features that are normalised already, without any vote."""
    bank = train_x.t()
    return torch.cat([(part @ bank).topk(K).indices for part in test_x.split(chunk)])


def seconds(function: Callable[[], Tensor], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    function().cpu()  # waits for the device
    return clock() - start


def measure(num_train: int, num_test: int, dim: int, *, device: str, repeats: int, chunk: int) -> tuple[float, float]:
    """Median seconds of our classification and of the plain product and top-k."""
    train_x, train_y, test_x = features(num_train, num_test, dim, device)
    normal_train, normal_test = normalize(train_x), normalize(test_x)
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        both = (
            seconds(lambda: ours(train_x, train_y, test_x), device),
            seconds(lambda: plain(normal_train, normal_test, chunk), device),
        )
        for found, each in zip(times, both, strict=True):
            found += [each] * (repeat > 0)  # the first turn warms up
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=1000, help="test images at once on the plain side")
    options = parser.parse_args()
    mine, theirs = measure(
        options.train, options.test, options.dim,
        device=options.device, repeats=options.repeats, chunk=options.chunk,
    )  # fmt: skip
    print(f"knn_predict {mine:.3f} s, product and top-k {theirs:.3f} s, ratio {mine / theirs:.3f}")


if __name__ == "__main__":
    main()
