"""Masked autoencoding of clips, as VideoMAE does it (Tong et al. 2022, arXiv 2203.12602).

Start at `VideoEncoder.forward`. Masks, targets, loss and the order of a step are those of the framework; the decoder is
MAE's. New are clips, here of an image that moves, and an encoder of the cubes that can be seen.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mim_framework import (
    Ask,
    Encoder,
    EncoderSpec,
    ImageViews,
    Latent,
    Mask,
    Sample,
    Section,
    Specs,
    Step,
    ViewBuilder,
    Views,
    ViewSpec,
    ViTSizes,
    hookimpl,
)
from mim_framework.nn import (
    NORM_EPS,
    Block,
    PatchEmbed,
    check_heads,
    gather_tokens,
    patch_grid,
    run_blocks,
    sides,
    sincos_position_table,
    xavier_if_linear,
)

STILL = (0.5, 0.5, 0.75, 0.6)
"""Where an image is at first, and how it moves, in the clips of evaluations."""


def bounce(start: Tensor, speed: Tensor, num_frames: int, limit: int) -> Tensor:
    """Places (num_frames, 2) int64 of what moves along two axes and turns round at 0 and at `limit`.

    Args:
        start: (2,), within 0 and `limit`.
        speed: (2,), in pixels per frame.
    """
    if limit == 0:
        return torch.zeros(num_frames, 2, dtype=torch.int64)
    way = start + speed * torch.arange(num_frames)[:, None]
    return (limit - (way.remainder(2 * limit) - limit).abs()).round().long()


class MovingImage(ViewBuilder):
    """One view "x": a clip (1, frames, height, width) of a small grey image that moves over black, and rebounds."""

    name = "moving_image"
    num_random = 4

    class Config(Section):
        num_frames: int = Field(8, gt=0)
        """Frames of a clip."""
        img_size: int = Field(16, gt=0)
        """Height and width of a frame, in pixels."""
        moving_size: int = Field(8, gt=0)
        """Height and width of the image that moves; at most `img_size`."""
        max_speed: float = Field(2.0, ge=0)
        """Largest speed along either axis, in pixels per frame."""

        @model_validator(mode="after")
        def _it_fits(self) -> MovingImage.Config:
            if self.moving_size > self.img_size:
                raise ValueError(f"'moving_size' must be at most 'img_size', {self.img_size}, got {self.moving_size}")
            return self

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        c = self.config
        self.images = ImageViews(ImageViews.Config(img_size=c.moving_size))
        self.specs = {"x": ViewSpec("x", ("time", "height", "width"), (c.num_frames, c.img_size, c.img_size), 1)}

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        """rand (4,): the place in the first frame, and the speed, along height and width."""
        c = self.config
        limit = c.img_size - c.moving_size
        image = self.images.evaluation_view(sample).float().mean(0).round().to(torch.uint8)
        places = bounce(rand[:2] * limit, (2 * rand[2:] - 1) * c.max_speed, c.num_frames, limit)
        clip = torch.zeros(self.specs["x"].shape, dtype=torch.uint8)
        for frame, (top, left) in zip(clip[0], places.tolist(), strict=True):
            frame[top : top + c.moving_size, left : left + c.moving_size] = image
        return {"x": clip}

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        return {**batch, "x": batch["x"].float() / 255}

    def evaluation_view(self, sample: Sample) -> Tensor:
        """The same motion for every image."""
        return self(sample, torch.tensor(STILL))["x"]


class VideoEncoder(Encoder):
    """Plain ViT of the cubes of a clip that can be seen, without a class token; attention joins space and time."""

    name = "video_vit"

    class Config(ViTSizes):
        """Sizes of the transformer; `patch_size` is that of a cube, [frames, height, width]."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        if view.axes != ("time", "height", "width"):
            raise ValueError(f"encoder 'video_vit' needs a clip; view 'x' has the axes {', '.join(view.axes)}")
        check_heads(c.embed_dim, c.num_heads)
        grid = patch_grid(view.img_size, c.patch_size)
        self.patch_embed = PatchEmbed(grid, c.patch_size, view.in_chans, c.embed_dim)
        self.register_buffer("pos_embed", sincos_position_table(c.embed_dim, grid)[None])
        self.blocks = nn.ModuleList(Block(c.embed_dim, c.num_heads, c.mlp_ratio) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.embed_dim, eps=NORM_EPS)
        self.apply(xavier_if_linear)

        layers = frozenset(range(c.depth))
        self.spec = EncoderSpec(
            dim=c.embed_dim,
            grid=grid,
            stride=sides(c.patch_size, 3),
            depth=c.depth,
            num_heads=c.num_heads,
            in_chans=view.in_chans,
            visible_only=True,
            accepts=frozenset({"equal", "none"}),
            offers=Ask(layers=layers, attn=layers, qkv=layers),
        )

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, T, H, W) -> tokens (B, K, D), in the order of `mask.ids_keep`."""
        ids = mask.at(self.spec.grid).ids_keep
        x = gather_tokens(self.patch_embed(view) + self.pos_embed, ids)
        x, answers = run_blocks(self.blocks, x, ask)
        return Latent(self.final_norm(x), self.spec.grid, ids, **answers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)


@hookimpl
def mim_encoders():
    return [VideoEncoder]


@hookimpl
def mim_views():
    return [MovingImage]
