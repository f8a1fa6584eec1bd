"""The same few images, masked and reconstructed, again and again during a run."""

from __future__ import annotations

import torch
from PIL import Image

from mim_framework.contract.components import Source
from mim_framework.data.loader import evaluation_batches
from mim_framework.evaluate.pictures import reconstruction_picture
from mim_framework.evaluate.reconstruct import reconstruct
from mim_framework.training.run import Run


def draw_fixed(run: Run, source: Source) -> Image.Image | None:
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
    step = run.engine.step(seed=run.recipe.seed, positions=positions)
    rows = reconstruct(run.model.objective, run.model.views, step, on_device)
    return None if rows is None else reconstruction_picture(rows)
