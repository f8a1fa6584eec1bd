"""The same few images, masked and reconstructed, again and again during a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image

from mim_framework.assembly.preflight import make_step
from mim_framework.contract.components import Objective, Source
from mim_framework.data.loader import evaluation_batches
from mim_framework.evaluate.pictures import reconstruction_picture
from mim_framework.evaluate.reconstruct import reconstruct

if TYPE_CHECKING:
    from mim_framework.train.run import Run


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
