"""Every image below a folder, local or remote."""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.paths import is_url
from mim_framework.base.section import LocalPath, PathOrURL, Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data.decode import num_pages
from mim_framework.data.file_systems import RemoteSection
from mim_framework.data.stores import LocalStore, store_of

# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2",
])
# fmt: on
"""A file with another suffix is not listed; what a listed file really holds is decided when it is read."""


PAGED_SUFFIXES = frozenset([".tif", ".tiff", ".gif", ".webp", ".avif"])
"""Kinds of files that may hold several pages or frames."""
FILES_LOOKED_INTO = 1000
"""So many files are opened to say how many pages are not read; of more, an even choice."""
FILES_SIZED = 100_000
"""The sizes of so many files belong to the identity of the source; of more, those of an even choice."""
KINDS_NAMED = 8
"""So many suffixes are told by name, the most frequent ones."""
LONGEST_KIND = 40
"""Letters of a suffix that are shown."""
THREADS = 8


class FolderSource(Source):
    """Every image below a folder or URL, in the order of their paths. Class folders are allowed and not needed."""

    name = "folder"

    class Config(RemoteSection):
        root: PathOrURL = Field(min_length=1)
        """Folder that is searched recursively: a local path or any fsspec URL, such as s3://bucket/images."""
        labels: bool = False
        """Take the first folder below `root` as the class of an image. Pre-training does not need it, evaluations such
        as kNN do."""
        list: LocalPath | None = Field(None, min_length=1)
        """File of the images to take, one name in a line: the path below `root`, or the name of a file that occurs
        there once, as in lists of 1 % of ImageNet. All others are left out; classes stay those of the whole folder."""
        pages: Literal["first", "each"] = "first"
        """What is read of a file of several pages or frames, such as a TIFF volume or a GIF: the first, or each as a
        sample of its own, named `file.tif#3`. For `each`, all files that may have pages are opened at the start."""

        @model_validator(mode="after")
        def _options_for_a_url(self) -> FolderSource.Config:
            if self.storage_options and not is_url(self.root):
                raise ValueError("storage_options are for URLs, and root is a local folder; leave them out")
            return self

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self._store = store_of(self.config.root, "data.source.root", self.config)
        self.remote = self._store.remote
        self._skipped: Counter[str] = Counter()
        try:
            names = everything = sorted(self._images())
            if self.config.list is not None and names:
                names = chosen_by_list(Path(self.config.list), names, self.config.root)
            paged = [number for number, name in enumerate(names) if _suffix(name) in PAGED_SUFFIXES]
            pages = self._pages_of([names[number] for number in paged]) if self.config.pages == "each" else []
        except DataError:
            raise
        except Exception as error:  # file systems raise the errors of their network libraries too
            text = f"'{self.config.root}' cannot be listed: {type(error).__name__}: {error}"
            raise DataError(f"data.source.root: {text}") from error
        self._num_paged = len(paged)
        self._looked_into = array("q", paged[:: -(-len(paged) // FILES_LOOKED_INTO) or 1])
        self._starts = _starts(len(names), dict(zip(paged, pages, strict=False)))
        self._names = _PackedNames(names)
        if not names:
            raise DataError(
                f"data.source.root: no images below '{self.config.root}'; files are taken by their suffix, "
                f"one of {' '.join(sorted(IMAGE_SUFFIXES))}; there are {', '.join(self.left_out()) or 'no files'}"
            )
        if self.config.labels:
            loose = next((name for name in everything if "/" not in name), None)
            if loose is not None:
                raise DataError(
                    f"data.source.labels: '{loose}' lies directly in '{self.config.root}', not in a class folder; "
                    f"move it into one or set data.source.labels=false"
                )
            self.classes = sorted({_first_folder(name) for name in everything})
            self._label_of = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._names) if self._starts is None else self._starts[-1]

    def read(self, index: int) -> Sample:
        number, page, count = self._place(index)
        file = self._names[number]
        name = file if count == 1 else f"{file}#{page + 1}"
        try:
            data = self._store.read(file)
        except BrokenImage as error:
            raise BrokenImage(name, error.cause, error.detail) from error
        return Sample(data, name, self._label_of[_first_folder(file)] if self.config.labels else None, page)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Number of the file, of the page in it, and how many pages it has."""
        if self._starts is None:
            return index, 0, 1
        number = bisect_right(self._starts, index) - 1
        start, end = self._starts[number : number + 2]
        return number, index - start, end - start

    def identity(self) -> dict[str, Any]:
        """Number, a hash of the names (and pages), and for local files one of their sizes."""
        return dict(self._identity)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        names = hashlib.sha256(self._names.packed())
        if self._starts is not None:
            names.update(self._starts.tobytes())
        found = {**super().identity(), "names": names.hexdigest()}
        if isinstance(self._store, LocalStore):
            numbers = range(0, len(self._names), -(-len(self._names) // FILES_SIZED))
            sizes = array("q", (self._size(self._names[number]) for number in numbers))
            found["sizes"] = hashlib.sha256(sizes.tobytes()).hexdigest()
        return found

    def size(self, index: int) -> int | None:
        """Known of local files."""
        return self._size(self._names[self._place(index)[0]]) if isinstance(self._store, LocalStore) else None

    def _size(self, name: str) -> int:
        """Bytes of a file, -1 if it is gone: reading it says so."""
        try:
            return self._store.size(name)
        except BrokenImage:
            return -1

    def left_out(self) -> Sequence[str]:
        counts = told_kinds(self._skipped)
        if self._store.num_hidden:
            counts.append(f"{self._store.num_hidden:,} hidden")
        return [*counts, *self._later_pages]

    @cached_property
    def _later_pages(self) -> list[str]:
        """The pages and frames that are not read, in words."""
        if self.config.pages == "each" or not self._num_paged:
            return []
        cure = "data.source.pages=each makes samples of them"
        if self.remote:
            return [f"pages after the first of {self._num_paged:,} files, if they have any ({cure})"]
        pages = self._pages_of([self._names[number] for number in self._looked_into])
        later = [count - 1 for count in pages if count > 1]
        among = "" if len(pages) == self._num_paged else f" among {len(pages):,} of {self._num_paged:,} looked into"
        return [f"{sum(later):,} later pages of {len(later):,} files{among} ({cure})"] if later else []

    def _images(self) -> Iterator[str]:
        """Names of files with a suffix of images; the others are counted."""
        for name in self._store.list():
            if (suffix := _suffix(name)) in IMAGE_SUFFIXES:
                yield name
            else:
                self._skipped[suffix] += 1

    def _pages_of(self, names: Sequence[str]) -> list[int]:
        """How many pages each file has; 1 for what is no image."""

        def count(name: str) -> int:
            local = isinstance(self._store, LocalStore)
            return num_pages(self._store.path(name) if local else self._store.read(name))

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(count, names))


def told_kinds(kinds: Counter[str]) -> list[str]:
    """Counts of files by suffix in words, the most frequent first, all others as one."""
    named = kinds.most_common(KINDS_NAMED)
    counts = [f"{count:,} {_printable(suffix) if suffix else 'without a suffix'}" for suffix, count in named]
    if others := kinds.total() - sum(count for _, count in named):
        counts.append(f"{others:,} of other suffixes")
    return counts


def chosen_by_list(file: Path, names: Sequence[str], root: str) -> list[str]:
    """Those of the names below `root` that a file lists, in their order.

    Raises:
        DataError: if the file cannot be read, is empty, or lists what is not there, occurs several times or twice.
    """
    key = "data.source.list"
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}: {file} cannot be read: {error}") from error
    wanted = [line.replace(os.sep, "/").removeprefix("./") for line in lines if line]
    if not wanted:
        raise DataError(f"{key}: {file} lists no image; it needs one name in a line")
    paths, by_file = set(names), Counter(name.rpartition("/")[2] for name in names)
    full = {name.rpartition("/")[2]: name for name in names}
    chosen: set[str] = set()
    for line in wanted:
        if line not in paths and by_file[line] != 1:
            several = f"{by_file[line]} files below it have that name; give the path"
            why = several if by_file[line] else "it has no such image"
            raise DataError(f"{key}: '{line}' of {file} is not one image of '{root}': {why}")
        name = line if line in paths else full[line]
        if name in chosen:
            raise DataError(f"{key}: {file} lists '{line}' twice")
        chosen.add(name)
    return [name for name in names if name in chosen]


def _starts(num_files: int, pages: dict[int, int]) -> array[int] | None:
    """Index of the first sample of every file and the number of samples; None if every file is one."""
    if all(count == 1 for count in pages.values()):
        return None
    return array("q", accumulate((pages.get(number, 1) for number in range(num_files)), initial=0))


class _PackedNames(Sequence[str]):
    """Strings in one block of memory: millions of them cost a worker neither a copy nor, under fork, its pages."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = array("q", [0])
        for name in encoded:
            self._ends.append(self._ends[-1] + len(name))
        self._bytes = b"".join(encoded)

    def packed(self) -> bytes:
        """All of them, told apart by their ends."""
        return self._ends.tobytes() + self._bytes

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text[:LONGEST_KIND])


def _first_folder(name: str) -> str:
    return name.split("/", 1)[0]
