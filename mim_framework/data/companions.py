"""What travels beside the views of a sample, such as token ids that `mim tokenize` has stored. Start at `Companion`.

A folder of token ids holds `ids.npy` (images, views of each, N), read by memory map, `tokens.json`, which says what
they are the ids of, and `broken_images.jsonl` where images could not be read. A run refuses a folder of other images,
other views or another seed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.files import replace_file, sha256_of
from mim_framework.base.text import plain_logger
from mim_framework.contract.components import Source
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import ViewSpec
from mim_framework.contract.world import World
from mim_framework.data.identity import KNOWN_IN_PLACES, source_changes

logger = plain_logger(__name__)

IDS, FACTS, UNFINISHED = "ids.npy", "tokens.json", "unfinished.json"
ASIDE, DONE, BROKEN_IMAGES = "ids.unfinished.npy", "done.npy", "broken_images.jsonl"
MARK_SECONDS = 5.0
"""Seconds between two marks of what is whole: so much of the work is done again after a kill."""
FORMAT: Literal[1] = 1
VIEW_OF_IDS = "token_ids"


class Companion(Protocol):
    """A tensor beside the views of every sample, in the batch under the name of `spec`.

    Data workers read it after the views; builders of views do not know of it.
    """

    spec: ViewSpec

    def check(self, source: Source, world: World) -> list[str]:
        """Called once before a run, on every rank. What is another in `source` and was accepted, on rank 0.

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
    """Of what the ids are: `views_of` holds the parts of the recipe that decide the pixels, by key.

    `missing` counts rows, one for every fixed view of an image, whose image could not be read; `source` is the
    `Source.identity` of the images, empty in folders of earlier versions.
    """

    num_images: Annotated[int, Field(gt=0, lt=2**40)]
    views_per_image: Annotated[int, Field(gt=0, lt=2**20)]
    grid: Annotated[tuple[Annotated[int, Field(gt=0, lt=2**20)], ...], Field(max_length=3)]
    num_classes: Annotated[int, Field(gt=0, lt=2**32)]
    seed: int
    views_of: dict[str, Any]
    tokenizer: str
    precision: str
    format: Literal[1] = FORMAT
    sha256: str = ""
    missing: Annotated[int, Field(ge=0)] = 0
    source: dict[str, str | int | float | bool | None] = field(default_factory=dict)

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

    def same_but_images(self, other: TokenFacts) -> bool:
        """Whether they are of the same work, finished or not, as far as the images are the same."""
        differing: dict[str, Any] = {"sha256": "", "missing": 0, "source": {}}
        return replace(self, **differing) == replace(other, **differing)


class TokenWriter:
    """Writes a folder of ids; it counts as whole only after `finish`. What an interrupted writer left is kept.

    Rows are written to a file aside, together with a mark for every row that is whole on the disk. A folder that was
    finished with rows missing is taken up again, and stands as it was until the next `finish`.

    Raises:
        DataError: if the folder cannot be written, or holds ids of something else.
    """

    def __init__(self, folder: Path, facts: TokenFacts) -> None:
        self.folder, self.facts = folder, facts
        self._pending: list[tuple[list[int], int]] = []
        self._marked_at = time.monotonic()
        try:
            if not self._unfinished():
                self._begin()
            elif not (folder / ASIDE).exists():  # killed while it was finished
                os.replace(folder / IDS, folder / ASIDE)
            self._ids = _mapped(folder / ASIDE, facts.shape, facts.dtype)
            self._done = _mapped(folder / DONE, facts.shape[:2], np.dtype(bool))
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{folder} is damaged: {error}; delete it and run mim tokenize again") from error

    def _unfinished(self) -> bool:
        """Whether the folder was begun with the same facts."""
        file = self.folder / UNFINISHED
        if not file.is_file():
            return False
        try:
            begun = _FACTS.validate_json(file.read_bytes(), strict=True)
        except ValidationError:
            return False
        return begun.same_but_images(self.facts) and self._of_these_images(begun)

    def _of_these_images(self, there: TokenFacts) -> bool:
        """True; files of other sizes are only told, since broken ones may have been mended.

        Raises:
            DataError: if the ids there are those of others.
        """
        told = f"{self.folder} holds token ids of other images than data.source has now"
        here = {name: value for name, value in self.facts.source.items() if name not in KNOWN_IN_PLACES}
        if changes := source_changes(there.source, here):
            raise DataError(f"{told}: {', '.join(changes)}; bring them back, name another folder, or delete it")
        if changes := source_changes(there.source, self.facts.source):
            logger.warning(f"{told}: {', '.join(changes)}; what is there stays, and what is missing is made of them")
        if not there.source:
            logger.warning(f"{self.folder} does not say of which images its ids are; it is taken to be of these")
        return True

    def _begin(self) -> None:
        """Make the files of a new folder, or of a finished one that lacks rows; UNFINISHED comes last."""
        folder, facts = self.folder, self.facts
        finished = (folder / FACTS).exists()
        if (finished and not self._lacks_rows()) or (not finished and ((folder / IDS).exists() or self._begun())):
            raise DataError(f"{folder} holds token ids already; name another folder, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        if finished:
            shutil.copyfile(folder / IDS, folder / ASIDE)
        else:
            _write_filled(folder / ASIDE, facts.shape, facts.dtype, facts.unread)
        _write_filled(folder / DONE, facts.shape[:2], np.dtype(bool), False)
        if finished:
            ids, done = _mapped(folder / ASIDE, facts.shape, facts.dtype), _mapped(folder / DONE, facts.shape[:2], bool)
            for rows in _chunks(len(done)):
                done[rows] = (ids[rows] < facts.num_classes).all(-1)
            done.flush()
        replace_file(folder / UNFINISHED, _text(facts))

    def _begun(self) -> bool:
        return (self.folder / UNFINISHED).exists()

    def _lacks_rows(self) -> bool:
        """Whether a finished folder is of the same facts, undamaged, and without ids of some images."""
        cache = TokenCache(self.folder)
        if cache.facts.missing == 0 or not cache.facts.same_but_images(self.facts):
            return False
        self._of_these_images(cache.facts)
        cache.verify()
        return True

    def missing(self, batch_size: int) -> list[tuple[int, list[int]]]:
        """(number of the fixed view, indices of samples) of all that is not whole yet, in batches."""
        whole = self._whole()
        batches = []
        for view in range(self.facts.views_per_image):
            indices = np.flatnonzero(~whole[:, view]).tolist()
            batches += [(view, indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        return batches

    def put(self, indices: list[int], view: int, ids: Tensor) -> None:
        """ids (B, N) of one fixed view of the samples."""
        self._ids[indices, view] = ids.cpu().numpy().astype(self.facts.dtype)
        self._pending.append((indices, view))
        if time.monotonic() - self._marked_at > MARK_SECONDS:
            self.mark()

    def mark(self) -> None:
        """Mark what was put as whole, once it is on the disk."""
        self._ids.flush()
        for indices, view in self._pending:
            self._done[indices, view] = True
        self._done.flush()
        self._pending, self._marked_at = [], time.monotonic()

    def finish(self) -> TokenFacts:
        """Give the folder its final form; rows that were not put are marked as unread."""
        self.mark()
        whole = self._whole()
        for rows in _chunks(len(whole)):
            for index, view in np.argwhere(~whole[rows]):
                self._ids[rows.start + index, view] = self.facts.unread
        self._ids.flush()
        missing = int((~whole).sum())
        facts = replace(self.facts, sha256=sha256_of(self.folder / ASIDE), missing=missing)
        (self.folder / FACTS).unlink(missing_ok=True)
        os.replace(self.folder / ASIDE, self.folder / IDS)
        replace_file(self.folder / FACTS, _text(facts))
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        (self.folder / DONE).unlink(missing_ok=True)
        return facts

    def _whole(self) -> NDArray[np.bool_]:
        """(images, views): marked as whole, and without an id that is none."""
        whole = np.array(self._done)
        for rows in _chunks(len(whole)):
            whole[rows] &= (self._ids[rows] < self.facts.num_classes).all(-1)
        return whole


def _chunks(length: int, size: int = 4096) -> Iterator[slice]:
    """Stretches of so many rows, since a comparison of all ids at once could fill the memory."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _write_filled(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], value: int) -> None:
    """A file of `np.save` with one value everywhere: written, not mapped, so that a full disk is an error."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in _chunks(shape[0]):
            file.write(np.full((rows.stop - rows.start, *shape[1:]), value, dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap[Any, Any]:
    """
    Raises:
        ValueError: if the file holds something else.
    """
    array = np.lib.format.open_memmap(path, mode="r+")
    if (array.shape, array.dtype) != (shape, np.dtype(dtype)):
        raise ValueError(f"{path.name} holds {array.shape} {array.dtype}, not {shape} {np.dtype(dtype)}")
    return array


class TokenCache:
    """A folder that `mim tokenize` wrote: the companion of runs with `data.tokens`.

    Args:
        accept_changed: whether ids of images with other names or sizes will do.

    Raises:
        DataError: if it is none, or is not whole.
    """

    def __init__(self, folder: Path, *, accept_changed: bool = False) -> None:
        self.folder, self._accept_changed = folder, accept_changed
        try:
            self.facts = _FACTS.validate_json((folder / FACTS).read_bytes(), strict=True)
            Grid(self.facts.grid)  # refuses one that is too large
            self._ids = np.load(folder / IDS, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(
                f"data.tokens {folder} is no whole folder of token ids; make one: mim tokenize RECIPE --output {folder}"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            text = f"{FACTS} is damaged: {where + ': ' if where else ''}{first['msg']}"
            raise DataError(f"data.tokens {folder}: {text}; run mim tokenize again") from error
        except Exception as error:  # numpy raises many kinds for a file that is none of its own
            raise DataError(f"data.tokens {folder} cannot be read: {type(error).__name__}: {error}") from error
        found = (getattr(self._ids, "shape", None), getattr(self._ids, "dtype", None))
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
        if sha256_of(self.folder / IDS) != self.facts.sha256:
            raise DataError(f"data.tokens {self.folder}: {IDS} is damaged, its hash is not the one in {FACTS}")

    def check_views(self, *, views_of: dict[str, Any], seed: int) -> None:
        """Whether a recipe reads the very same views.

        Raises:
            DataError: naming what differs.
        """
        wanted = {"seed": seed, **views_of}
        stored = {"seed": self.facts.seed, **self.facts.views_of}
        if isinstance(of_source := stored.get("data.source"), dict):  # an option of earlier versions
            stored["data.source"] = {key: value for key, value in of_source.items() if key != "eval_root"}
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

    def check(self, source: Source, world: World) -> list[str]:
        """
        Raises:
            DataError: if the source has other images, or the file is damaged.
        """
        if len(source) != self.facts.num_images:
            raise DataError(
                f"data.tokens {self.folder} holds ids of {self.facts.num_images:,} images, data.source has "
                f"{len(source):,}: bring the images back, or run mim tokenize again"
            )
        changes: list[str] = world.on_main(lambda: self._accepted(source)) or []
        world.on_main(self.verify)
        return changes

    def _accepted(self, source: Source) -> list[str]:
        """What has changed of the images since the ids were made, if that is accepted."""
        if not self.facts.source:
            logger.warning(
                f"data.tokens {self.folder} says of how many images its ids are and not of which; mim tokenize writes "
                "that down since"
            )
            return []
        if not (changes := source_changes(self.facts.source, source.identity())):
            return []
        told = f"data.tokens {self.folder} holds ids of other images than data.source has: {', '.join(changes)}"
        if not self._accept_changed:
            raise DataError(
                f"{told}. Bring the images back, run mim tokenize again, or set data.accept_changed_source=true if "
                "that is meant"
            )
        logger.warning(f"{told}; accepted by the recipe")
        return changes

    def __call__(self, sample: Sample, index: int, view: int) -> Tensor:
        """(N,) int64 of one fixed view of a sample.

        Raises:
            BrokenImage: if the image could not be read when the ids were made.
            DataError: if an id is none of the vocabulary.
        """
        row = self._ids[index, view].astype(np.int64)
        if (row == self.facts.unread).all():
            text = f"no token ids in {self.folder}, where it could not be read; mim tokenize asks for it again"
            raise BrokenImage(sample.name, "unreadable", text)
        if row.max() >= self.facts.num_classes:
            where = f"{self.folder / IDS}: id {row.max()} of '{sample.name}' (image {index}, view {view})"
            raise DataError(
                f"data.tokens {where} is none of the {self.facts.num_classes:,} of its tokenizer; the file is damaged, "
                "delete it and run mim tokenize again"
            )
        return torch.from_numpy(row)


_FACTS = TypeAdapter(TokenFacts)


def _text(facts: TokenFacts) -> bytes:
    return (json.dumps(asdict(facts), indent=1) + "\n").encode()
