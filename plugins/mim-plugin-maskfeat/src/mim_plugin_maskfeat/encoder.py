"""The encoders of MaskFeat: a plain ViT, and MViTv2 with a mask token. Start at `MaskFeatMViT.forward`."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

from mim_framework import Ask, Encoder, EncoderSpec, Grid, Latent, Mask, MaskTokenViT, Section, Specs
from mim_framework.nn import check_heads, put_mask_token, replace_drop_path, trunc_normal

PATCH_STRIDE = 4  # MViTv2's patch embedding: 7x7 pixels, every 4


class MaskFeatViT(MaskTokenViT):
    """Plain ViT with learned positions, a bias on query, key and value, and no norm after the last block."""

    name = "maskfeat_vit"

    class Config(MaskTokenViT.Config):
        final_norm: bool = False
        """LayerNorm after the last block: officially it belongs to the head (`linear` with `norm: true`), in mmpretrain
        to the encoder."""
        initial_bias: float = 0.02
        """Where the biases of linear layers and LayerNorms begin: 0.02 officially, 0 in mmpretrain."""
        mask_token_decays: bool = True
        """Weight decay of the mask token; mmpretrain exempts it. Class token and positions decay in both."""

    config: Config

    def init_weights(self) -> None:
        """SlowFast, `mvit` initialisation: the patch embedding's bias keeps PyTorch's default for convolutions."""
        patch_bias = self.patch_embed.proj.bias.detach().clone()
        super().init_weights()
        with torch.no_grad():
            self.patch_embed.proj.bias.copy_(patch_bias)
        set_biases(self, self.config.initial_bias)

    def no_weight_decay(self) -> tuple[str, ...]:
        return () if self.config.mask_token_decays else ("mask_token",)


class MaskFeatMViT(Encoder):
    """timm's MViTv2, with a learned mask token in place of the patch embedding where a token is hidden.

    Embedded patches overlap: at the border of the visible part they see up to three hidden pixels, as officially.
    """

    name = "maskfeat_mvit"

    class Config(Section):
        embed_dim: int = Field(96, gt=0)
        """Width of the first stage; it doubles from stage to stage."""
        depths: tuple[int, int, int, int] = (1, 2, 11, 2)
        """Blocks of each stage; the default is MViTv2-S."""
        num_heads: int = Field(1, gt=0)
        """Attention heads of the first stage; they double from stage to stage."""
        expand_attn: bool = True
        """Widen in the attention of a stage's first block (timm's tiny, small and base), or after its last (large)."""
        last_pooling: bool = False
        """Halve the grid in the last stage too: tokens of 32 pixels, as in classification, instead of 16 (MaskFeat)."""
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first."""
        final_norm: bool = False
        """LayerNorm after the last block; officially it belongs to the head (`linear` with `norm: true`)."""
        initial_bias: float = 0.02
        """Where the biases of linear layers and LayerNorms begin."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c, view = self.config, specs.view("x")
        strides = ((1, 1), (2, 2), (2, 2), (2, 2) if c.last_pooling else (1, 1))
        stride = PATCH_STRIDE * (8 if c.last_pooling else 4)
        height, width = view.height_width
        if height != width or height % stride:
            raise ValueError(f"MViTv2 needs square images of a multiple of {stride} pixels, got {height}x{width}")
        check_heads(c.embed_dim, c.num_heads)

        model_config = MultiScaleVitCfg(
            depths=c.depths,
            embed_dim=c.embed_dim,
            num_heads=c.num_heads,
            expand_attn=c.expand_attn,
            stride_q=strides,
        )
        options: dict[str, Any] = {"num_classes": 0, "in_chans": view.in_chans, "drop_path_rate": c.drop_path_rate}
        self.model = MultiScaleVit(model_config, img_size=view.img_size, **options)
        replace_drop_path(self.model)
        if not c.final_norm:
            self.model.norm = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        trunc_normal(self.mask_token)
        set_biases(self, c.initial_bias)

        self.patch_grid = Grid((height // PATCH_STRIDE, width // PATCH_STRIDE))
        grid = Grid((height // stride, width // stride))
        layers, side = {}, self.patch_grid.shape[0]
        for stage, (pooling, _) in zip(self.model.stages, strides, strict=True):
            side //= pooling
            for block in stage.blocks:
                layers[len(layers)] = (block.dim_out, Grid((side, side)))
        self.spec = EncoderSpec(
            dim=self.model.num_features,
            grid=grid,
            stride=stride,
            depth=len(layers),
            num_heads=8 * c.num_heads,
            in_chans=view.in_chans,
            offers=Ask(layers=frozenset(layers)),
            layers=layers,
        )

    def repeated_blocks(self) -> list[nn.Module]:
        return [block for stage in self.model.stages for block in stage.blocks]

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W) -> tokens (B, N, D)."""
        x, size = self.model.patch_embed(view)
        x = put_mask_token(x, self.mask_token, mask.at(self.spec.grid).at(self.patch_grid), always=self.training)
        layers = {}
        for i, block in enumerate(self.repeated_blocks()):
            x, size = block(x, size)
            if i in ask.layers:
                layers[i] = x
        return Latent(self.final_norm(x), self.spec.grid, layers=layers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)


def set_biases(module: nn.Module, value: float) -> None:
    """Of every linear layer and LayerNorm (SlowFast, `video_model_builder.py`)."""
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.LayerNorm) and each.bias is not None:
            nn.init.constant_(each.bias, value)
