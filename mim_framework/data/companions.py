"""What travels beside the views of a sample, such as token ids that `mim tokenize` has stored. Start at `Companion`.

A folder of token ids holds `ids.npy` (images, views of each, N), read by memory map, and `tokens.json`, which says what
they are the ids of. A run refuses a folder of other images, other views or another seed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.files import replace_file
from mim_framework.contract.components import Source
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import ViewSpec
from mim_framework.contract.world import World

IDS, FACTS, UNFINISHED = "ids.npy", "tokens.json", "unfinished.json"
FORMAT = 1
VIEW_OF_IDS = "token_ids"


class Companion(Protocol):
    """A tensor beside the views of every sample, in the batch under the name of `spec`.

    Data workers read it after the views; builders of views do not know of it.
    """

    spec: ViewSpec

    def check(self, source: Source, world: World) -> None:
        """Called once before a run, on every rank.

        Raises:
            DataError: if it does not belong to the samples of `source`.
        """

    def __call__(self, sample: Sample, index: int, view: int) -> Tensor:
        """What belongs to the sample at `index` of the source; `view` counts fixed views and is 0 where there are none.

        Raises:
            BrokenImage: if there is nothing for this sample, so that another one takes its place.
        """


def example_of(spec: ViewSpec, batch_size: int) -> Tensor:
    """A made-up batch of a companion: int64 below `num_classes`, of the shape of its spec."""
    noise = rng.uniform(0, f"example {spec.name}", torch.arange(batch_size), prod(spec.shape))
    return (noise * (spec.num_classes or 1)).long().reshape(batch_size, *spec.shape)


@dataclass(frozen=True)
class TokenFacts:
    """Of what the ids are: `views_of` holds the parts of the recipe that decide the pixels, by key."""

    num_images: int
    views_per_image: int
    grid: tuple[int, ...]
    num_classes: int
    seed: int
    views_of: dict[str, Any]
    tokenizer: str
    precision: str
    format: int = FORMAT
    sha256: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_images, self.views_per_image, Grid(self.grid).num_patches

    @property
    def dtype(self) -> np.dtype[Any]:
        """Small enough for the vocabulary, with one value left for images that could not be read."""
        return np.dtype(np.uint16 if self.num_classes < 2**16 else np.uint32)

    @property
    def unread(self) -> int:
        return int(np.iinfo(self.dtype).max)


class TokenWriter:
    """Writes a folder of ids; it counts as whole only after `finish`. What an interrupted writer left is kept.

    Raises:
        DataError: if the folder cannot be written, or holds ids of something else.
    """

    def __init__(self, folder: Path, facts: TokenFacts) -> None:
        self.folder, self.facts = folder, facts
        if (folder / FACTS).exists() or ((folder / IDS).exists() and not self._unfinished()):
            raise DataError(f"{folder} holds token ids already; name another folder, or delete it")
        mode = "r+" if self._unfinished() else "w+"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._ids = np.lib.format.open_memmap(folder / IDS, mode=mode, dtype=facts.dtype, shape=facts.shape)
            if mode == "w+":
                self._ids[:] = facts.unread
                self._ids.flush()
                replace_file(folder / UNFINISHED, _text(facts))
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error.strerror}") from error

    def _unfinished(self) -> bool:
        """Whether the folder was begun with the same facts."""
        file = self.folder / UNFINISHED
        return file.is_file() and file.read_bytes() == _text(self.facts)

    def missing(self, batch_size: int) -> list[tuple[int, list[int]]]:
        """(number of the fixed view, indices of samples) of all that is not written yet, in batches."""
        batches = []
        for view in range(self.facts.views_per_image):
            indices = np.flatnonzero(self._ids[:, view, 0] == self.facts.unread).tolist()
            batches += [(view, indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        return batches

    def put(self, indices: list[int], view: int, ids: Tensor) -> None:
        """ids (B, N) of one fixed view of the samples."""
        self._ids[indices, view] = ids.cpu().numpy().astype(self.facts.dtype)

    def finish(self) -> TokenFacts:
        self._ids.flush()
        facts = replace(self.facts, sha256=_sha256(self.folder / IDS))
        replace_file(self.folder / FACTS, _text(facts))
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return facts


class TokenCache:
    """A folder that `mim tokenize` wrote: the companion of runs with `data.tokens`.

    Raises:
        DataError: if it is none, or is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            stored = json.loads((folder / FACTS).read_text())
            self.facts = TokenFacts(**{**stored, "grid": tuple(stored["grid"])})
            self._ids = np.load(folder / IDS, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(
                f"data.tokens {folder} is no whole folder of token ids; make one: mim tokenize RECIPE --output {folder}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"data.tokens {folder} cannot be read: {error}") from error
        found = (self._ids.shape, self._ids.dtype)
        if found != (self.facts.shape, self.facts.dtype):
            raise DataError(f"data.tokens {folder}: ids of {found[0]} {found[1]}, {FACTS} says {self.facts.shape}")
        grid, num_classes = Grid(self.facts.grid), self.facts.num_classes
        self.spec = ViewSpec.of_kind("ids", VIEW_OF_IDS, *self.facts.shape[2:], grid=grid, num_classes=num_classes)

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Path]]:
        """A worker that is not forked maps the file itself, instead of being sent all ids."""
        return TokenCache, (self.folder,)

    def verify(self) -> None:
        """Read the whole file and compare its hash.

        Raises:
            DataError: if it is damaged.
        """
        if _sha256(self.folder / IDS) != self.facts.sha256:
            raise DataError(f"data.tokens {self.folder}: {IDS} is damaged, its hash is not the one in {FACTS}")

    def check_views(self, *, views_of: dict[str, Any], seed: int) -> None:
        """Whether a recipe reads the very same views.

        Raises:
            DataError: naming what differs.
        """
        wanted = {"seed": seed, **views_of}
        stored = {"seed": self.facts.seed, **self.facts.views_of}
        differing = [
            f"{key}: {stored.get(key)} there, {wanted.get(key)} here"
            for key in sorted(wanted.keys() | stored.keys())
            if wanted.get(key) != stored.get(key)
        ]
        if differing:
            raise DataError(
                f"data.tokens {self.folder} holds ids of other views: {'; '.join(differing)}. Undo the change, or run "
                "mim tokenize again"
            )

    def check(self, source: Source, world: World) -> None:
        """
        Raises:
            DataError: if the source has another number of images, or the file is damaged.
        """
        if len(source) != self.facts.num_images:
            raise DataError(
                f"data.tokens {self.folder} holds ids of {self.facts.num_images:,} images, data.source has "
                f"{len(source):,}: bring the images back, or run mim tokenize again"
            )
        world.on_main(self.verify)

    def __call__(self, sample: Sample, index: int, view: int) -> Tensor:
        """(N,) int64 of one fixed view of a sample.

        Raises:
            BrokenImage: if the image could not be read when the ids were made.
        """
        row = self._ids[index, view].astype(np.int64)
        if row[0] == self.facts.unread:
            text = f"no token ids in {self.folder}, where it could not be read"
            raise BrokenImage(sample.name, "unreadable", text)
        return torch.from_numpy(row)


def _text(facts: TokenFacts) -> bytes:
    return (json.dumps(asdict(facts), indent=1) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
