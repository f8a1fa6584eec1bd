"""Pictures of what a model makes of hidden patches: of a fixed set during a run, of any image after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from mim_framework.base.errors import DataError, MimError
from mim_framework.build import load_run, make_step
from mim_framework.contract.components import Objective, Source, Target, ViewBuilder
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Pred, Sample
from mim_framework.contract.step import Step
from mim_framework.data.loader import evaluation_batches
from mim_framework.evaluate import evaluation_mode
from mim_framework.objective import MaskedPrediction
from mim_framework.report import mask_image, reconstruction_picture

if TYPE_CHECKING:
    from mim_framework.plugins import Registry
    from mim_framework.run import Run

Row = tuple[Tensor, Tensor, Tensor]
"""Input, masked and reconstructed image, each (C, H, W) in [0, 1] on the CPU."""


def reconstruct(objective: Objective, views: ViewBuilder, step: Step, batch: dict[str, Tensor]) -> list[Row] | None:
    """What the first head with a picture makes of a batch; None if there is none, or no one mask of each image.

    Args:
        step: gives the masks; `step.positions` has one entry per image.
        batch: evaluation views before `prepare`, on the device.
    """
    if not isinstance(objective, MaskedPrediction):
        return None  # an order of its own, with parts that we do not know
    if not set(objective.masker.spec.views) <= batch.keys():
        return None  # the evaluation view is "x" alone
    with evaluation_mode(objective):
        masked = objective.masker(step, views.prepare(step, batch))
        mask, clean = masked.masks["x"], masked.clean("x")
        if len(mask.hidden) != len(clean):
            return None  # several masks of an image
        latent = objective.encode(masked.views["x"], mask)
        for head in objective.heads.values():
            pred = head.decoder(latent, mask)
            picture = _picture(head.target, pred, mask, clean, views) if isinstance(pred, Pred) else None
            if picture is not None:
                break
        else:
            return None
        images, reconstructed = views.to_image(clean.float()).cpu(), picture.cpu()
    factor = reconstructed.shape[-1] // images.shape[-1]  # of a drawing
    images = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    hidden = mask.hidden.cpu()
    return [
        (image, mask_image(image, row, mask.grid), result)
        for image, row, result in zip(images, hidden, reconstructed, strict=True)
    ]


def _picture(target: Target, pred: Pred, mask: Mask, clean: Tensor, views: ViewBuilder) -> Tensor | None:
    """What a prediction looks like, in [0, 1], if it is an image or can be drawn."""
    image = target.reconstruct(pred, mask, clean)
    return target.draw(pred, mask, clean) if image is None else views.to_image(image.float())


def draw_fixed(objective: Objective, run: Run, source: Source) -> Image.Image | None:
    """A picture of the same images under the same masks whenever it is drawn; None if the method has no picture.

    The images are `log.num_images` ones, evenly spaced over the source, without the broken ones among them.
    """
    count = min(run.recipe.log.num_images, len(source))
    indices = [i * len(source) // count for i in range(count)]
    batch, _ = next(evaluation_batches(source, run.model.views, max(1, count), indices=indices), ({}, None))
    if not batch:
        return None
    on_device = {name: view.to(run.device) for name, view in batch.items()}
    positions = torch.arange(len(on_device["x"]), device=run.device)
    step = make_step(run.recipe, positions, teachers=run.model.teachers.session())
    rows = reconstruct(objective, run.model.views, step, on_device)
    return None if rows is None else reconstruction_picture(rows)


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
        rows = reconstruct(run.objective, run.views, step, {"x": view[None].to(run.device)})
        if rows is None:
            heads = getattr(run.objective, "heads", {})
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
