"""ADIOS, adversarial masking (Shi et al. 2022, arXiv 2201.13100): one network learns what to hide from another.

Start at `AdversarialContrast.forward`: an image and its N occluded versions are pulled together in the encoder's phase;
in the masker's phase, whose recipe has `sign: -1`, the same loss is driven up and the masks change instead. This is the
variant with SimCLR's loss (`simclr_adios` of the official code).
"""

from __future__ import annotations

from math import ceil, log2, pi
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize
from torchvision.transforms.v2 import functional as F

from mim_framework import (
    NUM_CROP_RANDOM,
    ImageViews,
    Mask,
    Masked,
    Masker,
    MaskerSpec,
    Objective,
    Parts,
    Sample,
    Section,
    Specs,
    Step,
    Views,
    hookimpl,
    jitter_color,
    random_resized_crop_box,
    without_autocast,
)

ENCODER_PHASE, MASKER_PHASE = "encoder", "masker"
"""The phases that a recipe must have, the second with `sign: -1`."""
SECOND = "x2"
"""The view that is occluded; "x" stays whole."""
NORM_GROUPS = 8  # src/utils/blocks.py


# --- the masking network ---------------------------------------------------------------------------------------------


class ConvBlock(nn.Sequential):
    """3x3 convolution, norm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, norm: str) -> None:
        norms = {
            "group": lambda: nn.GroupNorm(NORM_GROUPS, out_chans),
            "instance": lambda: nn.InstanceNorm2d(out_chans, affine=True),
            "none": nn.Identity,
        }
        super().__init__(
            nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=norm == "none"), norms[norm](), nn.ReLU(inplace=True)
        )


class UNet(nn.Module):
    """Features of every pixel: down by halves, an MLP over the smallest map as a whole, up again over the skips.

    The widths are those of `src/utils/unet.py`: the last three blocks down and the first two up have `2 * width`
    channels, all others `width`.
    """

    def __init__(
        self, in_chans: int, img_size: tuple[int, int], width: int, num_blocks: int, hidden_dim: int, norm: str
    ) -> None:
        super().__init__()
        down = [width] * (num_blocks - 3) + [2 * width] * 3
        up = [2 * width] * 2 + [width] * (num_blocks - 2)
        below = [down[-1], *up]
        self.down = nn.ModuleList(ConvBlock(*sizes, norm) for sizes in zip([in_chans, *down], down, strict=False))
        self.up = nn.ModuleList(
            ConvBlock(under + skip, out, norm) for under, skip, out in zip(below, reversed(down), up, strict=False)
        )
        self.smallest = (down[-1], *(side >> (num_blocks - 1) for side in img_size))
        flat = self.smallest[0] * self.smallest[1] * self.smallest[2]
        self.mlp = nn.Sequential(
            nn.Linear(flat, hidden_dim), nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim), nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, flat), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H, W)."""
        skips = []
        for block in self.down:
            x = block(x if not skips else interpolate(x, scale_factor=0.5))
            skips.append(x)
        x = self.mlp(x.flatten(1)).unflatten(1, self.smallest)
        for block in self.up:
            skip = skips.pop()
            x = x if x.shape[-2:] == skip.shape[-2:] else interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, skip], dim=1))
        return x


def sparsity_penalty(shares: Tensor) -> Tensor:
    """shares (..., N), what each mask covers of the image -> 1 / sin(pi * share), summed over the masks (section 2.3).

    1 for half an image, 2 for a sixth or five sixths; 1e10 for a mask that is all zeros or all ones. Officially the
    sine of a share near 1 is that of pi in float32, which is below zero and would reward a mask of ones.
    """
    from_an_edge = torch.minimum(shares, 1 - shares)
    return (1 / (torch.sin(pi * from_an_edge) + 1e-10)).sum(-1)


class AdversarialMasker(Masker):
    """A U-Net that divides every image softly among N masks, each of which occludes it once.

    Nothing is hidden from the encoder in the sense of `Mask`: it gets the view "x2" N times, (N * B, C, H, W) with all
    images under the first mask first, as pixels that the soft mask has darkened. `Masked.extra["soft_masks"]`
    (B, N, H, W) holds the masks, whose sum over N is 1 at every pixel.
    """

    name = "adios"

    class Config(Section):
        num_masks: int = Field(6, ge=2)
        """Masks of each image; the encoder runs once for every one of them, and once more."""
        width: int = Field(32, gt=0)
        """Channels of the U-Net at full resolution; a multiple of 8 with `norm: group`."""
        num_blocks: int | None = Field(None, ge=3)
        """Blocks on the way down, and up; by default as officially, log2 of the image's side less 1, from 3 to 6."""
        hidden_dim: int = Field(128, gt=0)
        """Width of the MLP at the bottom of the U-Net."""
        norm: Literal["group", "instance", "none"] = "group"
        """What follows each convolution: group norm in 8 groups, instance norm, or nothing."""
        sparsity: float = Field(1.0, ge=0)
        """Weight of the penalty on masks that cover almost nothing or almost all."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view(SECOND), self.config
        height, width = view.height_width
        num_blocks = c.num_blocks or min(max(int(log2(min(height, width)) - 1), 3), 6)
        if height % 2 ** (num_blocks - 1) or width % 2 ** (num_blocks - 1):
            raise ValueError(
                f"num_blocks {num_blocks} halves an image {num_blocks - 1} times, which {height}x{width} pixels do not "
                f"allow; use fewer blocks or an image size that is a multiple of {2 ** (num_blocks - 1)}"
            )
        if c.norm == "group" and c.width % NORM_GROUPS:
            raise ValueError(f"width {c.width} is not a multiple of {NORM_GROUPS}, which norm 'group' needs")
        self.unet = UNet(view.in_chans, view.img_size, c.width, num_blocks, c.hidden_dim, c.norm)
        self.head = nn.Conv2d(c.width, c.num_masks, 1)
        self.spec = MaskerSpec(specs.encoder.grid, equal=True, shared=True, views=("x", SECOND), rewrites=(SECOND,))
        self.seen: dict[str, Tensor] = {}

    def forward(self, step: Step, views: Views) -> Masked:
        learns = step.phase == MASKER_PHASE
        view = views[SECOND]
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            soft = self.draw(view)
        shares = soft.mean((-2, -1))
        self.seen = {"shares": shares.detach(), "masks": soft[0].detach().clone()}
        occluded = view * (1 - soft.transpose(0, 1)[:, :, None])
        hides_nothing = {
            name: Mask.none(rows, self.spec.grid, view.device)
            for name, rows in (("x", len(view)), (SECOND, self.config.num_masks * len(view)))
        }
        return Masked(
            hides_nothing,
            {**views, SECOND: occluded.flatten(0, 1)},
            losses={"sparsity": -self.config.sparsity * sparsity_penalty(shares).mean()} if learns else {},
            extra={"soft_masks": soft},
            originals={SECOND: view},
        )

    def draw(self, view: Tensor) -> Tensor:
        """(B, C, H, W) -> soft masks (B, N, H, W), float32, whose sum over N is 1."""
        return self.head(self.unet(view)).float().softmax(1)

    def metrics(self) -> dict[str, Tensor]:
        """Shares of the image that the smallest and the largest mask cover, means over the last images of this rank."""
        if not self.seen:
            return {}
        return {f"{name}_share": getattr(self.seen["shares"], f"a{name}")(1).mean() for name in ("min", "max")}

    def pictures(self) -> dict[str, Tensor]:
        """The masks of the last batch's first image, side by side."""
        return {"masks": self.seen["masks"].transpose(0, 1).flatten(1)[None]} if self.seen else {}


# --- the objective ---------------------------------------------------------------------------------------------------


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of two embeddings (B, D) of the same images: each must find its partner among all 2B - 1 others."""
    z = normalize(torch.cat([first, second]), dim=-1)
    rows = torch.arange(len(z), device=z.device)
    logits = (z @ z.mT / temperature).masked_fill(rows[:, None] == rows, float("-inf"))
    return cross_entropy(logits, rows.roll(len(first)))


class AdversarialContrast(Objective):
    """An image and its occluded versions get similar embeddings, by SimCLR's loss; the masker works against it.

    Two phases of a step: `encoder` minimises the loss and sees fixed masks, `masker` maximises it (`sign: -1`) less the
    penalty on trivial masks. Negatives are the other images of the micro-batch on all ranks.
    """

    name = "adios"

    class Config(Section):
        hidden_dim: int = Field(2048, gt=0)
        """Hidden width of the projector."""
        out_dim: int = Field(128, gt=0)
        """Size of the embeddings that are compared."""
        temperature: float = Field(0.2, gt=0)
        """Divides the similarities; 0.2 in the official scripts for ViTs."""
        pool: Literal["cls", "mean"] = "cls"
        """An image's feature: the class token, or the mean of the patch tokens."""

    config: Config

    def __init__(self, config: Section, parts: Parts) -> None:
        super().__init__(config, parts)
        c, encoder = self.config, parts.encoder
        if c.pool == "cls" and not encoder.spec.num_prefix_tokens:
            raise ValueError(f"pool 'cls' needs a class token, which encoder '{encoder.name}' lacks; use 'mean'")
        if SECOND not in parts.masker.spec.rewrites:
            raise ValueError(f"needs masker 'adios', masker '{parts.masker.name}' occludes nothing")
        self.masker, self.encoder = parts.masker, encoder
        self.projector = nn.Sequential(
            nn.Linear(encoder.spec.dim, c.hidden_dim), nn.ReLU(inplace=True), nn.Linear(c.hidden_dim, c.out_dim)
        )

    def forward(self, step: Step, views: Views) -> dict[str, Tensor]:
        if step.phase not in (ENCODER_PHASE, MASKER_PHASE):
            raise ValueError(
                f"objective 'adios' has nothing to do in phase '{step.phase}'; a recipe needs the phases "
                f"'{ENCODER_PHASE}' and, with sign: -1, '{MASKER_PHASE}'"
            )
        masked = self.masker(step, views)
        whole = self.embed(masked.views["x"], masked.masks["x"])
        occluded = self.embed(masked.views[SECOND], masked.masks[SECOND]).unflatten(0, (-1, len(whole)))
        embeddings = torch.cat([whole[None], occluded]).transpose(0, 1)
        with without_autocast():
            whole, *occluded = step.world.gather(embeddings.float()).unbind(1)
            losses = [contrastive_loss(whole, each, self.config.temperature) for each in occluded]
        return {"contrast": torch.stack(losses).sum(), **masked.losses}

    def embed(self, view: Tensor, mask: Mask) -> Tensor:
        """(B, C, H, W) -> (B, out_dim)."""
        latent = self.encoder(view, mask)
        return self.projector(latent.prefix[:, 0] if self.config.pool == "cls" else latent.pooled())


# --- the two views ---------------------------------------------------------------------------------------------------

NUM_COLOR_RANDOM = 9


class TwoViews(ImageViews):
    """Views "x" and "x2": two crops of an image, each with colours and sharpness of its own, as SimCLR has them."""

    name = "adios"
    num_random = 2 * (NUM_CROP_RANDOM + 1 + NUM_COLOR_RANDOM)

    class Config(ImageViews.Config):
        jitter: float = Field(0.8, ge=0, le=1)
        """Probability that the colours of a view change."""
        brightness: float = Field(0.8, ge=0, le=1)
        """Brightness changes by a factor in 1 +- this."""
        contrast: float = Field(0.8, ge=0, le=1)
        """Contrast changes by a factor in 1 +- this."""
        saturation: float = Field(0.8, ge=0, le=1)
        """Saturation changes by a factor in 1 +- this."""
        hue: float = Field(0.2, ge=0, le=0.5)
        """Hue turns by up to this share of the colour circle, either way."""
        grey: float = Field(0.2, ge=0, le=1)
        """Probability that a view loses its colours."""
        blur: float = Field(0.5, ge=0, le=1)
        """Probability of a Gaussian blur of 0.1 to 2 pixels."""

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.specs = dict.fromkeys(("x", SECOND), self.specs["x"])

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        image, c = self.open(sample), self.config
        views = {}
        for name, numbers in zip(self.specs, rand.view(2, -1).tolist(), strict=True):
            box = random_resized_crop_box(numbers, *image.size, c.scale, c.ratio)
            flip, *colors = numbers[NUM_CROP_RANDOM:]
            crop = image.crop(*box, self.size, flip < c.flip, c.interpolation)
            views[name] = self.change_colors(crop, colors)
        return views

    def change_colors(self, view: Tensor, rand: list[float]) -> Tensor:
        """view uint8 (3, H, W), rand `NUM_COLOR_RANDOM` uniform numbers -> uint8 (3, H, W)."""
        c = self.config
        jitter, order, *changes, grey, blur, sigma = rand
        if jitter < c.jitter:
            view = jitter_color(view, [*changes, order], (c.brightness, c.contrast, c.saturation, c.hue))
        if grey < c.grey and len(view) > 1:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if blur < c.blur:
            sigma = 0.1 + 1.9 * sigma
            view = F.gaussian_blur(view, 2 * ceil(3 * sigma) + 1, sigma)
        return view

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """Both views uint8 (B, 3, H, W) on the device -> normalised float32; an evaluation has only one."""
        normalise = super().prepare
        return {**batch, **{name: normalise(step, {"x": batch[name]})["x"] for name in self.specs if name in batch}}


@hookimpl
def mim_maskers():
    return [AdversarialMasker]


@hookimpl
def mim_objectives():
    return [AdversarialContrast]


@hookimpl
def mim_views():
    return [TwoViews]
