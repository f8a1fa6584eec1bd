"""Features of all images of a source into a file. Start at `embed`; `stored` writes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_framework.base.errors import DataError
from mim_framework.base.text import plain_logger
from mim_framework.contract.components import Source
from mim_framework.contract.evaluation import Pool, check_features
from mim_framework.data.loader import evaluation_reads, told_causes
from mim_framework.data.reader import Broken, EvaluationRead
from mim_framework.evaluate.base import tokens_of
from mim_framework.features.encoder import FrozenEncoder
from mim_framework.features.stored import Rows, writer_for

logger = plain_logger(__name__)

SHOWN = 5
"""So many broken images are named when a file is done; all are in its metadata."""
SECONDS_BETWEEN_REPORTS = 30.0


@dataclass(frozen=True)
class Embedded:
    """What became of the images of a source."""

    output: Path
    num_images: int
    """Whose features are in the file."""
    shape: tuple[int, ...]
    """Of the features of one image: (D,), or (N, D) of tokens."""
    dtype: str
    broken: list[Broken]
    """Images that could not be used and are not in the file."""
    seconds: float
    """From the first image read to the last one passed."""

    def lines(self) -> Iterator[str]:
        """What a person should know."""
        shape = "x".join(map(str, self.shape))
        yield f"{self.num_images:,} images x {shape} {self.dtype}, {self.num_images / self.seconds:.1f} images/s"
        if self.broken:
            causes = told_causes(Counter(each.cause for each in self.broken))
            named = ", ".join(each.name for each in self.broken[:SHOWN])
            more = f" and {len(self.broken) - SHOWN:,} more" if len(self.broken) > SHOWN else ""
            yield f"left out, as they cannot be used: {len(self.broken):,} images ({causes}): {named}{more}"
        yield f"written: {self.output}"


def embed(
    encoder: FrozenEncoder,
    source: Source,
    output: Path,
    *,
    pool: Pool = "mean",
    layers: Sequence[int] = (),
    dtype: str = "float32",
    batch_size: int = 64,
    workers: int = 0,
    report: Callable[[str], object] = logger.info,
) -> Embedded:
    """Write the features of all images of a source, in its order, with names, labels and where they come from.

    The file appears whole or not at all. Images that cannot be used are left out, counted, and listed in the metadata.

    Args:
        output: `.parquet`, `.npz` or `.safetensors`.
        pool, layers: as of a `FrozenEncoder`.
        dtype: in which the features are stored, float32 or float16.
        workers: processes that read images.
        report: is told now and then how far it is.

    Raises:
        ValueError: if the encoder has no such features.
        DataError: if no image can be used, the source cannot be read any more, or features do not fit into the dtype.
        MimError: if the file cannot be written.
    """
    check_features(encoder.spec, pool, layers)
    blocks = [layer % encoder.spec.depth for layer in layers]
    extract = tokens_of(encoder.module, pool, blocks or [None])
    broken: list[Broken] = []
    started = told = time.monotonic()
    with writer_for(output, len(source), dtype) as writer:
        reads = evaluation_reads(
            source, encoder.transform.views, batch_size, workers=workers, pin_memory=encoder.device.type == "cuda"
        )
        for rows in _rows(encoder, reads, extract, broken, dtype):
            writer.add(rows)
            if time.monotonic() - told > SECONDS_BETWEEN_REPORTS:
                told = time.monotonic()
                report(
                    f"{writer.num_rows:,} of {len(source):,} images, {writer.num_rows / (told - started):.1f} a second"
                )
        seconds = time.monotonic() - started
        if not writer.num_rows:
            raise DataError(_none_usable(source, broken))
        writer.finish(_facts(encoder, source, pool, blocks, writer.shape, dtype, writer.num_rows, broken))
    return Embedded(output, writer.num_rows, writer.shape, dtype, broken, seconds)


def _rows(
    encoder: FrozenEncoder,
    reads: Iterator[EvaluationRead],
    extract: Callable[[dict[str, Tensor]], list[Tensor]],
    broken: list[Broken],
    dtype: str,
) -> Iterator[Rows]:
    """A batch is fetched from the device after the next one is on its way, so that the device never waits."""
    underway: tuple[EvaluationRead, Tensor] | None = None
    for read in reads:
        broken += read.broken
        if read.views is None:
            continue
        found = _features(encoder, read.views, extract)
        if underway is not None:
            yield _fetched(*underway, dtype)
        underway = read, found
    if underway is not None:
        yield _fetched(*underway, dtype)


@torch.no_grad()
def _features(encoder: FrozenEncoder, views: dict[str, Tensor], extract: Callable) -> Tensor:
    batch = {name: view.to(encoder.device, non_blocking=True) for name, view in views.items()}
    prepared = encoder.transform.views.prepare(None, batch)
    with encoder.precision():
        features = extract(prepared)
    return torch.cat([each.float() for each in features], dim=-1)


def _fetched(read: EvaluationRead, features: Tensor, dtype: str) -> Rows:
    """
    Raises:
        DataError: if there are features that are no numbers, or too large for the dtype.
    """
    found = features.cpu().numpy()
    stored = found.astype(dtype) if dtype == "float32" else _narrowed(found, dtype)
    wrong = ~np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if wrong.any():
        number = int(wrong.argmax())
        name, values = read.names[number][1], found[number]
        if np.isfinite(values).all():
            largest = np.abs(values).max()
            raise DataError(f"{name}: its features reach {largest:g}, too large for {dtype}; use --dtype float32")
        raise DataError(f"{name}: its features are no finite numbers; look whether the encoder's weights are")
    return Rows(read.names, read.labels.numpy(), stored)


def _narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # looked for by whoever calls
        return values.astype(dtype)


def _none_usable(source: Source, broken: list[Broken]) -> str:
    if not broken:
        return f"source '{source.name}' has no images"
    first = broken[0]
    causes = told_causes(Counter(each.cause for each in broken))
    return f"none of {len(broken):,} images can be used ({causes}). First: {first.name} ({first.detail})"


def _facts(
    encoder: FrozenEncoder,
    source: Source,
    pool: Pool,
    blocks: list[int],
    shape: tuple[int, ...],
    dtype: str,
    num_images: int,
    broken: list[Broken],
) -> dict[str, Any]:
    """Where features come from, as JSON."""
    from mim_framework import __version__

    return {
        **asdict(encoder.origin),
        "weights_sha256": encoder.weights_sha256,
        "pool": pool,
        "layers": blocks,
        "dtype": dtype,
        "shape": list(shape),
        "grid": list(encoder.grid.shape),
        "img_size": list(encoder.img_size),
        "num_images": num_images,
        "source": source.name,
        "classes": None if source.classes is None else list(source.classes),
        "broken": [{"index": each.index, "name": each.name, "cause": each.cause} for each in broken],
        "mim_framework": __version__,
    }
