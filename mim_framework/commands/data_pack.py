"""`mim data pack`: images of any source into tar shards. Start at `run_pack`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mim_framework.base.errors import RecipeError
from mim_framework.base.section import Choice
from mim_framework.commands.data_scan import open_source
from mim_framework.data.loader import DataSection, told_causes
from mim_framework.data.pack import CLASSES, SUMMARY, Packing, pack
from mim_framework.registry.registry import Registry

SHOWN = 5
"""So many unreadable images are named on the terminal; all are in `pack.json`."""


def run_pack(
    text: str,
    output: Path,
    registry: Registry,
    *,
    per_shard: int = 2000,
    order: str = "kept",
    seed: int = 0,
    resize_short: int | None = None,
    quality: int = 90,
    labels: bool = False,
    part: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, str], object] = lambda done, total, text: None,
    report: Callable[[str], object] = print,
) -> list[str]:
    """Pack images; see `data.pack.pack`. The lines for a person.

    Args:
        text: a source, as `mim data scan` takes it.
        order: "kept" or "shuffled".
        part: "I/N", counted from 0.
        workers: processes that read; by default as many as a run would have.

    Raises:
        RecipeError: if there is no such source or part.
        DataError: if the images cannot be read.
        MimError: if the shards cannot be written.
    """
    of_all = part_of(part)
    source, name = open_source(text, registry, labels=labels)
    if left_out := source.left_out():
        report(f"no images, and left out: {', '.join(left_out)}")
    if workers is None:
        workers = DataSection(source=Choice(type=source.name)).num_workers
    packing = Packing(per_shard, order == "shuffled", seed, resize_short, quality)
    found = pack(source, output, packing, part=of_all, workers=workers, progress=progress)
    if found is None:
        return [f"part {part} of {name} is in {output}; {SUMMARY} is written when all parts are"]
    return [f"{name}: {found['images']:,} of {len(source):,} images", *_told(found, output, source.classes is not None)]


def part_of(text: str | None) -> tuple[int, int]:
    """
    Raises:
        RecipeError: if it is no part.
    """
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise RecipeError(f"--shard {text}: give I/N with I from 0 to N - 1, such as 0/4 on the first of four machines")
    return int(match[1]), int(match[2])


def _told(found: dict[str, Any], output: Path, labelled: bool) -> Iterator[str]:
    if found["kept_larger"]:
        yield f"{found['kept_larger']:,} larger images stay as they are: deep, transparent, or not of 1 or 3 channels"
    if broken := found["unreadable"]:
        causes = told_causes(Counter(each["cause"] for each in broken))
        named = ", ".join(each["name"] for each in broken[:SHOWN])
        more = f" and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
        yield f"left out, as they cannot be read: {len(broken):,} ({causes}): {named}{more}"
    classes = f", classes: {output / CLASSES}" if labelled else ""
    size = sum(each["bytes"] for each in found["shards"].values())
    yield f"{len(found['shards']):,} shards, {size:,} bytes, listed in {output / SUMMARY}{classes}"
