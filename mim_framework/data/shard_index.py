"""What of a tar shard must be known to read its images by offset. Start at `index_of`.

An index is made by one pass over the headers, kept beside the shard as `SHARD.tar.mim_index`, and never believed: it is
checked as a whole when it is read, and the header of every image when the image is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mim_framework.base.errors import BrokenImage, DataError, Unreachable
from mim_framework.data.shards import BLOCK, Member, ShardBytes, members
from mim_framework.data.stores import Store

OURS, ENERGON = ".mim_index", ".idx"
"""What is added to the name of a shard; DALI's index is called `SHARD.idx`, without `.tar`."""
VERSION = 1
LABEL_KEY = "label"
"""Where in a `json` member a label is looked for, if nothing else is said."""
LONGEST_LABEL, LONGEST_JSON = 1 << 10, 1 << 20
"""Bytes of a `cls` member or label, and of a `json` member; longer ones give no label."""
MOST_PARTS = 1000
"""Members that one sample may have."""
KINDS_COUNTED = 1000
"""Different suffixes that are counted by name."""
SEGMENT = 4096
"""Samples between two threads, where energon's index says where samples begin."""
THREADS = 8

_SAMPLE = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
_UNSAFE = re.compile(r"(?:^|/)\.\.(?:/|$)|^/|\0")


class Texts(Sequence[str]):
    """Strings in one block of memory, told apart by their ends."""

    def __init__(self, packed: np.ndarray, ends: np.ndarray) -> None:
        """packed (n,) uint8, ends (len + 1,) int64, the first one 0."""
        self.packed, self.ends = packed, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        maker = _Texts()
        for text in texts:
            maker.append(text)
        return maker.done()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(self.packed[self.ends[index] : self.ends[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        packed, ends = self.packed.tobytes(), self.ends.tolist()
        return (os.fsdecode(packed[start:end]) for start, end in pairwise(ends))

    def sound(self) -> bool:
        """Whether the ends are those of the block."""
        ends = self.ends
        return bool(len(ends) and ends[0] == 0 and ends[-1] == len(self.packed) and (np.diff(ends) >= 0).all())


class _Texts:
    """`Texts` in the making."""

    def __init__(self) -> None:
        self._packed, self._ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self._packed += os.fsencode(text)
        self._ends.append(len(self._packed))

    def done(self) -> Texts:
        return Texts(np.frombuffer(bytes(self._packed), np.uint8), _numbers(self._ends))


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Arrays are int64; `images` of them belong to the members that are images, in order, `samples` to the samples.

    `checks` hold the CRC-32 of an image's header, -1 where an index does not know it. `starts`: the first byte of the
    headers of a sample. `digest` is a hash of all names, places, sizes and headers. `skipped` counts what is no part of
    a sample. `label_key` is that of `json` labels, None where an index holds no labels at all.
    """

    size: int
    offsets: np.ndarray
    sizes: np.ndarray
    checks: np.ndarray
    sample_of: np.ndarray
    names: Texts
    starts: np.ndarray
    cls: Texts
    json: Texts
    end: int = 0
    digest: str = ""
    label_key: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    def sound(self) -> bool:
        """Whether all numbers lie where they must."""
        images, samples = len(self.names), len(self.starts)
        return (
            all(len(each) == images for each in (self.offsets, self.sizes, self.checks, self.sample_of))
            and all(texts.sound() for texts in (self.names, self.cls, self.json))
            and len(self.cls) == len(self.json) == samples
            and bool((self.offsets >= BLOCK).all() and (self.sizes >= 0).all())
            and bool((self.offsets <= self.size).all() and (self.sizes <= self.size - self.offsets).all())
            and bool((self.sample_of >= 0).all() and (self.sample_of < samples).all())
            and bool((np.diff(self.sample_of) >= 0).all() and (np.diff(self.offsets) > 0).all())
        )

    def to_bytes(self) -> bytes:
        """As it is kept in a file: safetensors, with a hash of everything."""
        facts = {
            "version": VERSION, "size": self.size, "end": self.end, "digest": self.digest,
            "label_key": self.label_key, "skipped": self.skipped,
        }  # fmt: skip
        text = json.dumps(facts, sort_keys=True)
        arrays = self._arrays()
        return save(arrays, {"index": json.dumps([text, _hash_of(arrays, text)])})  # of several keys no order is kept

    def _arrays(self) -> dict[str, np.ndarray]:
        found = {name: getattr(self, name) for name in _NUMBERS}
        for name in _TEXTS:
            texts: Texts = getattr(self, name)
            found |= {name: texts.packed, f"{name}_ends": texts.ends}
        return found

    @classmethod
    def from_bytes(cls, content: bytes) -> ShardIndex:
        """
        Raises:
            ValueError: if it is damaged, none, or of another version.
        """
        try:
            arrays = load(content)
            length = int.from_bytes(content[:8], "little")
            text, sha256 = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["index"])
            facts = json.loads(text)
            if facts["version"] != VERSION:
                raise ValueError(f"of version {facts['version']}, not {VERSION}")
            if sha256 != _hash_of(arrays, text):
                raise ValueError("damaged")
            texts = {name: Texts(arrays[name], arrays[f"{name}_ends"]) for name in _TEXTS}
            kept = {key: facts[key] for key in ("size", "end", "digest", "label_key", "skipped")}
            index = cls(**{name: arrays[name] for name in _NUMBERS}, **texts, **kept)
        except (SafetensorError, KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError("damaged") from error
        if not index.sound():
            raise ValueError("damaged")
        return index


_NUMBERS = ("offsets", "sizes", "checks", "sample_of", "starts")
_TEXTS = ("names", "cls", "json")


def _hash_of(arrays: dict[str, np.ndarray], text: str) -> str:
    hashed = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        hashed.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        hashed.update(np.ascontiguousarray(arrays[name]))
    return hashed.hexdigest()


def _numbers(values: array[int]) -> np.ndarray:
    return np.array(values, np.int64)


# --- made by a pass over the headers ---------------------------------------------------------------------------------


def image_suffix(suffix: str, suffixes: frozenset[str]) -> bool:
    """Whether what stands behind the first dot of a name, such as `jpg` or `left.jpg`, is that of an image."""
    return f".{suffix.rpartition('.')[2]}" in suffixes


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix, in small letters, of a member; None for a name without a dot, or hidden."""
    match = _SAMPLE.fullmatch(name)
    hidden = any(part.startswith(".") for part in name.split("/"))
    return None if match is None or hidden else (match[1], match[2].lower())


class _Maker:
    """An index in the making, one member after the other."""

    def __init__(self, file: ShardBytes, suffixes: frozenset[str], label_key: str | None) -> None:
        self._file, self._suffixes, self._label_key = file, suffixes, label_key
        self._columns = {name: array("q") for name in _NUMBERS}
        self._names, self._cls, self._json = _Texts(), _Texts(), _Texts()
        self._keys = array("Q")
        self._skipped: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._key: str | None = None
        self._parts: set[str] = set()
        self._labels = {"cls": "", "json": ""}
        self._has_image = False

    def add(self, member: Member) -> None:
        self._digest.update(repr(tuple(member)).encode("utf-8", "surrogateescape"))
        name = member.name.removeprefix("./")
        found = split_name(name)
        if member.kind != "file" or found is None or _UNSAFE.search(name):
            self._skip(member.kind, name)
            return
        key, suffix = found
        if key != self._key:
            self._close()
            self._open(key, member.start)
        if suffix in self._parts:
            text = f"holds '{name[:200]}' twice in one sample (suffixes count in small letters); pack it again"
            raise self._file.fault(text)
        if len(self._parts) >= MOST_PARTS:
            raise self._file.fault(f"has a sample '{key[:200]}' of more than {MOST_PARTS:,} members; pack it again")
        self._parts.add(suffix)
        self._take(member, name, suffix)

    def _take(self, member: Member, name: str, suffix: str) -> None:
        if image_suffix(suffix, self._suffixes):
            self._has_image = True
            row = (member.offset, member.size, member.check, len(self._columns["starts"]) - 1)
            for column, value in zip(("offsets", "sizes", "checks", "sample_of"), row, strict=True):
                self._columns[column].append(value)
            self._names.append(name)
        elif suffix == "cls" and self._label_key is not None and member.size <= LONGEST_LABEL:
            self._labels["cls"] = self._file.at(member.offset, member.size).decode("utf-8", "replace").strip()
        elif suffix == "json" and self._label_key is not None and member.size <= LONGEST_JSON:
            self._labels["json"] = _label_in(self._file.at(member.offset, member.size), self._label_key)
        elif suffix not in ("cls", "json"):
            self._count(f".{suffix.rpartition('.')[2][:20]}")

    def _skip(self, kind: str, name: str) -> None:
        """Count what is no part of a sample; folders are none by nature."""
        if kind == "folder" or re.fullmatch(r"__[^/]*__", name):
            return
        if kind != "file":
            self._count({"link": "links", "sparse": "sparse files"}.get(kind, "devices and other members"))
        elif _UNSAFE.search(name):
            self._count("with names that lead out of the shard")
        elif any(part.startswith(".") for part in name.split("/")):
            self._count("hidden")
        else:
            self._count("without a suffix")

    def _count(self, what: str) -> None:
        many = what not in self._skipped and len(self._skipped) >= KINDS_COUNTED
        self._skipped["of other suffixes" if many else what] += 1

    def _open(self, key: str, start: int) -> None:
        self._key, self._parts, self._has_image = key, set(), False
        self._labels = {"cls": "", "json": ""}
        self._columns["starts"].append(start)
        hashed = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        self._keys.append(int.from_bytes(hashed, "little"))

    def _close(self) -> None:
        if self._key is None:
            return
        self._cls.append(self._labels["cls"])
        self._json.append(self._labels["json"])
        if not self._has_image:
            self._count("samples without an image")

    def done(self, end: int) -> ShardIndex:
        self._close()
        columns = {name: _numbers(values) for name, values in self._columns.items()}
        index = ShardIndex(
            self._file.size, **columns, names=self._names.done(), cls=self._cls.done(), json=self._json.done(),
            end=end, digest=self._digest.hexdigest(), label_key=self._label_key, skipped=dict(self._skipped),
        )  # fmt: skip
        self._refuse_repeated(index)
        return index

    def _refuse_repeated(self, index: ShardIndex) -> None:
        keys = np.frombuffer(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        repeated = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        if len(repeated):
            first, second = (int(index.starts[order[repeated[0] + each]]) for each in (0, 1))
            text = f"has two samples with the same name, at bytes {first:,} and {second:,}; pack it again"
            raise self._file.fault(text)


def _label_in(content: bytes, key: str) -> str:
    """A text or whole number at a key of a JSON object, as text; empty if there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    known = isinstance(value, str | int) and not isinstance(value, bool)
    text = str(value).strip() if known and not (isinstance(value, int) and abs(value) > 1 << 62) else ""
    return text if len(text) <= LONGEST_LABEL else ""


def make_index(
    store: Store,
    shard: str,
    suffixes: frozenset[str],
    *,
    label_key: str | None = LABEL_KEY,
    starts: Sequence[int] | None = None,
) -> ShardIndex:
    """Pass over a shard.

    Args:
        suffixes: of images, with their dot.
        starts: energon's: the first byte of every sample, and the end of all; threads then share the pass. Where they
            do not fit the shard, it is passed over without them.

    Raises:
        DataError: if the shard is no sound tar file or holds a sample twice.
        BrokenImage: if the store refuses the shard.
        Unreachable: if a remote store does not answer.
    """
    if starts is not None:
        try:
            return _indexed(store, shard, suffixes, label_key, starts)
        except (BrokenImage, Unreachable):
            raise
        except DataError:
            pass  # of another shard, or of this one before it changed; if it is this one's fault, it is told now
    return _indexed(store, shard, suffixes, label_key, None)


def _indexed(
    store: Store, shard: str, suffixes: frozenset[str], label_key: str | None, starts: Sequence[int] | None
) -> ShardIndex:
    file = ShardBytes(store, shard)
    maker, end = _Maker(file, suffixes, label_key), 0
    for member in members(file) if starts is None else _by_segments(file, store, starts):
        maker.add(member)
        end = member.offset + -(-member.size // BLOCK) * BLOCK
    index = maker.done(end)
    if not file.marked:
        index.skipped["shards without an end mark (cut off?)"] = 1
    return index


def _by_segments(file: ShardBytes, store: Store, starts: Sequence[int]) -> Iterator[Member]:
    """All members, several segments of samples at a time, of which no more than one for each thread is held."""
    cuts = [*starts[:-1:SEGMENT], starts[-1]]
    cuts[0] = 0  # a first header for all members belongs to no sample
    segments = list(pairwise(cuts))

    def walk(segment: tuple[int, int]) -> list[Member]:
        return list(members(ShardBytes(store, file.name, file.size), *segment))

    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(segments), THREADS):
            for found in pool.map(walk, segments[first : first + THREADS]):
                yield from found
    yield from members(file, starts[-1])


# --- indices that are there ------------------------------------------------------------------------------------------


def energon_bytes(index: ShardIndex) -> bytes:
    """energon's `.tar.idx`: the first byte of every sample and the end of the last one, 8 bytes each."""
    return np.append(index.starts, index.end).astype("<u8").tobytes()


def energon_starts(content: bytes, size: int) -> list[int] | None:
    """The numbers of a `.tar.idx` for a shard of so many bytes, or None if it cannot be one of it."""
    if len(content) < 16 or len(content) % 8:
        return None
    numbers = np.frombuffer(content, "<u8")
    rising = bool((numbers[1:] > numbers[:-1]).all() and (numbers % BLOCK == 0).all())
    return numbers.tolist() if rising and int(numbers[-1]) <= size else None


def dali_members(content: bytes, size: int) -> Iterator[Member] | None:
    """The members in DALI's `.idx` (v1.2: "suffix offset size name" of each, a sample in a line), or None.

    Names with blanks break the format, and those that GNU tar writes with a backslash are not those of the shard: such
    an index is not used. It says nothing of headers, hence -1 as a check.
    """
    try:
        lines = content.decode("utf-8").splitlines()
        version, count = lines[0].split()
        rows = [line.split(" ") for line in lines[1:]]
        if version != "v1.2" or int(count) != len(rows) or any(not row or len(row) % 4 for row in rows):
            return None
        found = [
            Member(name, "file", int(offset) - BLOCK, int(offset), int(length), -1)
            for row in rows
            for _, offset, length, name in zip(*(row[part::4] for part in range(4)), strict=True)
        ]
    except (ValueError, IndexError):
        return None
    within = all(each.offset >= BLOCK and 0 <= each.size <= size - each.offset for each in found)
    straight = all(each.offset % BLOCK == 0 and "\\" not in each.name for each in found)
    rising = all(one.offset < other.offset for one, other in pairwise(found))
    return iter(found) if within and straight and rising else None


def index_of(
    store: Store,
    shard: str,
    suffixes: frozenset[str],
    *,
    label_key: str | None,
    beside: Callable[[str], tuple[Store, str] | None],
    say: Callable[[str], None] = lambda text: None,
) -> ShardIndex:
    """The index of a shard: ours, else DALI's where no labels are wanted, else by a pass, which `say` is told.

    Args:
        label_key: of `json` members; None if no labels are wanted.
        beside: where a file of that name lies, None if it is not there.

    Raises:
        As `make_index`.
    """
    size = store.size(shard)
    why = "it has no index"
    if (content := _content(beside(shard + OURS))) is not None:
        try:
            index = ShardIndex.from_bytes(content)
            why = _unfit(index, size, label_key)
            if not why:
                return index
        except ValueError as error:
            why = f"its index is {error}"
    elif label_key is None and (content := _content(beside(shard.removesuffix(".tar") + ".idx"))) is not None:
        if (found := dali_members(content, size)) is not None:
            maker = _Maker(ShardBytes(store, shard, size), suffixes, None)
            for member in found:
                maker.add(member)
            return maker.done(0)
        why = "its .idx is none of DALI's v1.2 for it"
    starts = energon_starts(content, size) if (content := _content(beside(shard + ENERGON))) is not None else None
    say(f"'{shard}': {why}")
    return make_index(store, shard, suffixes, label_key=label_key or LABEL_KEY, starts=starts)


def _unfit(index: ShardIndex, size: int, label_key: str | None) -> str:
    if index.size != size:
        return f"its index is of a shard of {index.size:,} bytes, and it has {size:,}"
    if label_key is not None and index.label_key != label_key:
        return f"its index holds labels of the json key '{index.label_key}', not '{label_key}'"
    return ""


def _content(place: tuple[Store, str] | None) -> bytes | None:
    """What an index holds, None where it is not there."""
    if place is None:
        return None
    try:
        return place[0].read(place[1])
    except BrokenImage:
        return None


def checked_image(block: bytes, size: int, check: int) -> bytes:
    """The image behind its header, as they stand together in a shard.

    Raises:
        ValueError: if the shard has something else there than when the index was made.
        EOFError: if it ends before.
    """
    if len(block) != BLOCK + size:
        raise EOFError(f"{max(0, len(block) - BLOCK):,} bytes of {size:,}")
    header = block[:BLOCK]
    if check >= 0:
        fits = zlib.crc32(header) == check
    else:
        try:
            told = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            fits = told.isfile() and told.size == size
        except tarfile.HeaderError:
            fits = False
    if not fits:
        raise ValueError("the shard has changed since its index was made")
    return block[BLOCK:]
