"""Encoded images to pixels: what is read, what is refused and why, and no more decoding than a crop needs.

Pillow is the floor and the judge: it reads every header, and whatever it refuses is refused. torchcodec, where it is
installed, takes over whole JPEGs in plain RGB, where its pixels are the same. The policy for odd images:

- EXIF orientation is always applied; a damaged EXIF block counts as none. Colour profiles are ignored.
- 16-bit images are scaled by their bit depth, not clipped; 32-bit and float ones have no stated range and are refused.
- Transparent pixels are composited on white, as a viewer shows them; what lies beneath them is arbitrary.
- CMYK, palette, greyscale and bilevel images become RGB. Of an animation, the first frame is taken.
- A truncated file is broken even if its beginning could be shown.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as pil
from torch import Tensor
from torch.nn.functional import interpolate

from mim_framework.base.errors import BrokenImage, DataError

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
_MODES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LA", "PA", "RGBA", "RGBa"}
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
) -> Image:
    """Read the header of an image; its pixels are decoded when `Image.crop` asks for them.

    Args:
        data: encoded bytes, a Pillow image, or a uint8 array (H, W) or (H, W, 3).
        name: names the sample in messages.
        max_pixels: images whose header claims more are refused before anything is decoded.
        decoder: what decodes whole RGB JPEGs; `auto` takes torchcodec if it is installed, else Pillow.
        scaled_decode: decode a JPEG at 1/2, 1/4 or 1/8 size where a crop still has twice the resolution it needs.

    Raises:
        BrokenImage: if the image cannot be used.
        DataError: if `decoder` is `torchcodec`, which cannot be imported.
    """
    if not isinstance(data, bytes):
        image = data if isinstance(data, pil.Image) else _from_array(data, name)
        _check_size(image, name, max_pixels)
        return Image(image, None, name, torchcodec=None, scaled_decode=False)
    if not data:
        raise BrokenImage(name, "empty", "the file has no bytes")
    decode_jpeg = jpeg_decoder(decoder)
    try:
        image = _open(data)
        _check_size(image, name, max_pixels)
        return Image(image, data, name, torchcodec=decode_jpeg, scaled_decode=scaled_decode)
    except UnidentifiedImageError:
        detail = f"no picture in a format that is read ({', '.join(_formats())}); it begins with {data[:16]!r}"
        raise BrokenImage(name, "not_an_image", detail) from None
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:
        raise _broken(name, error) from error


class Image:
    """A picture whose header has been read. `size` is (height, width) as it is meant to be seen.

    Decoded pixels are kept, so that a second crop costs its resize only, unless it needs a finer scale than the first.
    """

    def __init__(
        self, image: pil.Image, data: bytes | None, name: str, *, torchcodec: Callable | None, scaled_decode: bool
    ) -> None:
        orientation = _orientation(image)
        self._transpose, self._flip_rows, self._flip_columns = _ORIENTATIONS[orientation]
        self.name = name
        self.size: tuple[int, int] = image.size if self._transpose else image.size[::-1]
        self._bits = _bits(image)
        self._file = image
        self._data = data
        jpeg = image.format in ("JPEG", "MPO")
        self._scales = (8, 4, 2) if jpeg and scaled_decode else ()
        whole_in_torchcodec = image.format == "JPEG" and image.mode == "RGB" and orientation == 1
        self._torchcodec = torchcodec if whole_in_torchcodec else None
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
        """A region of the full-resolution image, resized with antialiasing: uint8 (3, *out_size).

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
            resized = _resized_crop(pixels, box, out_size, interpolation, self._bits)
        if self._transpose:
            resized = resized.transpose(1, 2)
        dims = [dim for dim, reverse in ((1, self._flip_rows), (2, self._flip_columns != flip)) if reverse]
        return (resized.flip(dims) if dims else resized).contiguous()

    def change(
        self, adjust: Callable[[pil.Image], pil.Image], height: int, width: int, out_size: tuple[int, int]
    ) -> None:
        """Change the pixels of the whole picture, such as its colours, before regions are cut from it.

        Args:
            adjust: RGB picture -> RGB picture of the same size.
            height, width, out_size: of the most detailed `crop` that will follow, which decides the scale.

        Raises:
            BrokenImage: if the pixels cannot be decoded.
        """
        with self._broken_if_it_fails():
            pixels = self._decode(self._scale_for(height, width, out_size))
            self._pixels = adjust(_to_rgb(_to_pillow(pixels), self._bits))
        self._bits = 8

    @contextmanager
    def _broken_if_it_fails(self) -> Iterator[None]:
        """The bytes are foreign: whatever decoding them raises is told as a broken image."""
        try:
            yield
        except MemoryError:
            raise
        except _UnsupportedMode as error:
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
        if self._pixels is not None:  # decoded too coarsely for this crop: Pillow decodes a file only once
            self._file = _open(self._data)
        self._scale = scale if scale > 1 and self._draft(scale) else 1
        if self._scale == 1 and self._torchcodec is not None:
            try:
                self._pixels = self._torchcodec(self._data)
                return self._pixels
            except RuntimeError:  # Pillow judges, and says what is wrong in plain words
                self._torchcodec = None
        self._file.load()
        self._pixels = self._file
        return self._pixels

    def _draft(self, scale: int) -> bool:
        """Ask libjpeg for 1/scale size."""
        width, height = self._file.size
        return self._file.draft(None, (width // scale, height // scale)) is not None


class _UnsupportedMode(Exception):
    """Pixels that have no defined conversion to 8-bit RGB."""


def _resized_crop(
    pixels: pil.Image | Tensor, box: list[float], out_size: tuple[int, int], interpolation: str, bits: int
) -> Tensor:
    """box (left, top, right, bottom) of `pixels`, whole or fractional -> uint8 (3, *out_size)."""
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    whole = box == [left, top, right, bottom]
    if isinstance(pixels, Tensor):
        region = pixels[:, top:bottom, left:right]
    else:
        region = _to_rgb(pixels.crop((left, top, right, bottom)), bits)
    if whole and interpolation != "lanczos":
        # torch resizes uint8 about four times faster than Pillow, to within 2 levels of it
        batch = _to_tensor(region)[None]
        return interpolate(batch, out_size, mode=interpolation, antialias=True, align_corners=False)[0]
    inside = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return _to_tensor(_to_pillow(region).resize(out_size[::-1], _RESAMPLING[interpolation], box=inside))


def _to_tensor(image: pil.Image | Tensor) -> Tensor:
    """RGB to uint8 (3, H, W), channels last in memory."""
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _to_pillow(image: pil.Image | Tensor) -> pil.Image:
    """The inverse of `_to_tensor`."""
    return pil.fromarray(image.permute(1, 2, 0).numpy()) if isinstance(image, Tensor) else image


def _to_rgb(image: pil.Image, bits: int) -> pil.Image:
    """Any mode that has a defined meaning in 8-bit RGB.

    Raises:
        _UnsupportedMode: for the others.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if bits > 8:
        # the high byte, as Pillow itself takes it of 16-bit colour; its conversion of 16-bit grey clips to white
        return pil.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode not in _MODES:
        raise _UnsupportedMode(
            f"pixels of Pillow mode '{image.mode}' have no stated range; save the image as 8-bit RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _bits(image: pil.Image) -> int:
    """Bit depth of the integers that `image` holds, 8 if they are bytes or have no stated depth."""
    if image.mode.startswith("I;16"):
        return int(image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0]) if image.format == "TIFF" else 16
    return 16 if image.mode == "I" and image.format == "PPM" else 8  # Pillow scales a deep PGM to 16 bits


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


def _open(data: bytes) -> pil.Image:
    with warnings.catch_warnings():
        # Pillow warns about damaged EXIF and about large images; the first is harmless, the second is checked here.
        warnings.simplefilter("ignore")
        return pil.open(io.BytesIO(data), formats=_formats())


@cache
def _formats() -> list[str]:
    """Those of `_FORMATS` with which this Pillow was built."""
    pil.init()
    return [name for name in _FORMATS if name in pil.OPEN]


def _from_array(data: Any, name: str) -> pil.Image:
    shape, dtype = getattr(data, "shape", None), getattr(data, "dtype", None)
    if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
        what = f"an array {shape} of {dtype}" if shape is not None else f"a {type(data).__name__}"
        raise BrokenImage(name, "unsupported", f"got {what}; a sample is bytes, a Pillow image or uint8 (H, W[, 3])")
    return pil.fromarray(np.ascontiguousarray(data))


def _check_size(image: pil.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
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
