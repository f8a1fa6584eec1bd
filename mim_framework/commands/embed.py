"""`mim embed`: features of all images of a folder or source, by any encoder, in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mim_framework.base.errors import RecipeError
from mim_framework.base.section import Choice
from mim_framework.contract.components import Source
from mim_framework.contract.evaluation import Pool
from mim_framework.data.loader import DataSection
from mim_framework.features.embedding import Embedded, embed
from mim_framework.features.encoder import FrozenEncoder
from mim_framework.features.subjects import open_encoder
from mim_framework.recipe.draft import parse_override
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

EACH = "each"
"""All blocks, in place of their numbers."""


def run_embed(
    subject: str,
    images: str | None,
    options: Sequence[str],
    output: Path,
    registry: Registry,
    *,
    pool: Pool = "mean",
    layers: str = "",
    dtype: str = "float32",
    precision: str = "float32",
    device: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    report: Callable[[str], object] = print,
) -> Embedded:
    """Write features; see `features.embedding.embed`.

    Args:
        subject: see `open_encoder`.
        images: a folder, a URL or the name of a source; by default the images of the subject's run.
        options: "KEY=VALUE" of the source.
        layers: numbers of blocks, separated by commas, or `each`.
        precision: of the forward pass, float32, float16 or bfloat16.
        workers: processes that read images; by default as many as a run would have.

    Raises:
        RecipeError: if the subject, the source, an option or a block is none.
        DataError: if images cannot be read.
        MimError: if the file cannot be written.
    """
    opened = open_encoder(subject, device=device, registry=registry)
    import torch

    encoder = FrozenEncoder(opened, dtype=getattr(torch, precision))
    source = source_of(images, options, opened.recipe, subject, registry)
    if left_out := source.left_out():
        report(f"no images, and left out: {', '.join(left_out)}")
    if workers is None:
        workers = DataSection(source=Choice(type=source.name)).num_workers
    try:
        return embed(
            encoder, source, output, pool=pool, layers=blocks_of(layers, encoder.spec.depth), dtype=dtype,
            batch_size=batch_size, workers=workers, report=report,
        )  # fmt: skip
    except ValueError as error:
        raise RecipeError(f"{subject}: {error}") from error


def blocks_of(layers: str, depth: int) -> list[int]:
    """
    Raises:
        RecipeError: if these are no numbers.
    """
    if layers == EACH:
        return list(range(depth))
    try:
        return [int(each) for each in layers.split(",") if layers]
    except ValueError:
        raise RecipeError(f"--layers {layers}: give numbers of blocks such as 5,11 or -1, or {EACH}") from None


def source_of(
    images: str | None, options: Sequence[str], recipe: Recipe | None, subject: str, registry: Registry
) -> Source:
    """
    Raises:
        RecipeError: if there is no such source or option, or nothing says where images are.
        DataError: if it cannot be read.
    """
    if images is None and recipe is None:
        raise RecipeError(f"{subject} has no images of its own; name a folder, or a source such as digits")
    changes = {key.removeprefix("data.source."): value for key, value in map(parse_override, options)}
    if images is None:
        assert recipe is not None
        data = {"type": recipe.data.source.type, **recipe.data.source.options}
    elif images in registry.classes("source"):
        data = {"type": images}
    else:
        data = {"type": "folder", "root": images}
    cls, config = registry.resolve("source", Choice.model_validate({**data, **changes}))
    return cls(config)
