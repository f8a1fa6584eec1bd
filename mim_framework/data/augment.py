"""Augmentations of fine-tuning: RandAugment in a data worker, and random erasing on the device.

The operations on pixels are timm's; which of them an image gets, and how strongly, is read from the uniform numbers of
its position.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image as pil
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

MAX_LEVEL = 10.0
"""The strongest magnitude, at which a strength has its full range."""
NUM_RANDOM_OF_OPERATION = 5
"""Uniform numbers of one operation: which one, whether, two for its magnitude, and its sign."""
PLAIN = ("AutoContrast", "Equalize", "Invert")
STRONGER = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
"""Have a variant whose strength grows with the magnitude; in the other one it falls, or passes through none."""
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment: operations drawn with replacement, each applied with a probability, at a random magnitude."""

    magnitude: float = MAX_LEVEL
    num_operations: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    increasing: bool = False

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """Of timm's notation, such as `rand-m9-mstd0.5-inc1`: m, n, p, mstd, inc.

        Raises:
            ValueError: if it is something else.
        """
        known = {"m": "magnitude", "n": "num_operations", "p": "probability", "mstd": "magnitude_std", "inc": ""}
        kind, *parts = text.split("-")
        values: dict[str, float] = {}
        for part in parts if kind == "rand" else ("",):
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if match is None or match[1] not in known:
                raise ValueError(
                    f"'{text}' is no RandAugment such as rand-m9-mstd0.5-inc1; its keys: {', '.join(known)}"
                )
            values[match[1]] = float(match[2])
        increasing = bool(values.pop("inc", 0))
        numbers = {known[key]: int(value) if key == "n" else value for key, value in values.items()}
        return cls(**numbers, increasing=increasing)

    @property
    def num_random(self) -> int:
        """Uniform numbers that an image needs."""
        return NUM_RANDOM_OF_OPERATION * self.num_operations

    def __call__(self, image: Tensor, rand: Sequence[float], fill: tuple[int, ...]) -> Tensor:
        """image uint8 (C, H, W), of one or three channels -> the same.

        Args:
            rand: `num_random` uniform numbers in [0, 1).
            fill: the colour that moves in from outside, of each channel.
        """
        from timm.data.auto_augment import NAME_TO_OP

        picture = to_pil_image(image)
        options = {"fillcolor": fill if len(fill) > 1 else fill[0], "resample": pil.Resampling.BICUBIC}
        for name, arguments in self.drawn(rand):
            if name.startswith("Posterize") and arguments == (0,):  # none of 8 bits, which later Pillows refuse
                picture = pil.new(picture.mode, picture.size)
            else:
                picture = NAME_TO_OP[name](picture, *arguments, **options)
        return pil_to_tensor(picture)

    def drawn(self, rand: Sequence[float]) -> list[tuple[str, tuple[float, ...]]]:
        """The operations that these numbers give, by timm's names, with their arguments."""
        found = []
        for start in range(0, self.num_random, NUM_RANDOM_OF_OPERATION):
            which, whether, *normal, sign = rand[start : start + NUM_RANDOM_OF_OPERATION]
            if whether <= self.probability:
                name = OPERATIONS[int(which * len(OPERATIONS))]
                name += "Increasing" * (self.increasing and name in STRONGER)
                level = self.magnitude + self.magnitude_std * standard_normal(*normal)
                found.append((name, arguments_of(name, min(max(level, 0.0), MAX_LEVEL), negative=sign > 0.5)))
        return found


def standard_normal(u: float, v: float) -> float:
    """A number with the standard normal distribution from two uniform ones in [0, 1) (Box and Muller 1958)."""
    return math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)


def arguments_of(name: str, level: float, *, negative: bool) -> tuple[float, ...]:
    """What an operation of timm takes at a magnitude from 0 to 10 (`timm.data.auto_augment.LEVEL_TO_ARG`)."""
    share = level / MAX_LEVEL
    sign = -1 if negative else 1
    match name:
        case "Rotate":
            return (sign * share * 30.0,)
        case "ShearX" | "ShearY":
            return (sign * share * 0.3,)
        case "TranslateXRel" | "TranslateYRel":
            return (sign * share * 0.45,)
        case "Posterize":
            return (int(share * 4),)
        case "PosterizeIncreasing":
            return (4 - int(share * 4),)
        case "Solarize":
            return (min(256, int(share * 256)),)
        case "SolarizeIncreasing":
            return (256 - min(256, int(share * 256)),)
        case "SolarizeAdd":
            return (min(128, int(share * 110)),)
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return (max(0.1, 1.0 + sign * share * 0.9),)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return (share * 1.8 + 0.1,)
        case _ if name in PLAIN:
            return ()
    raise ValueError(f"no operation '{name}'")


ERASE_TRIES = 10
NUM_ERASE_RANDOM = 1 + 4 * ERASE_TRIES
"""Uniform numbers of an image: whether, then area, aspect ratio, top and left of each try."""
ERASED_AREA = (0.02, 1 / 3)
LOG_ASPECT = math.log(0.3)
"""Aspect ratios are log-uniform between 0.3 and its inverse."""


def erased_regions(rand: Tensor, probability: float, height: int, width: int) -> Tensor:
    """rand (B, NUM_ERASE_RANDOM) uniform -> bool (B, H, W): the rectangle of each image that is erased, if any is.

    Zhong et al. 2017 as in timm: of ten draws the first one that is smaller than the image on both axes.
    """
    area, aspect, top, left = rand[:, 1:].unflatten(1, (ERASE_TRIES, 4)).unbind(2)
    area = (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0])) * height * width
    aspect = (LOG_ASPECT * (1 - 2 * aspect)).exp()
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.float().argmax(1, keepdim=True)
    chosen = [each.gather(1, first) for each in (tall, wide, top, left)]
    tall, wide = chosen[0][..., None], chosen[1][..., None]
    top = (chosen[2][..., None] * (height - tall + 1)).floor()
    left = (chosen[3][..., None] * (width - wide + 1)).floor()
    rows = torch.arange(height, device=rand.device)[:, None]
    columns = torch.arange(width, device=rand.device)
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    erased = (rand[:, 0] < probability) & fits.any(1)
    return inside & erased[:, None, None]


def erase(images: Tensor, regions: Tensor, rand: Tensor) -> Tensor:
    """images (B, C, H, W) float, regions (B, H, W), rand (B, C * H * W) uniform -> with normal noise in the regions."""
    noise = torch.erfinv(rand.clamp(min=2.0**-25) * 2 - 1).mul_(math.sqrt(2)).view_as(images)
    return torch.where(regions[:, None], noise, images)
