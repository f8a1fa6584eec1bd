"""SimMIM (Xie et al. 2021, arXiv 2111.09886): mask tokens inside an ordinary encoder, one linear layer, raw pixels, L1.

Start at `SwinEncoder.forward`, or at `MaskTokenViT.forward` in the core for the ViT. A step is the encoder between the
core's `random` masker on 32-pixel cells, `linear` decoder, `pixels` target and `l1` loss. The layouts of official
checkpoints are in `checkpoints.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from mim_framework import Ask, Encoder, EncoderSpec, Grid, Latent, Mask, Section, Specs, attend, hookimpl
from mim_framework.builtins.vit import BEiTViT
from mim_framework.nn.positions import look_up_bias
from mim_plugin_simmim.checkpoints import (
    MMPretrainSwinCheckpoint,
    OfficialSwinCheckpoint,
    OfficialViTCheckpoint,
    TimmSwinCheckpoint,
    TimmViTCheckpoint,
)

PER_STAGE = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
POSITION_WEIGHTS = ("relative_position_bias_table", "cpb_mlp", "logit_scale")


class WindowAttention(swin_transformer.WindowAttention):
    """timm's attention inside windows, through the attention that all encoders share."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (images * windows, T, D), mask (windows, T, T) to add to the logits -> (images * windows, T, D)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        bias = look_up_bias(self.relative_position_bias_table, self.relative_position_index)
        return self.proj(attend(q, k, v, with_mask(bias, mask, len(x))).transpose(1, 2).flatten(2))


class WindowAttentionV2(swin_transformer_v2.WindowAttention):
    """timm's cosine attention with position biases from a small network, the same way."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (images * windows, T, D), mask (windows, T, T) to add to the logits -> (images * windows, T, D)."""
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = split_heads(linear(x, self.qkv.weight, qkv_bias), self.num_heads)
        scale = self.logit_scale.clamp(max=math.log(100)).exp() * math.sqrt(q.shape[-1])  # `attend` divides by the root
        q, k = (normalize(q, dim=-1) * scale).to(v.dtype), normalize(k, dim=-1).to(v.dtype)
        with torch.autocast(x.device.type, enabled=False):
            # Official: 16 * sigmoid(table), which is 8 * tanh(table / 2) and a constant that no softmax sees. Around
            # zero bfloat16 is finer than around 8.
            table = 8 * (self.cpb_mlp(self.relative_coords_table).flatten(0, 2) / 2).tanh()
        bias = look_up_bias(table, self.relative_position_index)
        return self.proj(attend(q, k, v, with_mask(bias, mask, len(x))).transpose(1, 2).flatten(2))


def split_heads(projected: Tensor, num_heads: int) -> Tensor:
    """(B, T, 3 * D) -> query, key and value, (3, B, heads, T, d)."""
    return projected.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def with_mask(bias: Tensor, mask: Tensor | None, num_windows: int) -> Tensor:
    """bias (1, heads, T, T), mask (windows of an image, T, T) or None -> bias of one window or of all."""
    return bias if mask is None else (bias + mask[:, None]).repeat(num_windows // len(mask), 1, 1, 1)


class SwinBlock(swin_transformer.SwinTransformerBlock):
    """timm's block of Swin, norms before the residual branches."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, H, W, D)."""
        x = x + self.drop_path1(mix_in_windows(self, self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """timm's block of SwinV2, norms after the residual branches."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, H, W, D)."""
        x = x + self.drop_path1(self.norm1(mix_in_windows(self, x)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


def mix_in_windows(block: SwinBlock | SwinV2Block, x: Tensor) -> Tensor:
    """Attention of a block inside its windows, which divide the map: x (B, H, W, D) -> (B, H, W, D).

    A shifted map is rolled, and the mask keeps what then meets at its border apart.
    """
    (height, width), shift = block.window_size, block.shift_size
    if block.attn_mask is not None:
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    windows = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)  # (B, rows, columns, h, w, D)
    mixed = block.attn(windows.flatten(3, 4).flatten(0, 2), block.attn_mask)
    x = mixed.view(windows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x if block.attn_mask is None else x.roll(shift, (1, 2))


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
        height, width = view.img_size
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
        for block in self.repeated_blocks():
            block.__class__, block.attn.__class__ = self.block, self.attention  # the same parameters, another forward
            if block.attn_mask is not None:
                # timm has the official -100: exp(-100) is a denormal number, on which processors are slow. The weights
                # are the same to the last digit.
                block.attn_mask.masked_fill_(block.attn_mask < 0, -torch.inf)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.absolute_pos_embed = None
        if c.absolute_position:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, self.input_grid.num_patches, c.embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

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
        x = self.swin.patch_embed(view)
        if mask.num_hidden != 0 or self.training:  # an unused mask token would stop distributed training
            hidden = mask.hidden.unflatten(1, self.input_grid.shape)[..., None]
            x = torch.where(hidden, self.mask_token, x)
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


@hookimpl
def mim_encoders():
    return [SwinEncoder, SwinV2Encoder, SimMIMViT]


@hookimpl
def mim_checkpoint_formats():
    return [
        OfficialSwinCheckpoint,
        OfficialViTCheckpoint,
        MMPretrainSwinCheckpoint,
        TimmSwinCheckpoint,
        TimmViTCheckpoint,
    ]
