"""TIFF files whose pixels have more samples, or deeper ones, than Pillow tells apart. Start at `open_bands`.

libtiff decodes, through Pillow. It is shown the same file under another directory: the bytes of a pixel as pixels side
by side, and where the file keeps its bands apart, one band at a time.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image as pil

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION = (
    256, 257, 258, 259, 262, 266, 273, 274,
)  # fmt: skip
SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, PREDICTOR, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES = (
    277, 278, 279, 284, 317, 322, 323, 324, 325,
)  # fmt: skip
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
_USED = {
    WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP,
    STRIP_BYTES, PLANAR, PREDICTOR, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES, EXTRA_SAMPLES, SAMPLE_FORMAT,
}  # fmt: skip
_WIDE = {STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES, WIDTH, LENGTH, ROWS_PER_STRIP}
_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of numbers in a directory
_GREY, _RGB = 1, 2
_ALPHA = (1, 2)
_LOSSLESS = {1, 5, 8, 32773, 32946, 34925, 50000}  # none, LZW, deflate, PackBits, deflate, LZMA, Zstandard
_KINDS = {1: "u", 2: "i", 3: "f"}
_READABLE = {"u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"}
_DIFFERENCES = 2
MAX_BYTES = 2**30
"""Pixels of one page that are read, all bands together."""

Tags = dict[int, tuple[int, ...]]


class UnreadableBands(Exception):
    """A file that is whole, but of a kind that is not read."""


@dataclass(frozen=True)
class Bands:
    """One page of a TIFF: `size` (height, width) as stored, `dtype` of its samples, and how many a pixel has.

    `alpha`: the file calls its last sample alpha.
    """

    data: bytes
    order: str
    tags: Tags

    @property
    def size(self) -> tuple[int, int]:
        return self.tags[LENGTH][0], self.tags[WIDTH][0]

    @property
    def num_bands(self) -> int:
        return self.tags[SAMPLES][0]

    @property
    def alpha(self) -> bool:
        return self.tags.get(EXTRA_SAMPLES, (0,))[-1] in _ALPHA

    @property
    def colour(self) -> bool:
        return self.tags.get(PHOTOMETRIC, (_GREY,))[0] == _RGB

    @property
    def orientation(self) -> int:
        return self.tags.get(ORIENTATION, (1,))[0]

    @property
    def dtype(self) -> str:
        """Kind and bytes of a sample, such as u2; 12 bits count as those 2 bytes.

        Raises:
            UnreadableBands: if bands differ in it.
        """
        bits, kinds = set(self.tags.get(BITS, (1,))), set(self.tags.get(SAMPLE_FORMAT, (1,)))
        if len(bits) != 1 or len(kinds) != 1:
            raise UnreadableBands("its bands differ in depth or kind")
        return f"{_KINDS.get(kinds.pop(), '?')}{-(-bits.pop() // 8)}"

    @property
    def read_by_pillow(self) -> bool:
        """Whether Pillow sees all there is: one sample of up to 16 bits, or bytes of a colour and of its alpha."""
        colours = {_GREY: 1, _RGB: 3}.get(self.tags.get(PHOTOMETRIC, (_GREY,))[0])
        if colours is None:
            return True
        bits, unsigned = set(self.tags.get(BITS, (1,))), set(self.tags.get(SAMPLE_FORMAT, (1,))) == {1}
        if self.num_bands == 1:
            return unsigned and max(bits) <= 16
        return unsigned and bits == {8} and self.num_bands - self.alpha == colours

    def read(self) -> np.ndarray:
        """(H, W, bands) as stored.

        Raises:
            UnreadableBands: if the kind of file is not read.
        """
        bits = self.tags.get(BITS, (1,))[0]
        if self.dtype not in _READABLE or bits % 8:
            raise UnreadableBands(f"{self.num_bands} bands of {bits} bits and kind {self.dtype} are not read")
        if self.tags.get(COMPRESSION, (1,))[0] not in _LOSSLESS:
            raise UnreadableBands(f"TIFF compression {self.tags[COMPRESSION][0]} of {self.num_bands} bands is not read")
        if (size := math.prod(self.size) * self.num_bands * np.dtype(self.dtype).itemsize) > MAX_BYTES:
            raise UnreadableBands(f"{size:,} bytes of pixels, more than {MAX_BYTES:,}")
        if self.tags.get(PREDICTOR, (1,))[0] not in (1, _DIFFERENCES):
            raise UnreadableBands("the floating-point predictor is not read; save without predictor")
        if self.tags.get(PLANAR, (1,))[0] != 2:
            return self._decoded(self.tags, self.num_bands)
        bands = []
        for number in range(self.num_bands):
            own = {}
            for tag in (STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES):
                if tag in self.tags:
                    length = len(self.tags[tag]) // self.num_bands
                    own[tag] = self.tags[tag][number * length : (number + 1) * length]
            bands.append(self._decoded({**self.tags, **own}, 1))
        return np.concatenate(bands, axis=2)

    def _decoded(self, tags: Tags, count: int) -> np.ndarray:
        """(H, W, count) of a directory whose pixels have so many samples."""
        height, width = self.size
        kind = np.dtype(self.dtype)
        bytes_of_pixel = count * kind.itemsize
        one = {tag: value for tag, value in tags.items() if tag not in (EXTRA_SAMPLES, ORIENTATION)}
        one |= {tag: (tags[tag][0] * bytes_of_pixel,) for tag in (WIDTH, TILE_WIDTH) if tag in tags}
        one |= {SAMPLES: (1,), PLANAR: (1,), PHOTOMETRIC: (_GREY,), BITS: (8,), SAMPLE_FORMAT: (1,), PREDICTOR: (1,)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pil.open(io.BytesIO(with_directory(self.data, self.order, one)), formats=["TIFF"])
        stored = np.array(image).view(kind.newbyteorder(self.order))
        values = stored.astype(kind).reshape(height, width, count)
        if tags.get(PREDICTOR) == (_DIFFERENCES,):  # to the pixel on the left, within a tile
            step = tags.get(TILE_WIDTH, tags[WIDTH])[0]
            for left in range(0, width, step):
                part = values[:, left : left + step]
                np.cumsum(part, axis=1, dtype=part.dtype, out=part)
        return values


def open_bands(data: bytes, page: int = 0) -> Bands | None:
    """A page of a TIFF; None if the bytes are none, or Pillow reads all of it."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return None
    (magic,) = struct.unpack_from(f"{order}H", data, 2)
    if magic not in (42, 43):
        return None
    tags = _directory(data, order, page, big=magic == 43)
    if tags is None or not {WIDTH, LENGTH} <= tags.keys():
        return None
    bands = Bands(data, order, {SAMPLES: (1,), **tags})
    return None if bands.read_by_pillow else bands


def _directory(data: bytes, order: str, page: int, *, big: bool) -> Tags | None:
    """The tags of a page that matter here; None if there are not so many pages."""
    pointer, count_code, entry_size, inline = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 4)
    (place,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
    for _ in range(page):
        (count,) = struct.unpack_from(order + count_code, data, place)
        (place,) = struct.unpack_from(
            order + pointer, data, place + struct.calcsize("=" + count_code) + count * entry_size
        )
        if not place:
            return None
    (count,) = struct.unpack_from(order + count_code, data, place)
    first = place + struct.calcsize("=" + count_code)
    tags: Tags = {}
    for entry in range(first, min(first + count * entry_size, len(data)), entry_size):
        tag, kind, length = struct.unpack_from(f"{order}HH{pointer}", data, entry)
        if tag not in _USED or tag in tags or kind not in _CODES:
            continue
        value = entry + 4 + inline
        code = f"{order}{length}{_CODES[kind]}"
        if length * struct.calcsize("=" + _CODES[kind]) > inline:
            (value,) = struct.unpack_from(order + pointer, data, value)
        tags[tag] = struct.unpack_from(code, data, value)
    return tags


def with_directory(data: bytes, order: str, tags: Tags) -> bytes:
    """The file with another directory, which is put behind it, as its only one."""
    data += b"\0" * (len(data) % 2)
    entries, arrays = [], b""
    end = len(data) + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        kind, code = (4, "I") if tag in _WIDE else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            value = struct.pack(f"{order}I", end + len(arrays))
            arrays += packed + b"\0" * (len(packed) % 2)
        else:
            value = packed.ljust(4, b"\0")
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(values)) + value)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + b"\0" * 4
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(f"{order}HI", 42, len(data)) + data[8:] + directory + arrays
