"""Samples to views: crop and flip in a data worker, normalisation on the device.

Every random choice is read from the row of uniform numbers that belongs to the sample's position in the run. The crop
geometry is public, so that another view builder can give the same crop at a second size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from mim_framework.base.section import Section
from mim_framework.contract.components import ViewBuilder
from mim_framework.contract.records import Sample, Views
from mim_framework.contract.specs import ViewSpec
from mim_framework.contract.step import Step
from mim_framework.data.augment import NUM_ERASE_RANDOM, RandAugment, erase, erased_regions
from mim_framework.data.decode import (
    MAX_PIXELS,
    PILLOW_MAX_PIXELS,
    Image,
    Interpolation,
    JpegBackend,
    jpeg_decoder,
    open_image,
)
from mim_framework.data.labels import LABEL
from mim_framework.data.mixing import NUM_RANDOM, Mix, Mixing, MixOfEach
from mim_framework.data.values import Alpha

MIXING_OPTIONS = ("mix_mode", "mixup", "cutmix", "mixup_prob", "switch_prob", "label_smoothing")
UNSAID = {"crop": "retry", "rand_augment": None, "erase": 0.0, "eval_view": "central_box", "eval_crop": 0.875}
"""Options as they were before there were any: a cache of tokens from then does not name them."""
HUE = 3
"""Place of the hue among the strengths of `jitter_color`."""
CROP_TRIES = 10
NUM_CROP_RANDOM = 2 * CROP_TRIES + 2
"""Uniform numbers that `random_resized_crop_box` reads: area and aspect ratio of each try, then the position."""


class Box(NamedTuple):
    """A region in pixels of the full-resolution image."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop_box(
    rand: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The box of a random resized crop, distributed as torchvision's `RandomResizedCrop.get_params`.

    Up to ten draws of an area share and a log-uniform aspect ratio, until one fits into the image; then a uniform
    position. If none fits, the largest central crop whose aspect ratio is allowed.

    Args:
        rand: `NUM_CROP_RANDOM` uniform numbers in [0, 1).
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for i in range(CROP_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rand[2 * i])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * rand[2 * i + 1])
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(rand[2 * CROP_TRIES] * (height - crop_height + 1))
            left = int(rand[2 * CROP_TRIES + 1] * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    return central_crop_box(height, width, ratio)


def crop_box_drawn_once(
    rand: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The box of MAE's linear probe (`util/crop.py`): one draw of area and aspect ratio, each side cut to the image.

    Arguments as of `random_resized_crop_box`; the position is read from the same places of `rand`.
    """
    area = scale[0] + (scale[1] - scale[0]) * rand[0]
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * rand[1])
    crop_height, crop_width = sides_of_crop(area, aspect, height, width)
    top = int(rand[2 * CROP_TRIES] * (height - crop_height + 1))
    left = int(rand[2 * CROP_TRIES + 1] * (width - crop_width + 1))
    return Box(top, left, crop_height, crop_width)


def sides_of_crop(area: float, aspect: float, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a crop with a share of an image's area and width / height, cut to the image."""
    pixels = area * height * width
    return min(round(math.sqrt(pixels / aspect)), height), min(round(math.sqrt(pixels * aspect)), width)


def jitter_color(image: Any, rand: Sequence[float], strengths: Sequence[float]) -> Any:
    """Brightness, contrast, saturation and hue, in random order, as torchvision's `ColorJitter`.

    Args:
        image: a Pillow image or a uint8 tensor (3, H, W), or (1, H, W), whose saturation and hue stay.
        rand: uniform numbers in [0, 1), one for each strength, then one for the order.
        strengths: the first three change by factors in 1 +- strength, the hue turns by up to its strength (0.5 at most)
            either way. 0 leaves as it is; the hue may be left out.
    """
    from torchvision.transforms.v2 import functional as F  # not at start-up: few recipes jitter

    adjustments = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    orders = _orders(len(strengths))
    for number in orders[int(rand[len(strengths)] * len(orders))]:
        change = strengths[number] * (2 * rand[number] - 1)
        if strengths[number]:
            image = adjustments[number](image, change if number == HUE else 1 + change)
    return image


@cache
def _orders(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple(permutations(range(count)))


def central_crop_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest central box whose width / height lies within `ratio`."""
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_width = max(1, round(height * ratio[1]))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def resized_center_crop(image: Image, img_size: int | Sequence[int], interpolation: Interpolation) -> Tensor:
    """The evaluation view of the official MAE code: short side to img_size * 256 / 224, then the central square.

    Of a view that is no square, the largest central box of its shape, with as much border. The box is cut before the
    resize, so that the work is bounded for a panorama too. An image that is not larger than the view has no border to
    spare: its box is resized to the view itself.

    Returns:
        uint8 (C, height, width).
    """
    height, width = height_width(img_size)
    box = central_crop_box(*image.size, (width / height, width / height))
    if box.height <= height or box.width <= width:
        return image.crop(*box, (height, width), interpolation=interpolation)
    enlarged = height * 256 // 224, width * 256 // 224
    resized = image.crop(*box, enlarged, interpolation=interpolation)
    top, left = (enlarged[0] - height) // 2, (enlarged[1] - width) // 2
    return resized[:, top : top + height, left : left + width].contiguous()


LONGEST = 8.0
"""Of a longer image the central part of this aspect ratio stands for the whole, so that work and memory are bounded."""


def resized_then_cropped(
    image: Image, img_size: int | Sequence[int], interpolation: Interpolation, crop_share: float
) -> Tensor:
    """The evaluation view of official fine-tunings: the whole image resized, then its central part.

    Returns:
        uint8 (C, height, width).
    """
    height, width = height_width(img_size)
    whole = central_crop_box(*image.size, (1 / LONGEST, LONGEST))
    (tall, wide), top, left = resize_and_center(whole.height, whole.width, (height, width), crop_share)
    resized = image.crop(*whole, (tall, wide), interpolation=interpolation)
    return resized[:, top : top + height, left : left + width].contiguous()


def resize_and_center(
    height: int, width: int, size: tuple[int, int], crop_share: float
) -> tuple[tuple[int, int], int, int]:
    """Height and width of the resized image, top and left of its central part, as torchvision computes them.

    The shorter side becomes that of `size` divided by `crop_share`, rounded down, the longer one keeps its proportion.
    A view that is no square has all of its sides inside.
    """
    wanted = int(size[0] / crop_share + 1e-6), int(size[1] / crop_share + 1e-6)  # 224 / (224 / 235) is 235
    if width * wanted[0] <= height * wanted[1]:  # the width is the scarce one
        resized = int(wanted[1] * height / width), wanted[1]
    else:
        resized = wanted[0], int(wanted[0] * width / height)
    return resized, round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)


Side = Annotated[int, Field(gt=0, strict=True)]
ImgSize = Side | tuple[Side, Side]
"""Option: pixels of a square, or [height, width]."""


def height_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    """An option of type `ImgSize` as (height, width)."""
    if isinstance(img_size, int):
        return img_size, img_size
    height, width = img_size
    return height, width


def increasing(interval: tuple[float, float]) -> tuple[float, float]:
    """The interval itself; for options that are one.

    Raises:
        ValueError: if its first number is the larger.
    """
    if interval[0] > interval[1]:
        raise ValueError(f"must be [smallest, largest], got {list(interval)}")
    return interval


def one_for_each_channel(config: Any) -> Any:
    """The config itself; for options of views with a `mean` and a `std`, which say how many channels there are.

    Raises:
        ValueError: if they have different lengths, or `value_range` is none.
    """
    mean, std = list(config.mean), list(config.std)
    if len(mean) != len(std):
        raise ValueError(
            f"'mean' has {len(mean)} numbers, 'std' has {len(std)}: give both one for each channel, such as "
            "mean: [0.5] and std: [0.25] for grey images"
        )
    if config.value_range is not None and config.value_range[0] >= config.value_range[1]:
        raise ValueError(f"'value_range' must be [smallest, largest], got {list(config.value_range)}")
    return config


Share = Annotated[float, Field(gt=0, le=1)]
"""Option: above 0 and at most 1."""
Positive = Annotated[float, Field(gt=0)]


def _known_augment(text: str | None) -> str | None:
    if text is not None:
        RandAugment.parse(text)
    return text


class ImageViews(ViewBuilder):
    """One view "x": a random resized crop with a random horizontal flip, uint8 until it is on the device."""

    name = "image"
    num_random = NUM_CROP_RANDOM + 1

    class Config(Section):
        img_size: ImgSize = 224
        """Height and width of the view, in pixels: a number for a square, or [height, width]."""
        scale: Annotated[tuple[Share, Share], AfterValidator(increasing)] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        ratio: Annotated[tuple[Positive, Positive], AfterValidator(increasing)] = (3 / 4, 4 / 3)
        """Smallest and largest width / height of a crop, before it is resized to the shape of the view."""
        crop: Literal["retry", "once"] = "retry"
        """How a crop is drawn: `retry` up to ten times until it fits into the image, or `once`, its sides cut to the
        image, as in MAE's linear probe."""
        flip: float = Field(0.5, ge=0, le=1)
        """Probability of a horizontal flip."""
        rand_augment: Annotated[str | None, AfterValidator(_known_augment)] = None
        """RandAugment in timm's notation, such as `rand-m9-mstd0.5-inc1`; null for none."""
        erase: float = Field(0.0, ge=0, le=1)
        """Probability that a rectangle of the normalised view becomes noise (random erasing)."""
        eval_view: Literal["central_box", "resize_crop"] = "central_box"
        """What evaluations look at. `central_box` cuts the largest box of the view's shape and leaves an eighth around
        the centre out where the image is larger than the view. `resize_crop` is what official fine-tunings do: resize
        the whole image, however small, and take the centre."""
        eval_crop: float = Field(0.875, gt=0, le=1)
        """With `resize_crop`, the share of the resized shorter side that is taken: 0.875 for 224 of 256 pixels, 1 for
        all of it."""
        interpolation: Interpolation = "bicubic"
        """Filter of the resize, always with antialiasing: bicubic, bilinear or lanczos."""
        eval_interpolation: Interpolation | None = None
        """The filter for evaluations, where it is another one (bicubic after bilinear crops: linear probes of DINO and
        BEiT); null for the same."""
        mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.485, 0.456, 0.406)
        """Mean of each channel that is subtracted, for pixels in [0, 1]. There are as many channels as numbers: one
        makes images grey, three RGB, another number must be that of the bands of every file."""
        std: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.229, 0.224, 0.225)
        """Standard deviation of each channel by which is divided, for pixels in [0, 1]."""
        value_range: tuple[float, float] | None = None
        """The values that become black and white in files deeper than 8 bits, such as [0, 4095] for a scanner of 12
        bits; others are clipped. Without it, 16-bit, 32-bit and float files are refused, and told what they hold."""
        alpha: Alpha = "auto"
        """What happens to transparency: `white` composites on it, `drop` leaves the band out, `keep` takes it for one
        more channel. `auto` is `white`, but refuses a TIFF, whose writers call any fourth band alpha."""
        max_pixels: int = Field(MAX_PIXELS, gt=0, le=PILLOW_MAX_PIXELS)
        """An image whose header claims more pixels is counted as broken, before anything of it is decoded."""
        decoder: JpegBackend = "auto"
        """What decodes plain JPEGs: pillow, torchcodec (pip install 'mim-framework[fast]'), or auto: the faster one
        that is installed. The pixels are the same; all other formats go through Pillow."""
        scaled_decode: bool = True
        """Decode a large JPEG at 1/2, 1/4 or 1/8 size where the crop keeps twice the resolution of the view. Pixels
        differ slightly (under 1.5 of 255 levels on average); false for full-resolution decoding."""
        mix_mode: Literal["batch", "element"] = "batch"
        """One draw of mixup or cutmix for all images of a step, or one for each."""
        mixup: float = Field(0.0, ge=0, le=1)
        """Blend pairs of images and their labels by shares from Beta(mixup, mixup), one draw per step; 0 for none."""
        cutmix: float = Field(0.0, ge=0, le=1)
        """Exchange a box between pairs of images, its area from Beta(cutmix, cutmix), and as much of their labels."""
        mixup_prob: float = Field(1.0, ge=0, le=1)
        """Share of the steps that mix at all."""
        switch_prob: float = Field(0.5, ge=0, le=1)
        """Share of the mixed steps that take cutmix, where mixup is on too."""
        label_smoothing: float = Field(0.0, ge=0, lt=1)
        """Probability of a label that is spread over all classes, before labels are mixed."""

        @model_validator(mode="after")
        def _channels(self) -> ImageViews.Config:
            if self.rand_augment is not None and len(self.mean) != 3:
                raise ValueError(f"'rand_augment' needs RGB images, 'mean' has {len(self.mean)} channels")
            return one_for_each_channel(self)

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        c = self.config
        self.in_chans, self.size = len(c.mean), height_width(c.img_size)
        self.specs = {"x": ViewSpec("x", size=self.size, in_chans=self.in_chans, mean=c.mean, std=c.std)}
        jpeg_decoder(c.decoder)  # imported before workers fork, and refused here if it is missing
        self._normalisation: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.rand_augment: RandAugment | None = None
        self.erase = 0.0
        if isinstance(c, ImageViews.Config):  # a subclass may have options of its own, without these
            self.erase = c.erase
            if c.rand_augment is not None:
                self.rand_augment = RandAugment.parse(c.rand_augment)
                self.num_random += self.rand_augment.num_random
            self.mixing = Mixing(c.mixup, c.cutmix, c.mixup_prob, c.switch_prob)
            self.fill = tuple(round(255 * mean) for mean in c.mean)
            self.batch_multiple = 2 if c.mixup or c.cutmix else 1
            self.mixes_labels = bool(c.mixup or c.cutmix or c.label_smoothing)

    def open(self, sample: Sample) -> Image:
        """The sample's image, its header read.

        Raises:
            BrokenImage: if it cannot be used.
        """
        c = self.config
        return open_image(
            sample.data,
            sample.name,
            max_pixels=c.max_pixels,
            decoder=c.decoder,
            scaled_decode=c.scaled_decode,
            in_chans=self.in_chans,
            value_range=getattr(c, "value_range", None),  # options of a subclass may lack them
            alpha=getattr(c, "alpha", "auto"),
            page=sample.page,
        )

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        c = self.config
        numbers = rand.tolist()
        image = self.open(sample)
        draw = crop_box_drawn_once if getattr(c, "crop", "retry") == "once" else random_resized_crop_box
        box = draw(numbers, *image.size, c.scale, c.ratio)
        flip = numbers[NUM_CROP_RANDOM] < c.flip
        x = image.crop(*box, self.size, flip, c.interpolation)
        return {
            "x": x if self.rand_augment is None else self.rand_augment(x, numbers[NUM_CROP_RANDOM + 1 :], self.fill)
        }

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """x uint8 (B, C, H, W) on the device -> normalised float32; in training erased, and mixed with its labels."""
        scale, shift = self._scale_and_shift(batch["x"].device)
        views = {**batch, "x": batch["x"].float().mul_(scale).add_(shift)}
        if self.erase and step is not None:
            height, width = views["x"].shape[-2:]
            regions = erased_regions(step.rand("erase", NUM_ERASE_RANDOM), self.erase, height, width)
            views["x"] = erase(views["x"], regions, step.rand("erase noise", views["x"][0].numel()))
        if self.mixes_labels and step is not None and LABEL in batch:
            mix = self._drawn(step, *views["x"].shape[-2:])
            views["x"] = mix.images(views["x"])
            views[LABEL] = mix.labels(batch[LABEL], self.num_classes, self.config.label_smoothing)
        return views

    def _drawn(self, step: Step, height: int, width: int) -> Mix | MixOfEach:
        if self.config.mix_mode == "batch":
            return self.mixing.draw(step.seed, step.index, height, width)
        return self.mixing.draw_each(step.rand("mixing of an image", NUM_RANDOM), height, width)

    def label_spec(self, given: ViewSpec) -> ViewSpec:
        if others := sorted(self.specs.keys() - {"x"}):
            text = "mixup, cutmix and label_smoothing are for builders of one view 'x'"
            raise ValueError(f"{text}; there is {', '.join(others)} beside it")
        self.num_classes = given.num_classes or 0  # not known where a model is built without its data
        return ViewSpec.of_kind("labels", given.name, self.num_classes, num_classes=given.num_classes)

    def evaluation_view(self, sample: Sample) -> Tensor:
        c = self.config
        filter = getattr(c, "eval_interpolation", None) or c.interpolation
        if getattr(c, "eval_view", "central_box") == "resize_crop":
            return resized_then_cropped(self.open(sample), self.size, filter, c.eval_crop)
        return resized_center_crop(self.open(sample), self.size, filter)

    def to_image(self, view: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift(view.device)
        return ((view - shift) / (scale * 255)).clamp(0, 1)

    def _scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(pixel / 255 - mean) / std as pixel * scale + shift, each (C, 1, 1) and kept on the device."""
        if device not in self._normalisation:
            mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.config.mean, self.config.std))
            self._normalisation[device] = 1 / (255 * std), -mean / std
        return self._normalisation[device]
