"""What a tar file holds, from its headers alone: nothing is extracted, and of a hostile file nothing is believed.

Names are those of webdataset: a sample is a run of members whose names agree up to the first dot of the base name.
Start at `members`.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from mim_framework.base.errors import DataError
from mim_framework.data.stores import Store

BLOCK = tarfile.BLOCKSIZE
"""Bytes: every header is one block, and what follows is filled up to whole ones."""
WINDOW = 1 << 20
"""Bytes read at a time of a local shard; small members are passed over inside, large ones are jumped over."""
REMOTE_WINDOW = 8 << 20
"""The same behind a network, where a request costs as much as some megabytes."""
LONGEST_EXTRA = 1 << 20
"""Bytes of a long name, or of the records before a member; larger ones are an attack on the memory."""
LOOKED_BEHIND = 1 << 20
"""So many bytes after the end mark are looked at for a further archive."""

Kind = Literal["file", "folder", "link", "sparse", "other"]
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file"),
    **dict.fromkeys((tarfile.SYMTYPE, tarfile.LNKTYPE), "link"),
    tarfile.DIRTYPE: "folder",
    tarfile.GNUTYPE_SPARSE: "sparse",
}


class Member(NamedTuple):
    """`start`: the first byte of its headers. `offset`, `size`: its data. `check`: CRC-32 of the header before that."""

    name: str
    kind: Kind
    start: int
    offset: int
    size: int
    check: int


class ShardBytes:
    """The bytes of a shard, read in windows."""

    def __init__(self, store: Store, name: str, size: int | None = None) -> None:
        self._store, self.name = store, name
        self.size = store.size(name) if size is None else size
        self._window = REMOTE_WINDOW if store.remote else WINDOW
        self._first, self._bytes = 0, b""
        self.marked = False
        """Whether the end mark was met, which is missing where a shard was cut off behind a member."""

    def at(self, start: int, length: int) -> bytes:
        """Bytes from `start`, fewer only at the end."""
        if not self._first <= start <= start + length <= self._first + len(self._bytes):
            wanted = min(max(length, self._window), self.size - start)
            self._first, self._bytes = start, self._store.read(self.name, start, wanted) if wanted > 0 else b""
        begin = start - self._first
        return self._bytes[begin : begin + length]

    def fault(self, text: str) -> DataError:
        return DataError(f"data.source: shard '{self.name}' {text}")


def members(file: ShardBytes, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Every member from `start` on, in order: to `end`, or with none to the end mark (see `ShardBytes.marked`).

    Raises:
        DataError: if it is no tar file, damaged, cut off, or says what cannot be.
        BrokenImage: if the store refuses the shard.
        Unreachable: if a remote store does not answer.
    """
    position, first, extra = start, start, _Extra()
    stop = file.size if end is None else end
    while position < stop:
        block = file.at(position, BLOCK)
        if len(block) < BLOCK:
            raise file.fault(f"is cut off: it ends inside the header at byte {position}; copy it again")
        if end is None and block.count(0) == BLOCK:
            _nothing_behind(file, position)
            file.marked = True
            return
        header = _header(file, block, position)
        offset = header.offset_data = position + BLOCK
        if header.type in _EXTRA_TYPES:
            extra = _with_extra(file, header, extra, offset)
            position = offset + _filled(header.size)
            continue
        member = _member(file, header, extra, first, block)
        yield member
        position = first = member.offset + _filled(member.size)
        extra = _Extra()
    if end is not None and position != end:
        raise file.fault(f"has no member that ends at byte {end}")


class _Extra(NamedTuple):
    """What the headers before a member say of it."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


_CONTINUED = 482
"""The byte of a sparse header that says whether more such blocks follow."""
_WITHOUT_DATA = frozenset(tarfile.SUPPORTED_TYPES) - frozenset(tarfile.REGULAR_TYPES)
"""Links, folders and devices have none, whatever their header says."""
_EXTRA_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")


def _filled(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(file: ShardBytes, block: bytes, position: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        if position == 0:
            raise file.fault("is no tar file; compressed ones must be unpacked first (gunzip)") from error
        text = f"is damaged at byte {position}, where a header should be ({error}); copy or pack it again"
        raise file.fault(text) from error
    if header.size < 0:
        raise file.fault(f"is damaged or hostile: the header at byte {position} says a size of {header.size}")
    return header


def _with_extra(file: ShardBytes, header: tarfile.TarInfo, extra: _Extra, offset: int) -> _Extra:
    """What is known of the next member after one more header before it."""
    if header.size > LONGEST_EXTRA:
        raise file.fault(
            f"is damaged or hostile: before byte {offset} stands a name or record of {header.size:,} bytes, more than "
            f"{LONGEST_EXTRA:,}"
        )
    content = file.at(offset, header.size)
    if len(content) < header.size:
        raise file.fault(f"is cut off: it ends inside the long name at byte {offset}; copy it again")
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return extra._replace(name=_text(content.split(b"\0", 1)[0]))
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return extra
    records = dict(_records(file, content, offset))
    if header.type == tarfile.XGLTYPE:
        if records.keys() & {b"path", b"size"}:
            raise file.fault(f"is hostile: the record at byte {offset} gives all members one name or size")
        return extra
    if b"path" in records:
        extra = extra._replace(name=_text(records[b"path"]))
    if b"size" in records:
        extra = extra._replace(size=_number(file, records[b"size"], offset))
    return extra._replace(sparse=extra.sparse or any(key.startswith(b"GNU.sparse") for key in records))


def _records(file: ShardBytes, content: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of a pax header: "LENGTH KEY=VALUE" and a line feed, where LENGTH counts all of it."""
    position = 0
    while position < len(content) and content[position]:
        length_text, space, _ = content[position : position + 21].partition(b" ")
        length = int(length_text) if space and length_text.isdigit() else 0
        record = content[position : position + length]
        key, equals, value = record[len(length_text) + 1 : -1].partition(b"=")
        if not key or not equals or len(record) < length or not record.endswith(b"\n"):
            raise file.fault(f"is damaged in the pax record at byte {offset + position}; copy or pack it again")
        yield key, value
        position += length


def _number(file: ShardBytes, text: bytes, offset: int) -> int:
    if not text.isdigit() or len(text) > 20:
        shown = text[:20].decode("ascii", "replace")
        raise file.fault(f"is damaged or hostile: the pax record at byte {offset} says a size of '{shown}'")
    return int(text)


def _member(file: ShardBytes, header: tarfile.TarInfo, extra: _Extra, start: int, block: bytes) -> Member:
    """The member of a header, which `block` is; `start` is that of the headers before it."""
    name = header.name if extra.name is None else extra.name
    kind = _KINDS.get(header.type, "other")
    if kind == "file" and (name.endswith("/") or extra.sparse):
        kind = "sparse" if extra.sparse else "folder"
    if header.type == tarfile.GNUTYPE_SPARSE and block[_CONTINUED]:
        raise file.fault(f"holds '{name[:200]}' in many pieces (sparse), which no image needs; pack it again")
    offset = header.offset_data
    size = header.size if extra.size is None else extra.size
    if header.type in _WITHOUT_DATA:
        size = 0
    if offset + size > file.size:
        left = file.size - offset
        text = f"is cut off: '{name[:200]}' should have {size:,} bytes, of which {left:,} are there; copy it again"
        raise file.fault(text)
    return Member(name, kind, start, offset, size, zlib.crc32(block))


def _nothing_behind(file: ShardBytes, position: int) -> None:
    """
    Raises:
        DataError: if more than zeros stands after the end mark, such as a second archive.
    """
    behind = file.at(position, min(LOOKED_BEHIND, file.size - position))
    if behind.count(0) != len(behind):
        text = f"goes on after its end mark at byte {position}, as joined archives do; pack it again"
        raise file.fault(text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
