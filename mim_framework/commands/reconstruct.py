"""`mim reconstruct`: pictures of what a run makes of the hidden patches of any image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mim_framework.assembly.opened import load_run
from mim_framework.assembly.preflight import make_step
from mim_framework.base.errors import DataError, MimError
from mim_framework.contract.records import Sample
from mim_framework.data.reader import named
from mim_framework.evaluate.pictures import reconstruction_picture
from mim_framework.evaluate.reconstruct import reconstruct

if TYPE_CHECKING:
    from mim_framework.registry.registry import Registry


def reconstruct_run(
    run_dir: Path,
    images: Sequence[Path],
    output: Path | None = None,
    *,
    checkpoint: Path | None = None,
    registry: Registry | None = None,
) -> list[Path]:
    """Write one PNG per image, with the columns input, masked and reconstruction; returns their paths.

    Args:
        output: folder of the pictures; by default `reconstructions` in the run directory.
        checkpoint: by default the newest whole one of the run.

    Raises:
        DataError: naming the image that cannot be read.
        MimError: if the run's method predicts no pixels, or a picture cannot be written.
    """
    run = load_run(run_dir, checkpoint=checkpoint, registry=registry)
    samples = [run.views.evaluation_view(_read(path)) for path in images]
    positions = torch.arange(len(samples), device=run.device)
    output = output or run_dir / "reconstructions"
    written: list[Path] = []
    for path, view, position in zip(images, samples, positions, strict=True):
        step = make_step(run.recipe, position[None], teachers=run.teachers.session())
        batch = {name: one[None].to(run.device) for name, one in named(view).items()}
        rows = reconstruct(run.objective, run.views, step, batch)
        if rows is None:
            heads = run.objective.heads
            targets = ", ".join(f"'{head.target.name}'" for head in heads.values()) or "of its own"
            raise MimError(f"{run_dir} has no picture to show: its target {targets} predicts no pixels of an image")
        target = _unused(output / f"{path.stem}.png", written)
        try:
            output.mkdir(parents=True, exist_ok=True)
            reconstruction_picture(rows).save(target)
        except OSError as error:
            raise MimError(f"cannot write {target}: {error.strerror}") from error
        written.append(target)
    return written


def _read(path: Path) -> Sample:
    try:
        return Sample(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _unused(path: Path, written: list[Path]) -> Path:
    """The path, numbered if this call has written it already (two images of one name from two folders)."""
    number, free = 1, path
    while free in written:
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free
