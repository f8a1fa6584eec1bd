"""Encoded images to pixels: what is read, what is refused and why, and no more decoding than a crop needs.

Pillow is the floor and the judge: it reads every header, and whatever it refuses is refused. torchcodec, where it is
installed, takes over whole JPEGs in plain RGB, where its pixels are the same. The policy for odd images:

- EXIF orientation is always applied; a damaged EXIF block counts as none. Colour profiles are ignored.
- Values deeper than 8 bits are scaled by the range that the caller gives, or the file states (a depth of 12 bits, the
  largest value of a PGM). 16 bits state none, since most cameras and scanners fill a part of them; as 32-bit and float
  images, they are refused without a range.
- Transparent pixels are composited on white, as a viewer shows them; what lies beneath them is arbitrary. A TIFF whose
  fourth band is called alpha is refused unless the caller says what it is; one that is not called so is measured.
- CMYK, palette, greyscale and bilevel images become RGB, or grey where one channel is wanted. Other numbers of channels
  are those of the file.
- Of several pages or frames one is taken.
- A truncated file is broken even if its beginning could be shown.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as pil
from torch import Tensor
from torch.nn.functional import interpolate

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.data.tiff import Bands, UnreadableBands, open_bands
from mim_framework.data.values import (
    GREY,
    RGB,
    Alpha,
    Depth,
    Range,
    UnsupportedValues,
    Wanted,
    called_alpha,
    depth_of,
    to_tensor,
)

JpegBackend = Literal["auto", "pillow", "torchcodec"]
"""What decodes plain JPEGs; `auto` is the faster one that is installed."""
Interpolation = Literal["bicubic", "bilinear", "lanczos"]
"""Filters of a resize, always with antialiasing."""

MAX_PIXELS = 64_000_000
"""Default limit on the pixels of one image: above every camera in common use, below what exhausts a data worker."""
PILLOW_MAX_PIXELS = 2 * 89_478_485
"""The limit that Pillow itself has, and that `max_pixels` cannot exceed."""

# Raster formats only: others that Pillow opens run external programs (EPS) or hold no picture.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_RESAMPLING = {
    "bicubic": pil.Resampling.BICUBIC,
    "bilinear": pil.Resampling.BILINEAR,
    "lanczos": pil.Resampling.LANCZOS,
}

# EXIF orientation -> (exchange rows and columns, then reverse the rows, reverse the columns)
_ORIENTATIONS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def open_image(
    data: Any,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    decoder: JpegBackend = "auto",
    scaled_decode: bool = True,
    in_chans: int = RGB,
    value_range: Range | None = None,
    alpha: Alpha = "auto",
    page: int = 0,
) -> Image:
    """Read the header of an image; its pixels are decoded when `Image.crop` asks for them.

    Args:
        data: encoded bytes, a Pillow image, or an array (H, W) or (H, W, bands): uint8, or of values that `value_range`
            is for.
        name: names the sample in messages.
        max_pixels: images whose header claims more are refused before anything is decoded.
        decoder: what decodes whole RGB JPEGs; `auto` takes torchcodec if it is installed, else Pillow.
        scaled_decode: decode a JPEG at 1/2, 1/4 or 1/8 size where a crop still has twice the resolution it needs.
        in_chans: channels of the crops: 1 is grey, 3 is RGB, another number must be that of the file's bands.
        value_range: the values that become 0 and 255, in files deeper than 8 bits.
        alpha: `white` composites on it, `drop` leaves the band out, `keep` takes it for a channel; `auto` is `white`,
            but refuses a TIFF, as many writers call any fourth band alpha.
        page: of a file of several pages or frames, from 0.

    Raises:
        BrokenImage: if the image cannot be used.
        DataError: if `decoder` is `torchcodec`, which cannot be imported.
    """
    wanted = Wanted(in_chans, value_range, alpha)
    if not isinstance(data, bytes):
        found = data if isinstance(data, pil.Image) else _from_array(data, name)
        _check_size(found, name, max_pixels)
        return Image(found, None, name, wanted=wanted)
    if not data:
        raise BrokenImage(name, "empty", "the file has no bytes")
    decode_jpeg = jpeg_decoder(decoder)
    try:
        opened = open_bands(data, page) or _open(data, page)
        _check_size(opened, name, max_pixels)
        return Image(opened, data, name, torchcodec=decode_jpeg, scaled_decode=scaled_decode, wanted=wanted, page=page)
    except UnidentifiedImageError:
        detail = f"no picture in a format that is read ({', '.join(_formats())}); it begins with {data[:16]!r}"
        raise BrokenImage(name, "not_an_image", detail) from None
    except UnsupportedValues as error:
        raise BrokenImage(name, "unsupported", str(error)) from None
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:
        raise _broken(name, error) from error


class Image:
    """A picture whose header has been read. `size` is (height, width) as it is meant to be seen.

    Decoded pixels are kept, so that a second crop costs its resize only, unless it needs a finer scale than the first.
    """

    def __init__(
        self,
        image: pil.Image | Bands | Array,
        data: bytes | None,
        name: str,
        *,
        torchcodec: Callable | None = None,
        scaled_decode: bool = False,
        wanted: Wanted = Wanted(),
        page: int = 0,
    ) -> None:
        self.name = name
        self._wanted = wanted
        self._file = image
        self._data, self._page = data, page
        self._scales: tuple[int, ...] = ()
        self._torchcodec = None
        self._depth: Depth | None = None
        self._range: Range | None = None
        if isinstance(image, pil.Image):
            self._depth = depth_of(image, data)  # before a PNG is loaded for its orientation
            orientation, stored = _orientation(image), image.size[::-1]
            if image.format == "TIFF" and image.has_transparency_data and wanted.alpha == "auto":
                raise UnsupportedValues(called_alpha(len(image.getbands())))
            if image.format in ("JPEG", "MPO") and scaled_decode and not page:
                self._scales = (8, 4, 2)
            if image.format == "JPEG" and image.mode == "RGB" and orientation == 1 and wanted.in_chans == RGB:
                self._torchcodec = torchcodec
        else:
            orientation, stored = image.orientation, image.size
        self._transpose, self._flip_rows, self._flip_columns = _ORIENTATIONS.get(orientation, _ORIENTATIONS[1])
        self.size: tuple[int, int] = stored[::-1] if self._transpose else stored
        self._pixels: pil.Image | Tensor | None = None
        self._scale = 1

    def crop(
        self,
        top: int,
        left: int,
        height: int,
        width: int,
        out_size: tuple[int, int],
        flip: bool = False,
        interpolation: Interpolation = "bicubic",
    ) -> Tensor:
        """A region of the full-resolution image, resized with antialiasing: uint8 (C, *out_size).

        Pixels outside of the region do not bleed into it. With `scaled_decode` a JPEG may be decoded at a lower scale,
        as long as the region keeps twice the output resolution; on photographs the result is then within 1.5 of 255
        levels of the full decode on average.

        Args:
            flip: mirror the result horizontally.

        Raises:
            BrokenImage: if the pixels cannot be decoded.
        """
        scale = self._scale_for(height, width, out_size)
        top, left, height, width = self._to_file_frame(top, left, height, width)
        if self._transpose:
            out_size = out_size[::-1]
        with self._broken_if_it_fails():
            pixels = self._decode(scale)
            box = [edge / self._scale for edge in (left, top, left + width, top + height)]
            resized = _resized_crop(pixels, box, out_size, interpolation, self._wanted, self._range)
        if self._transpose:
            resized = resized.transpose(1, 2)
        dims = [dim for dim, reverse in ((1, self._flip_rows), (2, self._flip_columns != flip)) if reverse]
        return (resized.flip(dims) if dims else resized).contiguous()

    def change(
        self, adjust: Callable[[pil.Image], pil.Image], height: int, width: int, out_size: tuple[int, int]
    ) -> None:
        """Change the pixels of the whole picture, such as its colours, before regions are cut from it.

        Args:
            adjust: RGB or grey picture -> another of the same kind and size.
            height, width, out_size: of the most detailed `crop` that will follow, which decides the scale.

        Raises:
            BrokenImage: if the pixels cannot be decoded.
            ValueError: if crops have other numbers of channels than 1 or 3.
        """
        if self._wanted.in_chans not in (1, RGB):
            raise ValueError(
                f"only grey and RGB pictures can be changed, this one has {self._wanted.in_chans} channels"
            )
        with self._broken_if_it_fails():
            pixels = self._decode(self._scale_for(height, width, out_size))
            whole = pixels if isinstance(pixels, Tensor) else self._wanted.eight_bit(pixels, self._range)
            self._pixels = adjust(_to_pillow(whole))
        self._range = None

    @contextmanager
    def _broken_if_it_fails(self) -> Iterator[None]:
        """The bytes are foreign: whatever decoding them raises is told as a broken image."""
        try:
            yield
        except MemoryError:
            raise
        except (UnsupportedValues, UnreadableBands) as error:
            raise BrokenImage(self.name, "unsupported", str(error)) from None
        except Exception as error:
            raise _broken(self.name, error) from error

    def _scale_for(self, height: int, width: int, out_size: tuple[int, int]) -> int:
        """The coarsest scale at which a region keeps twice the resolution it needs."""
        return next((s for s in self._scales if height >= 2 * s * out_size[0] and width >= 2 * s * out_size[1]), 1)

    def _to_file_frame(self, top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        """A box in the oriented image to the same box in the image as stored."""
        if self._flip_rows:
            top = self.size[0] - top - height
        if self._flip_columns:
            left = self.size[1] - left - width
        return (left, top, width, height) if self._transpose else (top, left, height, width)

    def _decode(self, scale: int) -> pil.Image | Tensor:
        """The pixels as stored, at 1/scale size or finer; `self._scale` is the scale they have."""
        if self._pixels is not None and self._scale <= scale:
            return self._pixels
        if not isinstance(self._file, pil.Image):
            self._pixels = self._bands(self._file)
            return self._pixels
        if self._pixels is not None:  # decoded too coarsely for this crop: Pillow decodes a file only once
            self._file = _open(self._data, self._page)
        self._scale = scale if scale > 1 and self._draft(scale) else 1
        if self._scale == 1 and self._torchcodec is not None:
            try:
                self._pixels = self._torchcodec(self._data)
                return self._pixels
            except RuntimeError:  # Pillow judges, and says what is wrong in plain words
                self._torchcodec = None
        self._file.load()
        self._pixels = self._file
        if self._depth is not None:
            what = f"pixels of Pillow mode '{self._file.mode}'" if not self._depth.high_byte else "16-bit colours"
            self._range = self._wanted.range_of(self._depth, self._file, what)
        return self._pixels

    def _bands(self, stored: Bands | Array) -> Tensor:
        """uint8 (C, H, W) of values that do not go through Pillow."""
        values = stored.read()
        value_range = None
        if values.dtype != np.uint8:
            bands = values.shape[2]
            what = f"{bands} bands of {values.dtype}" if bands > 1 else f"pixels of {values.dtype}"
            value_range = self._wanted.range_of(Depth(), values, what)
        return self._wanted.of_bands(values, value_range, alpha=stored.alpha, colour=stored.colour)

    def _draft(self, scale: int) -> bool:
        """Ask libjpeg for 1/scale size."""
        width, height = self._file.size
        return self._file.draft(None, (width // scale, height // scale)) is not None


DECODED = "decoded by the source"
"""The format of what is no file."""
_MODES_IN_WORDS = {
    "1": "bilevel, 1 bit", "L": "grey, 8 bit", "LA": "grey with alpha, 8 bit", "P": "palette, 8 bit",
    "PA": "palette with alpha, 8 bit", "RGB": "RGB, 8 bit", "RGBX": "RGB, 8 bit", "RGBA": "RGB with alpha, 8 bit",
    "CMYK": "CMYK, 8 bit", "YCbCr": "YCbCr, 8 bit", "LAB": "Lab, 8 bit", "I;16": "grey, 16 bit",
    "I": "grey, 32 bit", "F": "grey, 32 bit float",
}  # fmt: skip


@dataclass(frozen=True)
class Native:
    """`pixels`: a picture `L` or `RGB` of bytes, transparent ones on white, or numbers of the file (H, W, bands).

    `stated`: the range of the numbers, where the file says it. `alpha`: a TIFF calls its last band so, which is kept.
    """

    pixels: pil.Image | np.ndarray
    stated: Range | None = None
    alpha: bool = False


def kind_of(image: Image) -> tuple[str, str]:
    """Format and mode of the file in words, such as ("JPEG", "RGB, 8 bit").

    Raises:
        BrokenImage: if bands differ in depth.
    """
    stored = image._file
    if not isinstance(stored, pil.Image):
        with image._broken_if_it_fails():
            kind, num_bytes = stored.dtype[0], int(stored.dtype[1:])
            count = stored.num_bands
        values = {"u": "", "i": " signed", "f": " float"}.get(kind, f" of kind {kind}")
        bands = "grey" if count == 1 else f"{count} bands"
        format = "TIFF" if isinstance(stored, Bands) else DECODED
        return format, f"{bands}, {8 * num_bytes} bit{values}"
    mode = "I;16" if stored.mode.startswith("I;16") else stored.mode
    name = _MODES_IN_WORDS.get(mode, f"Pillow mode {mode}")
    if image._depth is not None and image._depth.high_byte:
        name = name.replace("8 bit", "16 bit")
    return stored.format or DECODED, name


def is_transparent(image: Image) -> bool:
    """Whether its file says which pixels are transparent."""
    stored = image._file
    return stored.has_transparency_data if isinstance(stored, pil.Image) else stored.alpha


def native_of(image: Image) -> Native:
    """All pixels at full resolution, as they are before a recipe says what becomes of them.

    Raises:
        BrokenImage: if the pixels cannot be decoded.
    """
    stored = image._file
    with image._broken_if_it_fails():
        if not isinstance(stored, pil.Image):
            return Native(stored.read(), alpha=stored.alpha)
        stored.load()
        depth, alpha = image._depth, stored.format == "TIFF" and stored.has_transparency_data
        if depth is not None and not depth.high_byte:
            numbers = np.asarray(stored)
            scaled = numbers if depth.unit == 1 else np.rint(numbers / depth.unit).astype(np.uint16)
            return Native(scaled.reshape(*scaled.shape[:2], -1), depth.stated)
        if alpha and stored.mode in ("LA", "RGBA"):
            return Native(np.asarray(stored), alpha=True)
        channels = GREY if stored.mode in ("1", "L", "LA") else RGB
        picture = Wanted(channels, alpha="white").eight_bit(stored, None)
        if depth is None:
            return Native(picture)
        numbers = np.asarray(picture).astype(np.uint16) * 257
        return Native(numbers.reshape(*numbers.shape[:2], -1), depth.stated)


def _resized_crop(
    pixels: pil.Image | Tensor,
    box: list[float],
    out_size: tuple[int, int],
    interpolation: str,
    wanted: Wanted,
    value_range: Range | None,
) -> Tensor:
    """box (left, top, right, bottom) of `pixels`, whole or fractional -> uint8 (C, *out_size)."""
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    whole = box == [left, top, right, bottom]
    if isinstance(pixels, Tensor):
        region = pixels[:, top:bottom, left:right]
    else:
        region = wanted.eight_bit(pixels.crop((left, top, right, bottom)), value_range)
    if whole and interpolation != "lanczos":
        # torch resizes uint8 about four times faster than Pillow, to within 2 levels of it
        batch = to_tensor(region)[None]
        return interpolate(batch, out_size, mode=interpolation, antialias=True, align_corners=False)[0]
    inside = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return _resized_by_pillow(region, inside, out_size, _RESAMPLING[interpolation])


def _resized_by_pillow(region: pil.Image | Tensor, box: Any, out_size: tuple[int, int], filter: Any) -> Tensor:
    if isinstance(region, Tensor) and len(region) not in (1, RGB):
        return torch.cat([_resized_by_pillow(band[None], box, out_size, filter) for band in region])
    return to_tensor(_to_pillow(region).resize(out_size[::-1], filter, box=box))


def _to_pillow(image: pil.Image | Tensor) -> pil.Image:
    """The inverse of `to_tensor`."""
    if not isinstance(image, Tensor):
        return image
    return pil.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())


def _orientation(image: pil.Image) -> int:
    """EXIF orientation that is left for us to apply, 1 to 8."""
    if image.format == "TIFF":  # rotated by Pillow itself as it loads
        return 1
    if image.format == "PNG":  # the EXIF of a PNG may follow its pixels
        image.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except (SyntaxError, ValueError, TypeError, KeyError, struct.error):  # a damaged EXIF block counts as none
            orientation = 1
    return orientation if orientation in _ORIENTATIONS else 1


def _open(data: bytes, page: int = 0) -> pil.Image:
    with warnings.catch_warnings():
        # Pillow warns about damaged EXIF and about large images; the first is harmless, the second is checked here.
        warnings.simplefilter("ignore")
        image = pil.open(io.BytesIO(data), formats=_formats())
        if page:
            image.seek(page)
        return image


def num_pages(data: bytes | str) -> int:
    """Pages or frames of an encoded image, from its headers; 1 if it cannot be opened.

    Args:
        data: the bytes, or the path of a file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pil.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats()) as image:
                return max(1, getattr(image, "n_frames", 1))
    except MemoryError:
        raise
    except Exception:  # the bytes are foreign; who reads the image says what is wrong with it
        return 1


@cache
def _formats() -> list[str]:
    """Those of `_FORMATS` with which this Pillow was built."""
    pil.init()
    return [name for name in _FORMATS if name in pil.OPEN]


@dataclass(frozen=True)
class Array:
    """Values (H, W, bands) that a source has decoded itself."""

    values: np.ndarray
    orientation = 1
    alpha = False

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_bands(self) -> int:
        return self.values.shape[2]

    @property
    def dtype(self) -> str:
        return self.values.dtype.str[1:]

    @property
    def colour(self) -> bool:
        return self.num_bands == RGB

    def read(self) -> np.ndarray:
        return self.values


def _from_array(data: Any, name: str) -> pil.Image | Array:
    shape, dtype = getattr(data, "shape", None), getattr(data, "dtype", None)
    numbers = isinstance(data, np.ndarray) and dtype.kind in "uif" and dtype.itemsize <= 8
    if not numbers or len(shape) not in (2, 3) or 0 in shape:
        what = f"an array {shape} of {dtype}" if shape is not None else f"a {type(data).__name__}"
        takes = "a sample is bytes, a Pillow image or an array (H, W[, bands]) of numbers"
        raise BrokenImage(name, "unsupported", f"got {what}; {takes}")
    if dtype == np.uint8 and (len(shape) == 2 or shape[2] == RGB):
        return pil.fromarray(np.ascontiguousarray(data))
    return Array(data.reshape(*shape[:2], -1))


def _check_size(image: pil.Image | Bands | Array, name: str, max_pixels: int) -> None:
    height, width = image.size[::-1] if isinstance(image, pil.Image) else image.size
    if width * height > max_pixels:
        raise BrokenImage(name, "too_large", f"{width}x{height} pixels, more than max_pixels={max_pixels}")


def _broken(name: str, error: Exception) -> BrokenImage:
    """An error of a decoder, classified. The bytes are foreign, so that whatever they raise means a broken image."""
    if isinstance(error, pil.DecompressionBombError):
        return BrokenImage(name, "too_large", str(error))
    text = str(error) or type(error).__name__
    truncated = isinstance(error, EOFError) or "truncated" in text.lower()
    return BrokenImage(name, "truncated" if truncated else "unreadable", text)


@cache
def jpeg_decoder(decoder: JpegBackend) -> Callable[[bytes], Tensor] | None:
    """torchcodec's decoder of whole JPEGs, or None where Pillow does it.

    Raises:
        DataError: if `decoder` is `torchcodec`, which cannot be imported.
    """
    if decoder == "pillow":
        return None
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:  # the latter two: its native libraries do not load
        if decoder == "auto":
            return None
        reason = str(error).splitlines()[0]
        raise DataError(
            f"decoder: torchcodec cannot be imported ({reason}); pip install 'mim-framework[fast]' or use decoder: auto"
        ) from None
    return decode_jpeg
