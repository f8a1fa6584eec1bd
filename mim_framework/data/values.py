"""From the values of a file to the bytes of a view: ranges, bands and alpha. Start at `Wanted`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags
from PIL import Image as pil
from torch import Tensor

Alpha = Literal["auto", "white", "drop", "keep"]
"""What happens to an alpha band; see `ImageViews.Config.alpha`."""
Range = tuple[float, float]

GREY, RGB = 1, 3
_MODES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LA", "PA", "RGBA", "RGBa"}
_HALF_OF_16_BITS = 2**15


class UnsupportedValues(Exception):
    """Pixels that have no defined conversion to the bytes that are wanted."""


@dataclass(frozen=True)
class Depth:
    """Numbers of a decoded picture that are no bytes: `unit` times the values of the file.

    `stated`: the range of the file's values, where the file says it. `high_byte`: only that was decoded.
    """

    unit: float = 1.0
    stated: Range | None = None
    high_byte: bool = False


@dataclass(frozen=True)
class Wanted:
    """What a view needs of every picture: its channels, the range of values deeper than 8 bits, the fate of alpha."""

    in_chans: int = RGB
    value_range: Range | None = None
    alpha: Alpha = "auto"

    def range_of(self, depth: Depth, pixels: Any, what: str) -> Range:
        """The range that becomes 0 ... 255, in the numbers of the decoded pixels.

        Args:
            pixels: all numbers of the picture, to measure them where no range is known.
            what: names the kind of pixels in messages.

        Raises:
            UnsupportedValues: if neither the recipe nor the file gives one.
        """
        found = self.value_range or depth.stated
        if found is None:
            raise UnsupportedValues(f"{what} have no stated range: {_measured(np.asarray(pixels), depth.unit)}")
        if depth.high_byte and found[1] - found[0] < _HALF_OF_16_BITS:
            raise UnsupportedValues(
                f"{what} are decoded by their high byte only, too coarse for the range [{found[0]:g}, {found[1]:g}]; "
                "save them as TIFF"
            )
        return found[0] * depth.unit, found[1] * depth.unit

    def eight_bit(self, image: pil.Image, value_range: Range | None) -> pil.Image | Tensor:
        """A decoded picture as `L`, `RGB` or, of other numbers of channels, uint8 (C, H, W).

        Args:
            value_range: that of its numbers, where they are no bytes.

        Raises:
            UnsupportedValues: if it has no meaning in so many channels.
        """
        mode = {GREY: "L", RGB: "RGB"}.get(self.in_chans)
        if value_range is not None:
            scaled = to_bytes(np.asarray(image), value_range)
            image = pil.fromarray(scaled)
        if image.mode == mode and "transparency" not in image.info:
            return image
        if image.mode not in _MODES:
            raise UnsupportedValues(f"pixels of Pillow mode '{image.mode}' have no stated range")
        if image.has_transparency_data:
            image = self._without_alpha(image)
        if mode is not None and image.mode not in ("LA", "RGBA"):
            return image.convert(mode)
        if image.mode not in ("L", "LA", "RGBA"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        self.require(len(image.getbands()), alpha_kept=image.mode in ("LA", "RGBA"))
        return to_tensor(image)

    def _without_alpha(self, image: pil.Image) -> pil.Image:
        grey = image.mode in ("L", "LA", "1")
        if self.alpha == "keep":
            return image.convert("LA" if grey else "RGBA")
        if self.alpha == "drop":
            return image.convert("L" if grey else "RGB")
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("L") if grey else image

    def of_bands(self, values: np.ndarray, value_range: Range | None, *, alpha: bool, colour: bool) -> Tensor:
        """values (H, W, bands) as a file or array has them -> uint8 (C, H, W).

        Args:
            alpha: the last band is called alpha by the file.
            colour: three bands are red, green and blue.

        Raises:
            UnsupportedValues: if there are other bands than the view has channels.
        """
        count = values.shape[2]
        if alpha and self.alpha == "auto":
            raise UnsupportedValues(called_alpha(count))
        if self.alpha == "drop" and (alpha or count == self.in_chans + 1):
            values, alpha = values[..., :-1], False
        if value_range is not None:
            if alpha and self.alpha == "white":
                raise UnsupportedValues("alpha is composited in 8-bit files only; use views.alpha=drop or keep")
            values = to_bytes(values, value_range)
        elif alpha and self.alpha == "white":
            share = values[..., -1:].astype(np.float32) / 255
            values = (values[..., :-1] * share + 255 * (1 - share)).round().astype(np.uint8)
        count = values.shape[2]
        if (count, self.in_chans) == (RGB, GREY) and colour:
            return torch.from_numpy(np.array(pil.fromarray(np.ascontiguousarray(values)).convert("L")))[None]
        if (count, self.in_chans) == (GREY, RGB):
            values = values.repeat(RGB, axis=2)
        else:
            self.require(count, alpha_kept=alpha)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def require(self, count: int, *, alpha_kept: bool = False) -> None:
        """
        Raises:
            UnsupportedValues: if there are other than `in_chans` bands.
        """
        if count == self.in_chans:
            return
        bands = f"{count} band{'s' * (count != 1)}"
        if alpha_kept:
            bands += " with its alpha, which views.alpha=keep keeps"
        text = f"it has {bands}, the views have {self.in_chans} channel{'s' * (self.in_chans != 1)}"
        cures = [f"give views.mean and views.std {count} number{'s' * (count != 1)} each"]
        if count == self.in_chans + 1:
            cures.append("set views.alpha=drop to leave the last band out")
        elif count == RGB and self.in_chans == RGB + 1 and not alpha_kept:
            cures.append("set views.alpha=keep if the fourth band is called alpha")
        raise UnsupportedValues(f"{text}; {', or '.join(cures)}")


def to_tensor(image: pil.Image | Tensor) -> Tensor:
    """A picture of any number of bands to uint8 (C, H, W), with channels last in memory if they are several."""
    if isinstance(image, Tensor):
        return image
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def called_alpha(count: int) -> str:
    """Why a TIFF whose last band is called alpha is refused, unless the recipe decides."""
    last = "second" if count == 2 else "fourth"
    return (
        f"its last band is called alpha, as TIFF writers call any {last} band; say what it is: "
        f"views.alpha=keep for a measured one (with {count} numbers in views.mean and views.std), drop to leave it "
        "out, or white to composite on white"
    )


def to_bytes(values: np.ndarray, value_range: Range) -> np.ndarray:
    """Numbers -> uint8 of the same shape: the range becomes 0 ... 255, what lies outside is clipped.

    Raises:
        UnsupportedValues: if there are NaN or infinite numbers among them.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return _table(*value_range)[values]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UnsupportedValues("it holds NaN or infinite values")
    return _scaled(values, *value_range)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((values.astype(np.float64) - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)


@lru_cache(maxsize=8)
def _table(low: float, high: float) -> np.ndarray:
    """The byte of each of the numbers of 16 bits."""
    return _scaled(np.arange(2**16), low, high)


def _measured(pixels: np.ndarray, unit: float) -> str:
    """What the values of a picture are, and the option that would fit them."""
    values = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    if not values.size:
        return "none of them is finite"
    low, high = float(values.min()) / unit, float(values.max()) / unit
    ends = likely_range(low, high, whole=pixels.dtype.kind != "f")
    likely = f"[{', '.join(str(end) if isinstance(end, int) else f'{end:g}' for end in ends)}]"
    found = f"the largest value here is {high:g}" + (f", the smallest {low:g}" if low < 0 else "")
    return f"{found}; say the range of all images, for example views.value_range={likely}"


def likely_range(low: float, high: float, *, whole: bool) -> Range:
    """The range that values from `low` to `high` seem to be of: that of so many bits, if they are `whole` numbers."""
    if whole and low >= 0:
        return 0, 2 ** max(1, math.ceil(math.log2(round(high) + 1))) - 1
    return min(low, 0.0), high if high > min(low, 0.0) else 1


def depth_of(image: pil.Image, data: bytes | None) -> Depth | None:
    """Of a picture whose pixels are not decoded yet; None if they are bytes."""
    stored = image.tile[0].args if getattr(image, "tile", None) else None
    if image.mode in ("RGB", "RGBA", "LA") and image.format == "PNG" and ";16" in str(stored):
        return Depth(unit=1 / 257, high_byte=True)
    precision = _jpeg2000_bits(data) if image.format == "JPEG2000" and data else 0
    if precision > 8 and image.mode != "I;16":
        return Depth(unit=1 / 257, high_byte=True) if precision > 15 else None
    if image.mode == "I" and image.format == "PPM":  # Pillow scales a deep PGM to 16 bits
        largest = stored[-1] if isinstance(stored, tuple) else 65535
        return Depth(unit=65535 / largest, stated=(0, largest) if largest < 65535 else None)
    if image.mode.startswith("I;16"):
        bits = int(image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0]) if image.format == "TIFF" else precision
        if image.format == "JPEG2000" and bits < 16:  # scaled to 16 bits too
            return Depth(unit=2.0 ** (16 - bits), stated=(0, 2**bits - 1))
        return Depth(stated=(0, 2**bits - 1) if 0 < bits < 16 else None)
    return Depth() if image.mode in ("I", "F") else None


def _jpeg2000_bits(data: bytes) -> int:
    """Bits of the first component, from the SIZ marker of the codestream; 0 if there is none."""
    place = data.find(b"\xff\x4f\xff\x51")
    return (data[place + 42] & 0x7F) + 1 if 0 <= place < len(data) - 42 else 0
