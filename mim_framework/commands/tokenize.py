"""`mim tokenize`: the token ids of all fixed views of a recipe's images, computed once and stored."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mim_framework.assembly.builder import Model, build_model, build_source, decides_pixels
from mim_framework.base.errors import BrokenImage, DataError, RecipeError
from mim_framework.base.precision import uses_bfloat16
from mim_framework.contract.components import Source, Target
from mim_framework.contract.records import Masked
from mim_framework.data.companions import BROKEN_IMAGES, TokenFacts, TokenWriter
from mim_framework.data.loader import TOLERATED_BROKEN, told_causes
from mim_framework.data.prefetch import prefetch
from mim_framework.data.reader import Broken, TrainingReader, read_each
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import choose_device
from mim_framework.runtime.sharding import compile_blocks
from mim_framework.runtime.step import StepEngine

BATCH_SIZE = 64
"""Images per forward pass where the recipe has no `train.batch_size`."""
REPORT_SECONDS = 10.0


def tokenize(
    recipe: Recipe, registry: Registry, output: Path, *, report: Callable[[str], None] = lambda text: None
) -> TokenFacts:
    """Write the folder of token ids that the recipe then takes as `data.tokens`.

    An interrupted call goes on where it stopped. Images that cannot be read are counted and listed, as they are in
    training, and left out; a further call asks for them again.

    Args:
        report: told how far it is, now and then.

    Raises:
        RecipeError: if the recipe has no fixed views or no target of token ids.
        DataError: if the source has no images, the folder cannot be written, more images are broken than
            `data.max_broken` allows or a store does not answer; what was computed is kept.
    """
    if recipe.data.views_per_image is None:
        text = "missing; stored ids need fixed views of every image, for example data.views_per_image=10"
        raise RecipeError(f"{recipe.location('data.views_per_image')}: {text}")
    source = build_source(recipe, registry)
    if len(source) == 0:
        raise DataError(f"data.source '{recipe.data.source.type}' has no images")
    device = choose_device(recipe.train.device)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokens": None}), "init": None})
    model = build_model(recipe, registry, source=source).to(device)
    target = _target_of_ids(recipe, model)
    if recipe.train.compile:
        compile_blocks(model.teachers.repeated_blocks())
    engine = model.engine(device, bfloat16=uses_bfloat16(recipe.train.precision, device))
    facts = TokenFacts(
        num_images=len(source),
        views_per_image=recipe.data.views_per_image,
        grid=target.spec.grid.shape,
        num_classes=target.spec.dim,
        seed=recipe.seed,
        views_of=decides_pixels(recipe),
        tokenizer=recipe.tokenizer or "",
        precision="bfloat16" if engine.bfloat16 else "float32",
        source=source.identity(),
    )
    writer = TokenWriter(output, facts)
    batch_size = recipe.train.batch_size or min(BATCH_SIZE, recipe.train.total_batch_size)
    started = last = time.monotonic()
    done = 0
    requests = writer.missing(batch_size)
    total = sum(len(indices) for _, indices in requests)
    losses = Losses(output, recipe.data.max_broken)
    try:
        for read in _read(recipe, source, model, requests):
            if read.batch is not None:
                on_device = {name: view.to(device, non_blocking=True) for name, view in read.batch.items()}
                writer.put(read.indices, read.number, _ids(engine, target, recipe.seed, on_device))
            losses.add(read)
            done += len(read.indices) + len(read.broken)
            now = time.monotonic()
            if now - last > REPORT_SECONDS:
                last = now
                report(f"{done:,} of {total:,} views, {done / (now - started):,.0f} a second")
    except BaseException:
        writer.mark()
        raise
    if losses.images:
        report(f"{losses}; the same command asks for them again")
    return writer.finish()


@dataclass
class ReadViews:
    """One fixed view of some samples: those that could be used, with their indices, and those that could not."""

    number: int
    indices: list[int]
    batch: dict[str, Tensor] | None
    broken: list[Broken]
    error: DataError | None = None


class Losses:
    """Images without ids, listed in the folder of them; too many are an error."""

    def __init__(self, folder: Path, allowed: float) -> None:
        self.file, self.allowed = folder / BROKEN_IMAGES, allowed
        self.images: dict[int, Broken] = {}
        self.num_broken = self.num_read = 0
        self.file.unlink(missing_ok=True)  # whatever is missing is asked for again

    def add(self, read: ReadViews) -> None:
        """
        Raises:
            DataError: above `data.max_broken`, or if the reader gave up.
        """
        self.num_read += len(read.indices) + len(read.broken)
        self.num_broken += len(read.broken)
        new = {each.index: each for each in read.broken if each.index not in self.images}
        self.images |= new
        if new:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(each)) + "\n" for each in new.values())
        if read.error is not None:
            raise read.error
        within = len(self.images) <= TOLERATED_BROKEN or self.num_broken <= self.allowed * self.num_read
        if read.broken and not within:
            raise DataError(
                f"{self}, more than data.max_broken={self.allowed:g} allows. What was computed is kept: bring the "
                "images back or raise data.max_broken, and call mim tokenize again"
            )

    def __str__(self) -> str:
        causes = told_causes(Counter(each.cause for each in self.images.values()))
        return f"{len(self.images)} images could not be read ({causes}), listed in {self.file}"


@torch.no_grad()
def _ids(engine: StepEngine, target: Target, seed: int, batch: dict[str, Tensor]) -> Tensor:
    """(B, N) of a batch before `prepare`."""
    size = len(next(iter(batch.values())))
    step = engine.step(seed=seed, positions=torch.arange(size, device=engine.device))
    return target(step, Masked({}, engine.prepare(step, batch)))


def _target_of_ids(recipe: Recipe, model: Model) -> Target:
    heads = model.objective.heads
    targets = [head.target for head in heads.values() if head.target.spec.kind == "ids"]
    if len(targets) != 1:
        found = ", ".join(f"'{head.target.name}'" for head in heads.values()) or "none"
        text = f"mim tokenize needs a recipe with one target of token ids, its targets are {found}"
        raise RecipeError(f"{recipe.location('target')}: {text}")
    return targets[0]


class _Reader:
    """Reads one fixed view of some samples per call, in a worker."""

    def __init__(self, reader: TrainingReader) -> None:
        self.reader = reader

    def __getitem__(self, request: tuple[int, list[int]]) -> ReadViews:
        number, indices = request
        read = ReadViews(number, [], None, [])
        samples = []
        try:
            for index, sample in zip(indices, read_each(self.reader.source, indices), strict=True):
                try:
                    samples.append(self.reader.fixed_view(sample, index, number))
                    read.indices.append(index)
                except BrokenImage as error:
                    place = number * len(self.reader.source) + index
                    read.broken.append(Broken.of(place, index, error))
        except DataError as error:  # raised in a worker, its text would be one of a traceback
            read.error = error
        read.batch = self.reader.collate(samples) if samples else None
        return read


def _read(recipe: Recipe, source: Source, model: Model, requests: list[tuple[int, list[int]]]) -> Iterator[ReadViews]:
    reader = TrainingReader(source, model.views, recipe.seed, recipe.data.views_per_image)
    return prefetch(
        _Reader(reader),
        requests,
        workers=recipe.data.num_workers,
        remote=source.remote,
        prefetch_factor=recipe.data.prefetch_factor,
        pin_memory=torch.cuda.is_available(),
    )
