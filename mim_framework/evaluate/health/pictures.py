"""What an encoder makes of images, as pictures: patch tokens as colours, and where its last block looks."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from mim_framework.contract.evaluation import Subject
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask
from mim_framework.data.loader import evaluation_batches
from mim_framework.evaluate.health.passes import encoded, kept_aside, on_device
from mim_framework.evaluate.pictures import flat, reconstruction_picture
from mim_framework.evaluate.reconstruct import reconstruct


def fixed_batch(subject: Subject, count: int) -> dict[str, Tensor]:
    """The evaluation views of some images kept aside, evenly spaced, on the device; empty if none can be read."""
    source = subject.source(kept_aside(subject))
    count = min(count, len(source))
    indices = [i * len(source) // count for i in range(count)]
    batch, _ = next(evaluation_batches(source, subject.views, max(1, count), indices=indices), ({}, None))
    return on_device(batch, subject)


@torch.no_grad()
def seen(subject: Subject, batch: dict[str, Tensor]) -> Image.Image | None:
    """Images beside their tokens and, of an encoder that hands it out, the attention of its last block.

    None of views that are no images on the encoder's grid.
    """
    spec, view = subject.spec, subject.views.specs.get("x")
    if view is None or view.kind != "image" or spec.views != ("x",) or not batch or not _fits(spec.grid, view.size):
        return None
    blocks = spec.offers.attn and {max(spec.offers.attn)}
    with subject.frozen():
        latent = encoded(subject, batch, Ask(attn=frozenset(blocks)))
        images = subject.views.to_image(subject.views.prepare(None, batch)["x"].float()).cpu()
    order = None if latent.ids is None else latent.ids.argsort(1).cpu()
    columns = [images, _enlarged(token_colours(_in_order(latent.tokens.float().cpu(), order)), spec.grid, view.size)]
    captions = ["input", "tokens"]
    for attention in latent.attn.values():
        looked_at = _in_order(attention_map(attention.float().cpu(), spec.num_prefix_tokens)[..., None], order)
        columns.append(_enlarged(looked_at, spec.grid, view.size))
        captions.append("attention")
    rows = [tuple(flat(_three(image)) for image in row) for row in zip(*columns, strict=True)]
    return reconstruction_picture(rows, captions=captions)


@torch.no_grad()
def reconstructed(subject: Subject, batch: dict[str, Tensor]) -> Image.Image | None:
    """Images, masked images and what the method makes of them; None of one that has no picture."""
    method = subject.method
    if method is None or not batch:
        return None
    step = method.step(torch.arange(len(next(iter(batch.values()))), device=subject.device))
    with subject.frozen():
        rows = reconstruct(method.objective, subject.views, step, batch)
    return None if rows is None else reconstruction_picture(rows)


def token_colours(tokens: Tensor) -> Tensor:
    """tokens (B, N, D) -> (B, N, 3) in [0, 1]: their three principal components as red, green and blue.

    Of all images together, so that one colour means one thing; components end at the 2nd and 98th percentile.
    """
    flat_tokens = tokens.double().flatten(0, 1)
    flat_tokens = flat_tokens - flat_tokens.mean(0)
    directions = torch.linalg.svd(flat_tokens, full_matrices=False).Vh[:3]
    strongest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    components = flat_tokens @ (directions * strongest.sign()).T
    low, high = (components.quantile(share, dim=0) for share in (0.02, 0.98))
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))
    return colours.float().unflatten(0, tokens.shape[:2])


def attention_map(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """attention (B, heads, T, T) -> (B, N), brightest 1: where the class token looks, else how much is looked at."""
    heads = attention.mean(1)
    row = heads[:, 0] if num_prefix_tokens else heads.mean(1)
    row = row[:, num_prefix_tokens:]
    return row / row.amax(1, keepdim=True).clamp(min=1e-12)


def _fits(grid: Grid, size: tuple[int, ...]) -> bool:
    return len(grid.shape) == len(size) and not any(many % few for many, few in zip(size, grid.shape, strict=True))


def _in_order(rows: Tensor, order: Tensor | None) -> Tensor:
    """rows (B, N, C) in the order of the grid."""
    return rows if order is None else rows.gather(1, order[..., None].expand_as(rows))


def _enlarged(rows: Tensor, grid: Grid, size: tuple[int, ...]) -> Tensor:
    """rows (B, N, C) on the grid -> (B, C, *size)."""
    pixels = rows.transpose(1, 2).unflatten(2, grid.shape)
    for axis, (many, few) in enumerate(zip(size, grid.shape, strict=True), start=2):
        pixels = pixels.repeat_interleave(many // few, dim=axis)
    return pixels


def _three(image: Tensor) -> Tensor:
    """(C, ...) as the three channels of a picture, as `as_picture` chooses them."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, *image.shape[1:])
