"""What the images of a source are, before anything is trained on them. Start at `scan`.

Images are looked at in blocks of `BLOCK`, in worker processes; a block's findings are one line of a journal, so that a
scan that was killed goes on after its last line, to the same result.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image as pil

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data.decode import MAX_PIXELS, Native, kind_of, native_of, open_image
from mim_framework.data.identity import full_identity
from mim_framework.data.journal import Journal
from mim_framework.data.moments import Moments
from mim_framework.data.prefetch import prefetch
from mim_framework.data.reader import read_each
from mim_framework.data.values import Range, UnsupportedValues

FORMAT = 1
"""Version of the journal: findings of another one are not gone on with."""
BLOCK = 32
"""Images of a line of the journal."""
FAINT = 2.0
"""A picture of bytes is near-empty if no channel spreads more than so many of 255 levels (standard deviation)."""
_HASH_BYTES = 16


class BrokenFound(TypedDict):
    """An image that cannot be used; `cause` as in `BrokenImage`."""

    name: str
    cause: str
    detail: str


@dataclass(frozen=True)
class Group:
    """Images whose pixels are numbers of one kind: so many channels, a dtype, and a range where the files state one."""

    channels: int
    dtype: str
    stated: Range | None = None

    @classmethod
    def of(cls, native: Native) -> Group:
        if isinstance(native.pixels, pil.Image):
            return cls(len(native.pixels.getbands()), "uint8")
        return cls(native.pixels.shape[2], str(native.pixels.dtype), native.stated)


@dataclass
class Found:
    """What was found; of a block of images, or of all.

    `sizes` by (height, width), `classes` by number; `groups`: how many images and their moments, in numbers of the
    files; `hashes`: `_HASH_BYTES` of each image, zeros of one that cannot be used. `called_alpha`: TIFFs whose last
    band is called alpha.
    """

    names: list[str] = field(default_factory=list)
    hashes: bytearray = field(default_factory=bytearray)
    broken: list[BrokenFound] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    faint: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)
    groups: dict[Group, tuple[int, Moments]] = field(default_factory=dict)
    num_bytes: int = 0
    num_decoded: int = 0
    called_alpha: int = 0

    def add(self, other: Found) -> None:
        """Take in the findings of the images that follow, all but their names."""
        self.hashes += other.hashes
        for mine, theirs in ((self.broken, other.broken), (self.constant, other.constant), (self.faint, other.faint)):
            mine += theirs  # type: ignore[operator, misc]
        for name in ("formats", "modes", "sizes", "classes"):
            getattr(self, name).update(getattr(other, name))
        for group, (images, moments) in other.groups.items():
            self.join(group, images, moments)
        self.num_bytes += other.num_bytes
        self.num_decoded += other.num_decoded
        self.called_alpha += other.called_alpha

    def join(self, group: Group, images: int, moments: Moments) -> None:
        """Count images and their pixels to a group."""
        before = self.groups.get(group)
        self.groups[group] = (images, moments) if before is None else (before[0] + images, before[1] + moments)

    def to_json(self) -> dict[str, Any]:
        """Which `from_json` reads back to the last bit."""
        groups = [
            {"channels": g.channels, "dtype": g.dtype, "stated": g.stated, "images": images, **moments.to_json()}
            for g, (images, moments) in self.groups.items()
        ]
        plain = ("names", "broken", "constant", "faint", "formats", "modes", "num_bytes", "num_decoded", "called_alpha")
        kept = {key: getattr(self, key) for key in plain}
        listed = {"sizes": [[*size, count] for size, count in self.sizes.items()], "classes": [*self.classes.items()]}
        return {**kept, **listed, "hashes": self.hashes.hex(), "groups": groups}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Found:
        found = cls(**{key: value for key, value in kept.items() if key in cls.__dataclass_fields__})
        found.formats, found.modes = Counter(found.formats), Counter(found.modes)
        found.sizes = Counter({(height, width): count for height, width, count in kept["sizes"]})
        found.classes = Counter(dict(kept["classes"]))
        found.hashes = bytearray.fromhex(kept["hashes"])
        found.groups = {}
        for each in kept["groups"]:
            group = Group(each["channels"], each["dtype"], each["stated"] and tuple(each["stated"]))
            found.groups[group] = (each["images"], Moments.from_json(each))
        return found


@dataclass(frozen=True)
class Scanned:
    """All findings of a source; `duplicates`: names of images with the same content, by group, in order."""

    found: Found
    duplicates: list[list[str]]
    num_images: int
    resumed_from: int
    """Images whose findings an earlier call had written down."""


def scan(
    source: Source,
    journal: Path,
    *,
    sample: int | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int = 0,
    progress: Callable[[int, Found], object] = lambda done, found: None,
) -> Scanned:
    """Look at all images of a source. The same call after a kill goes on; the result does not depend on it.

    Args:
        journal: file of the findings so far; what is done takes it away with `Path.unlink`.
        sample: decode the pixels of about so many images, evenly chosen; of the others, headers and hashes only.
        max_pixels: images that claim more count as broken, as in a run.
        workers: processes that read images.
        progress: is told how many images are done and what was found so far, after every block.

    Raises:
        DataError: if the source cannot be read any more, or another process scans into the same journal.
        MimError: if the journal cannot be written.
    """
    step = 1 if sample is None else max(1, -(-len(source) // sample))
    about = {"format": FORMAT, "source": full_identity(source), "step": step, "max_pixels": max_pixels}
    num_blocks = -(-len(source) // BLOCK)
    found = Found()
    with Journal(journal, json.loads(json.dumps(about))) as kept:
        done = 0
        for line in kept.lines():
            found.add(Found.from_json(line))
            done += 1
        resumed_from = min(done * BLOCK, len(source))
        progress(resumed_from, found)
        reader = _BlockReader(source, step, max_pixels)
        workers = min(workers, num_blocks - done)
        for block in prefetch(reader, range(done, num_blocks), workers=workers, remote=source.remote):
            if isinstance(block, DataError):
                raise block
            kept.append(block)
            found.add(Found.from_json(block))
            done += 1
            progress(min(done * BLOCK, len(source)), found)
        return Scanned(found, _duplicates(found.hashes, kept), len(source), resumed_from)


class _BlockReader:
    """Looks at one block of images per call, in a worker; the answer is `Found.to_json`."""

    def __init__(self, source: Source, step: int, max_pixels: int) -> None:
        self.source, self.step, self.max_pixels = source, step, max_pixels

    def __getitem__(self, block: int) -> dict[str, Any] | DataError:
        """The findings, or the error that ends the scan: raised in a worker, its text would be one of a traceback."""
        indices = range(block * BLOCK, min(len(self.source), (block + 1) * BLOCK))
        found = Found()
        try:
            for index, sample in zip(indices, read_each(self.source, indices), strict=True):
                self._look(found, sample, decode=index % self.step == 0)
        except DataError as error:
            return error
        return found.to_json()

    def _look(self, found: Found, sample: Sample | BrokenImage, *, decode: bool) -> None:
        found.names.append(sample.name)
        try:
            if isinstance(sample, BrokenImage):
                raise sample
            if isinstance(sample.data, bytes):
                found.num_bytes += len(sample.data)
            image = open_image(
                sample.data, sample.name, max_pixels=self.max_pixels, decoder="pillow", alpha="keep", page=sample.page
            )
            format, mode = kind_of(image)
            if decode:
                _measure(found, sample.name, native_of(image))
        except BrokenImage as error:
            found.broken.append({"name": error.name, "cause": error.cause, "detail": error.detail})
            found.hashes += bytes(_HASH_BYTES)
            return
        found.hashes += _hash_of(sample)
        found.formats[format] += 1
        found.modes[mode] += 1
        found.sizes[image.size] += 1
        if sample.label is not None:
            found.classes[sample.label] += 1


def _measure(found: Found, name: str, native: Native) -> None:
    """
    Raises:
        BrokenImage: if there are values that are no numbers.
    """
    try:
        moments = Moments.of(native.pixels)
    except UnsupportedValues as error:
        raise BrokenImage(name, "unsupported", str(error)) from None
    group = Group.of(native)
    found.num_decoded += 1
    found.called_alpha += native.alpha
    found.join(group, 1, moments)
    if (moments.low == moments.high).all():
        found.constant.append(name)
    elif group.dtype == "uint8" and (moments.std <= FAINT).all():
        found.faint.append(name)


def _hash_of(sample: Sample) -> bytes:
    """Of the encoded bytes and the page, or of the pixels where a source gives those."""
    data, about = sample.data, f"page {sample.page}"
    if isinstance(data, pil.Image):
        data, about = data.tobytes(), f"{about} {data.mode} {data.size}"
    elif not isinstance(data, bytes):
        data, about = np.ascontiguousarray(data).tobytes(), f"{about} {data.dtype} {data.shape}"
    return hashlib.blake2b(data, digest_size=_HASH_BYTES, person=hashlib.sha256(about.encode()).digest()[:16]).digest()


def _duplicates(hashes: bytearray, journal: Journal) -> list[list[str]]:
    """Names of images with one hash, in order of the first of each group."""
    groups = same_rows(hashes)
    wanted = {index for group in groups for index in group}
    names: dict[int, str] = {}
    start = 0
    for line in journal.lines() if wanted else ():
        names |= {start + number: name for number, name in enumerate(line["names"]) if start + number in wanted}
        start += len(line["names"])
    return [[names[index] for index in group] for group in groups]


def same_rows(hashes: bytes | bytearray) -> list[Sequence[int]]:
    """Numbers of the images that share a hash of `_HASH_BYTES`; zeros stand for no hash. In order of their first."""
    high, low = np.frombuffer(bytes(hashes), ">u8").reshape(-1, 2).astype(np.uint64).T
    order = np.lexsort((low, high))  # stable, so that numbers rise within a group
    ends = np.flatnonzero((np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)) + 1
    return sorted(_groups_of_several(order, ends, (high != 0) | (low != 0)))


def _groups_of_several(order: np.ndarray, ends: np.ndarray, hashed: np.ndarray) -> Iterator[list[int]]:
    edges = np.concatenate([[0], ends, [len(order)]])
    for number in np.flatnonzero(np.diff(edges) > 1):
        group = order[edges[number] : edges[number + 1]].tolist()
        if hashed[group[0]]:
            yield group
