"""The encoders of SimMIM. Start at `SwinEncoder.forward`; the ViT's is `MaskTokenViT.forward` in the core."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from mim_framework import Ask, BEiTViT, Encoder, EncoderSpec, Grid, Latent, Mask, Section, Specs
from mim_framework.nn import put_mask_token, replace_drop_path, trunc_normal
from mim_plugin_simmim.blocks import SwinBlock, SwinV2Block, WindowAttention, WindowAttentionV2

PER_STAGE = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
POSITION_WEIGHTS = ("relative_position_bias_table", "cpb_mlp", "logit_scale")


class SwinEncoder(Encoder):
    """timm's Swin; a learned mask token replaces hidden tokens after the patch embedding and its norm."""

    name = "simmim_swin"
    block: type[nn.Module] = SwinBlock
    attention: type[nn.Module] = WindowAttention

    class Config(Section):
        patch_size: int = Field(4, gt=0)
        """Side of a patch in pixels at the input; every stage but the first halves the grid."""
        embed_dim: int = Field(128, gt=0)
        """Width of the first stage; it doubles with every stage."""
        depths: PER_STAGE = (2, 2, 18, 2)
        """Blocks of each stage."""
        num_heads: PER_STAGE = (4, 8, 16, 32)
        """Attention heads of each stage."""
        window_size: int = Field(6, gt=0)
        """Side of an attention window in tokens; a stage whose grid is no larger has one window and no shift."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs, as a multiple of the width."""
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first."""
        absolute_position: bool = False
        """Learned positions added to the tokens, mask tokens included (officially `APE`)."""
        decay_bias_tables: bool = True
        """Weight decay for what encodes relative positions, as the official pre-training does by accident; false
        exempts it, as the official fine-tuning does."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        num_stages = len(c.depths)
        if len(c.num_heads) != num_stages:
            raise ValueError(f"depths {list(c.depths)} and num_heads {list(c.num_heads)} need as many stages")
        stride = c.patch_size * 2 ** (num_stages - 1)
        height, width = view.height_width
        if height % stride or width % stride:
            raise ValueError(f"image size {height}x{width} is not a multiple of {stride}, the stride of the last stage")
        self.input_grid = Grid((height // c.patch_size, width // c.patch_size))
        dims = [c.embed_dim * 2**stage for stage in range(num_stages)]
        grids = [Grid(tuple(side >> stage for side in self.input_grid.shape)) for stage in range(num_stages)]
        for stage, (dim, grid, heads) in enumerate(zip(dims, grids, c.num_heads, strict=True)):
            if dim % heads:
                raise ValueError(f"width {dim} of stage {stage} is not a multiple of {heads} heads")
            if any(side > c.window_size and side % c.window_size for side in grid.shape):
                raise ValueError(f"grid {grid} of stage {stage} is no whole number of windows of {c.window_size}")

        self.swin = self.build(
            img_size=view.img_size,
            patch_size=c.patch_size,
            in_chans=view.in_chans,
            num_classes=0,
            embed_dim=c.embed_dim,
            depths=c.depths,
            num_heads=c.num_heads,
            window_size=c.window_size,
            mlp_ratio=c.mlp_ratio,
            drop_path_rate=c.drop_path_rate,
        )
        replace_drop_path(self.swin)
        for block in self.repeated_blocks():
            block.__class__, block.attn.__class__ = self.block, self.attention  # the same parameters, another forward
            if block.attn_mask is not None:
                # timm has the official -100: exp(-100) is a denormal number, on which processors are slow. The weights
                # are the same to the last digit.
                block.attn_mask.masked_fill_(block.attn_mask < 0, -torch.inf)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        trunc_normal(self.mask_token)
        self.absolute_pos_embed = None
        if c.absolute_position:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, self.input_grid.num_patches, c.embed_dim))
            trunc_normal(self.absolute_pos_embed)

        places = [(dims[stage], grids[stage]) for stage, depth in enumerate(c.depths) for _ in range(depth)]
        self.spec = EncoderSpec(
            dim=dims[-1],
            grid=grids[-1],
            stride=stride,
            depth=len(places),
            num_heads=c.num_heads[-1],
            in_chans=view.in_chans,
            offers=Ask(layers=frozenset(range(len(places)))),
            layers=dict(enumerate(places)),
        )

    def build(self, **options: Any) -> nn.Module:
        """timm's model, of which the patch embedding, the stages and the norm are used."""
        return swin_transformer.SwinTransformer(**options)

    def no_weight_decay(self) -> Iterable[str]:
        """Mask token and absolute positions; tables of relative positions if the recipe says so."""
        tables = () if self.config.decay_bias_tables else position_weights(self)
        return ("mask_token", "absolute_pos_embed", *tables)

    def repeated_blocks(self) -> list[nn.Module]:
        return [block for stage in self.swin.layers for block in stage.blocks]

    def layer_of(self, name: str) -> int:
        """A merging layer goes with the last block before it. Official: absolute positions are in the last layer."""
        if merging := re.match(r"swin\.layers\.(\d+)\.downsample\.", name):
            return sum(self.config.depths[: int(merging[1])])
        return super().layer_of(name)

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W) -> tokens (B, N, D) on the grid of the last stage."""
        x = self.embed(view, mask.at(self.input_grid))
        layers: dict[int, Tensor] = {}
        number = 0
        for stage in self.swin.layers:
            x = stage.downsample(x).to(x.dtype)  # the residual stream stays in full precision
            for block in stage.blocks:
                x = block(x)
                if number in ask.layers:
                    layers[number] = x.flatten(1, 2)
                number += 1
        return Latent(self.final_norm(x.flatten(1, 2)), self.spec.grid, layers=layers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.swin.norm(x)

    def embed(self, view: Tensor, mask: Mask) -> Tensor:
        """view (B, C, H, W) -> (B, h, w, D) with the mask token where nothing may be seen."""
        x = put_mask_token(self.swin.patch_embed(view), self.mask_token, mask, always=self.training)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.unflatten(1, self.input_grid.shape)
        return x


class SwinV2Encoder(SwinEncoder):
    """timm's SwinV2: cosine attention, continuous position biases, norms after the residual branches."""

    name = "simmim_swinv2"
    block = SwinV2Block
    attention = WindowAttentionV2

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        if any(min(block.window_size) == 1 for block in self.repeated_blocks()):
            raise ValueError(f"SwinV2 needs windows of 2 tokens or more, its last stage has a grid of {self.spec.grid}")

    def build(self, **options: Any) -> nn.Module:
        no_other_windows = (0,) * len(options["depths"])
        return swin_transformer_v2.SwinTransformerV2(pretrained_window_sizes=no_other_windows, **options)


class SimMIMViT(BEiTViT):
    """ViT in the manner of BEiT: shared relative position biases, layer scale, no bias of the key, no positions."""

    name = "simmim_vit"


def position_weights(module: nn.Module) -> Iterator[str]:
    """Names of the parameters that encode relative positions."""
    return (name for name, _ in module.named_parameters() if any(key in name for key in POSITION_WEIGHTS))
