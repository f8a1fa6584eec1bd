"""Images in tar shards, named as webdataset names them, local or remote; read by offset, never extracted."""

from __future__ import annotations

import hashlib
import os
import re
import time
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.paths import is_url
from mim_framework.base.section import LocalPath, PathOrURL, Section
from mim_framework.base.text import plain_logger
from mim_framework.contract.components import Source, sample_or_broken
from mim_framework.contract.records import Sample
from mim_framework.data.file_systems import RemoteSection
from mim_framework.data.shard_index import (
    LABEL_KEY,
    OURS,
    THREADS,
    ShardIndex,
    Texts,
    checked_image,
    image_suffix,
    index_of,
    split_name,
)
from mim_framework.data.shards import BLOCK
from mim_framework.data.sources.folder import IMAGE_SUFFIXES, PAGED_SUFFIXES, told_kinds
from mim_framework.data.stores import LocalStore, RemoteStore, store_of

logger = plain_logger(__name__)

MOST_SHARDS = 1_000_000
"""So many shards `{000..999}` may stand for."""
MOST_CLASSES = 1_000_000
"""A class with a larger number is a mistake, and a list of so many names no attack on the memory."""
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")


class TarSource(Source):
    """Images in tar shards, local or behind a URL, in the order of the shards' names and of the members inside.

    A sample is a run of members whose names agree up to the first dot of the base name (webdataset): `cat/1.jpg`,
    `cat/1.cls`. Members are read by their place and never extracted. `mim data index` keeps the places beside the
    shards; without it every start passes over their headers.
    """

    name = "tar"

    class Config(RemoteSection):
        root: PathOrURL = Field(min_length=1)
        """Folder or URL that is searched for `.tar` files, one `.tar` file, or several: `train-{0000..0063}.tar`."""
        image: str | None = Field(None, pattern=r"^[^./][^/]*$")
        """Which member is the image, such as `jpg` or `left.png`: what stands behind the first dot of its name. By
        default the only one with a suffix of images."""
        labels: Literal["cls", "json", "folder"] | None = None
        """Where the class of an image stands: in the member `cls`, at `label_key` of the member `json`, or in the first
        folder of its name. Whole numbers count classes; other texts are names of classes, numbered in their order."""
        label_key: str = Field(LABEL_KEY, min_length=1)
        """Key in `json` members, `a.b` for one inside another."""
        classes: LocalPath | None = Field(None, min_length=1)
        """File with the name of every class, one in a line. Without it classes that are numbers are called by them."""
        index: LocalPath | None = Field(None, min_length=1)
        """Folder with the indices, as `mim data index --output` wrote it, where they do not lie beside the shards."""

        block_mb: int = Field(8, ge=1)
        """Megabytes of a shard that `data.order: blocks` reads in one request and keeps in memory, `data.order_window`
        of them at a time in every worker; a larger image is a block by itself."""

        @model_validator(mode="after")
        def _fits(self) -> TarSource.Config:
            if self.storage_options and not is_url(self.root):
                raise ValueError("storage_options are for URLs, and root is local; leave them out")
            if self.classes is not None and self.labels is None:
                raise ValueError("'classes' are names for labels; say where these stand, for example labels=cls")
            return self

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        c = self.config
        self.shards = Shards.of(c.root, c)
        self.remote = self.shards.store.remote
        shards = self._opened(Path(c.index) if c.index else None)
        self._skipped = Counter(self.shards.beside)
        self._parts: list[_Part] = []
        for name, index in zip(self.shards.names, shards, strict=True):
            self._skipped.update(index.skipped)
            self._parts.append(_Part(name, index, _chosen(name, index, c.image)))
        self._starts = list(accumulate((len(part.rows) for part in self._parts), initial=0))
        if not len(self):
            there = f"; there are {', '.join(found)}" if (found := told_kinds(self._skipped)) else ""
            what = "images" if c.image is None else f"members '{c.image}'"
            raise DataError(f"data.source.root: no {what} in the {len(self._parts):,} shards of '{c.root}'{there}")
        lengths = [_block_lengths(part, c.block_mb << 20) for part in self._parts]
        self.blocks = [length for each in lengths for length in each]
        self._block_starts = list(accumulate(self.blocks, initial=0))
        self._window = 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._labels: np.ndarray | None = None
        if c.labels is not None:
            self.classes, self._labels = self._classes_and_labels()

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Sample:
        part, row = self._place(index)
        offset, size = int(part.index.offsets[row]), int(part.index.sizes[row])
        try:
            content = self.shards.store.read(part.shard, offset - BLOCK, BLOCK + size)
        except BrokenImage as error:
            raise BrokenImage(part.name_of(row), error.cause, error.detail) from error
        return self._sample(index, part, row, content)

    def expect_blocks(self, window: int) -> None:
        self._window = window
        self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: no bytes of blocks."""
        return {**self.__dict__, "_kept": OrderedDict()}

    def read_many(self, indices: Sequence[int]) -> list[Sample | BrokenImage]:
        """As `Source.read_many`; where blocks are expected, each is one request, and kept while others are read."""
        return [self._from_block(index) if self._window else sample_or_broken(self, index) for index in indices]

    def _from_block(self, index: int) -> Sample | BrokenImage:
        part, row = self._place(index)
        number = bisect_right(self._block_starts, index) - 1
        first = self._extent(self._block_starts[number])[0]
        try:
            content = self._block(number, part.shard, first)
        except BrokenImage:  # it may be the fault of one place in it
            return sample_or_broken(self, index)
        start, end = self._extent(index)
        try:
            return self._sample(index, part, row, content[start - first : end - first])
        except BrokenImage as error:
            return error

    def _block(self, number: int, shard: str, first: int) -> bytes:
        """The bytes of a block, from its first header on."""
        if number not in self._kept:
            end = self._extent(self._block_starts[number + 1] - 1)[1]
            content = self.shards.store.read(shard, first, end - first)
            while len(self._kept) >= self._window:
                self._kept.popitem(last=False)
            self._kept[number] = content
        self._kept.move_to_end(number)
        return self._kept[number]

    def _extent(self, index: int) -> tuple[int, int]:
        """First byte of the header of a sample, and the end of its image."""
        part, row = self._place(index)
        offset = int(part.index.offsets[row])
        return offset - BLOCK, offset + int(part.index.sizes[row])

    def _sample(self, index: int, part: _Part, row: int, content: bytes) -> Sample:
        """The sample whose header and image the content is."""
        name = part.name_of(row)
        try:
            data = checked_image(content, int(part.index.sizes[row]), int(part.index.checks[row]))
        except EOFError as error:
            raise BrokenImage(name, "truncated", str(error)) from error
        except ValueError as error:
            cure = f"{error}; mim data index makes it anew"
            raise BrokenImage(name, "unreadable", cure) from error
        return Sample(data, name, None if self._labels is None else int(self._labels[index]))

    def _place(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        return self._parts[number], int(self._parts[number].rows[index - self._starts[number]])

    def identity(self) -> dict[str, Any]:
        """Number, and hashes of the names and of the sizes."""
        return dict(self._identity)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        names, sizes = hashlib.sha256(), hashlib.sha256()
        for part in self._parts:
            chosen = part.index.names if part.whole else Texts.of(part.names())
            names.update(os.fsencode(part.shard) + b"\0")
            names.update(chosen.ends.astype("<i8"))
            names.update(np.ascontiguousarray(chosen.packed))
            sizes.update(part.index.sizes[part.rows].astype("<i8").tobytes())
        return {**super().identity(), "names": names.hexdigest(), "sizes": sizes.hexdigest()}

    def size(self, index: int) -> int:
        part, row = self._place(index)
        return int(part.index.sizes[row])

    def left_out(self) -> Sequence[str]:
        counts = told_kinds(self._skipped)
        if self.shards.store.num_hidden:
            counts.append(f"{self.shards.store.num_hidden:,} hidden beside the shards")
        if paged := self._num_paged:
            counts.append(f"pages after the first of {paged:,} images, if they have any")
        return counts

    @cached_property
    def _num_paged(self) -> int:
        suffixes = tuple(PAGED_SUFFIXES)
        return sum(name.lower().endswith(suffixes) for part in self._parts for name in part.names())

    def _opened(self, folder: Path | None) -> list[ShardIndex]:
        """The indices of all shards; what had to be passed over is said."""
        without: list[str] = []
        label_key = self.config.label_key if self.config.labels in ("cls", "json") else None
        began = time.monotonic()

        def find(shard: str) -> ShardIndex:
            return self.shards.index_of(shard, label_key=label_key, folder=folder, say=without.append)

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(find, self.shards.names))
        if without:
            seconds = time.monotonic() - began
            logger.warning(
                f"data.source: passed over the headers of {len(without):,} of {len(found):,} shards in {seconds:.1f} "
                f"s, since {without[0]}; `mim data index {self.config.root}` spares it"
            )
        return found

    def _classes_and_labels(self) -> tuple[list[str], np.ndarray]:
        """Names of the classes, and of every sample its number (n,) int64."""
        texts = list(self._texts())
        where = {"cls": "member 'cls'", "json": f"'{self.config.label_key}' in a member 'json'", "folder": "folder"}
        if "" in texts:
            part, row = self._place(texts.index(""))
            missing = where[self.config.labels or ""]
            raise DataError(
                f"data.source.labels: '{part.name_of(row)}' has no {missing} that names its class; put one there, or "
                "leave data.source.labels out"
            )
        names = _lines(self.config.classes) if self.config.classes else None
        if self.config.labels != "folder" and all(text.isascii() and text.isdigit() for text in texts):
            numbers = [int(text[-12:]) if len(text.lstrip("0")) <= 12 else MOST_CLASSES for text in texts]
            most = max(numbers)
            if most >= (MOST_CLASSES if names is None else len(names)):
                part, row = self._place(numbers.index(most))
                limit = f"{self.config.classes} names {len(names)}" if names else f"there may be {MOST_CLASSES:,}"
                text = f"data.source.labels: '{part.name_of(row)}' is of class {texts[numbers.index(most)][:20]}"
                raise DataError(f"{text}, counted from 0, and {limit}")
            return names or [str(number) for number in range(most + 1)], np.array(numbers, np.int64)
        names = names or sorted(set(texts))
        number_of = {name: number for number, name in enumerate(names)}
        unknown = next((text for text in texts if text not in number_of), None)
        if unknown is not None:
            raise DataError(f"data.source.classes: {self.config.classes} has no line for class '{unknown[:100]}'")
        return names, np.array([number_of[text] for text in texts], np.int64)

    def _texts(self) -> Iterator[str]:
        for part in self._parts:
            if self.config.labels == "folder":
                yield from map(_first_folder, part.names())
            else:
                texts = part.index.cls if self.config.labels == "cls" else part.index.json
                all_of_them = list(texts)
                yield from (all_of_them[number] for number in part.index.sample_of[part.rows].tolist())


class _Part(NamedTuple):
    """One shard and, in `rows` (n,) int64, those of its images that are samples."""

    shard: str
    index: ShardIndex
    rows: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether every image is a sample."""
        return len(self.rows) == len(self.index.names)

    def names(self) -> Iterator[str]:
        """Of the members that are samples."""
        return iter(self.index.names) if self.whole else (self.index.names[row] for row in self.rows.tolist())

    def name_of(self, row: int) -> str:
        return f"{self.shard}/{self.index.names[row]}"


class Shards(NamedTuple):
    """The tar files of a root. `listed` are all names there, None where nothing was listed; `beside` counts others."""

    store: LocalStore | RemoteStore
    names: list[str]
    listed: frozenset[str] | None
    beside: Counter[str]

    @classmethod
    def of(cls, root: str, patience: RemoteSection) -> Shards:
        """
        Raises:
            DataError: if there is none.
        """
        key = "data.source.root"
        folder, _, file = root.rstrip("/").rpartition("/")
        if file.endswith(".tar") and (is_url(root) or not Path(root).is_dir()):
            return cls(
                store_of(folder or ("/" if root.startswith("/") else "."), key, patience), _named(file), None, Counter()
            )
        store = store_of(root, key, patience)
        try:
            listed = frozenset(store.list())
        except OSError as error:
            raise DataError(f"{key}: '{root}' cannot be listed: {type(error).__name__}: {error}") from error
        names = sorted(name for name in listed if name.endswith(".tar"))
        beside = Counter(Path(name).suffix.lower() for name in listed if not _belongs(name))
        if not names:
            there = ", ".join(told_kinds(beside)) or "no files"
            packed = any(suffix in _COMPRESSED for suffix in beside)
            cure = " (compressed ones cannot be read by offset: unpack them with gunzip or the like)" if packed else ""
            raise DataError(f"{key}: no .tar files below '{root}'; there are {there}{cure}")
        return cls(store, names, listed, beside)

    def index_of(self, shard: str, *, label_key: str | None, folder: Path | None, say: Any) -> ShardIndex:
        """As `shard_index.index_of`, with indices beside the shard or in a folder.

        Raises:
            DataError: if the shard is not there or cannot be read, too.
        """
        own = None if folder is None else store_of(str(folder), "data.source.index")

        def beside(name: str) -> tuple[LocalStore | RemoteStore, str] | None:
            if own is not None:
                return own, name
            return None if self.listed is not None and name not in self.listed else (self.store, name)

        try:
            return index_of(self.store, shard, IMAGE_SUFFIXES, label_key=label_key, beside=beside, say=say)
        except BrokenImage as error:
            raise DataError(f"data.source.root: shard {error}") from error


def _named(file: str) -> list[str]:
    """`train-{00..63}.tar` written out, with as many digits as the first number has.

    Raises:
        DataError: if there are too many, or several ranges.
    """
    if (found := _RANGE.search(file)) is None:
        return [file]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MOST_SHARDS or _RANGE.search(file, found.end()):
        raise DataError(f"data.source.root: '{file}' must hold one range that rises, such as {{0000..0063}}")
    digits = len(found[1])
    return [f"{file[: found.start()]}{number:0{digits}d}{file[found.end() :]}" for number in range(first, last + 1)]


def _belongs(name: str) -> bool:
    return name.endswith((".tar", OURS, ".idx")) or name.rpartition("/")[2] == "wids-index.json"


def _chosen(shard: str, index: ShardIndex, image: str | None) -> np.ndarray:
    """Rows of an index that are samples: of every sample the one image, or that of the suffix.

    Raises:
        DataError: if a sample has several images and none is chosen.
    """
    rows = np.arange(len(index.names))
    if image is not None:
        if not image_suffix(image.lower(), IMAGE_SUFFIXES):
            raise DataError(f"data.source.image: '{image}' has no suffix of images, such as {image}.jpg")
        suffixes = ((split_name(name) or ("", ""))[1] for name in index.names)
        return rows[np.fromiter((suffix == image.lower() for suffix in suffixes), bool, len(rows))]
    repeated = np.flatnonzero(np.diff(index.sample_of) == 0)
    if len(repeated):
        both = [index.names[int(repeated[0]) + each] for each in (0, 1)]
        suffix = (split_name(both[0]) or ("", ""))[1]
        raise DataError(
            f"data.source.image: shard '{shard}' has samples of several images, such as '{both[0]}' and '{both[1]}'; "
            f"say which one to take, for example data.source.image={suffix}"
        )
    return rows


def _block_lengths(part: _Part, most: int) -> list[int]:
    """Samples of a shard that lie within so many bytes, each time as many as there are."""
    starts = part.index.offsets[part.rows] - BLOCK
    ends = part.index.offsets[part.rows] + part.index.sizes[part.rows]
    cuts = [0]
    while cuts[-1] < len(starts):
        end = int(np.searchsorted(ends, starts[cuts[-1]] + most, side="right"))
        cuts.append(max(end, cuts[-1] + 1))
    return [end - start for start, end in pairwise(cuts)]


def _first_folder(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""


def _lines(file: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.source.classes: {file} cannot be read: {error}") from error
    if not lines or "" in lines or len(set(lines)) < len(lines):
        raise DataError(f"data.source.classes: {file} needs one name in a line, each once, and no empty line")
    return lines
