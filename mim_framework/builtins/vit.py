"""A ViT with a token at every position, as SimMIM, MaskFeat, BEiT and their kin use it. Start at `forward`.

Parameter names are those of BEiT, which the official code of these methods shares. A method's plugin derives its
encoder from `MaskTokenViT`: a name, defaults, and how the weights begin.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec, Specs
from mim_framework.nn.attention import check_heads
from mim_framework.nn.blocks import NORM_EPS, Block, drop_path_ramp, run_blocks
from mim_framework.nn.init import FAR, ONE_STD, init_linear, rescale_by_depth, trunc_normal
from mim_framework.nn.masking import put_mask_token
from mim_framework.nn.patches import PatchEmbed, patch_grid, sides
from mim_framework.nn.positions import RelativePositionBias, sincos_position_table

Side = Annotated[int, Field(gt=0)]
PatchSize = Side | tuple[Side, ...]
"""Option: a side in pixels for all axes, or one for each."""


class ViTSizes(Section):
    """How large a plain vision transformer is."""

    patch_size: PatchSize = 16
    """Side of a patch in pixels, or one for each axis: [2, 16, 16] of a clip."""
    embed_dim: int = Field(768, gt=0)
    """Width; a multiple of `num_heads`."""
    depth: int = Field(12, gt=0)
    """Number of transformer blocks."""
    num_heads: int = Field(12, gt=0)
    """Attention heads per block."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLPs, as a multiple of `embed_dim`."""


class MaskTokenViT(Encoder):
    """ViT in which a learned mask token stands at every hidden position; the whole sequence goes through all blocks."""

    name = "vit"

    init_cut: ClassVar[float] = FAR

    class Config(ViTSizes):
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first."""
        position: Literal["learned", "sincos", "none"] = "learned"
        """Absolute positions added to the tokens: learned ones, MAE's fixed table, or none."""
        relative_bias: Literal["none", "shared", "per_block"] = "none"
        """Learned biases of the attention by relative position: none, one table for all blocks, or one for each."""
        qkv_bias: Literal["full", "qv", "none"] = "full"
        """Biases of query, key and value: all, query and value only (BEiT), or none."""
        layer_scale: float | None = Field(None, ge=0)
        """Initial value of a learned factor on every channel of each residual branch; null or 0 for none (BEiT)."""
        final_norm: bool = True
        """LayerNorm after the last block."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        grid = patch_grid(view.img_size, c.patch_size)
        check_heads(c.embed_dim, c.num_heads)

        self.patch_embed = PatchEmbed(grid, c.patch_size, view.in_chans, c.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        if c.position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid.num_patches, c.embed_dim))
        elif c.position == "sincos":
            self.register_buffer("pos_embed", sincos_position_table(c.embed_dim, grid, num_prefix_tokens=1)[None])
        else:
            self.pos_embed = None
        self.rel_pos_bias = RelativePositionBias(grid, c.num_heads) if c.relative_bias == "shared" else None
        self.grid = grid
        self.blocks = nn.ModuleList(self.new_block(rate) for rate in drop_path_ramp(c.drop_path_rate, c.depth))
        self.norm = nn.LayerNorm(c.embed_dim, eps=NORM_EPS) if c.final_norm else nn.Identity()
        self.init_weights()

        layers = range(c.depth)
        self.spec = EncoderSpec(
            dim=c.embed_dim,
            grid=grid,
            stride=sides(c.patch_size, len(grid.shape)),
            depth=c.depth,
            num_heads=c.num_heads,
            num_prefix_tokens=1,
            in_chans=view.in_chans,
            offers=Ask(
                layers=frozenset(layers),
                attn=frozenset(layers),
                qkv=frozenset(layers),
                aux=frozenset({"position_bias"} if self.rel_pos_bias is not None else ()),
            ),
            layers=dict.fromkeys(layers, (c.embed_dim, grid)),
        )

    def new_block(self, drop_path: float = 0.0) -> Block:
        """A block like the encoder's own, with weights as torch begins them."""
        c = self.config
        return Block(
            c.embed_dim,
            c.num_heads,
            c.mlp_ratio,
            qkv_bias=c.qkv_bias,
            layer_scale=c.layer_scale or None,
            drop_path=drop_path,
            table_grid=self.grid if c.relative_bias == "per_block" else None,
        )

    def init_weights(self) -> None:
        """Truncated normal of 0.02 for matrices, tokens and positions, zero for biases and bias tables (timm, BEiT)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, self.init_cut)
        init_linear(self.patch_embed.proj, self.init_cut)
        for name in ("cls_token", "mask_token", "pos_embed"):
            if isinstance(parameter := getattr(self, name), nn.Parameter):
                trunc_normal(parameter, self.init_cut)

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A table of biases that all blocks shared goes to every block that has its own (BEiT's fine-tuning)."""
        shared = "rel_pos_bias.relative_position_bias_table"
        if self.config.relative_bias != "per_block" or shared not in weights:
            return weights
        rest = {name: tensor for name, tensor in weights.items() if name != shared}
        own = (name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table"))
        return {**rest, **{name: weights[shared].clone() for name in own}}

    def rescale_by_depth(self) -> None:
        """Make what the blocks add to the residual stream smaller with depth, for encoders that begin so."""
        rescale_by_depth(self.blocks)

    def no_weight_decay(self) -> tuple[str, ...]:
        """As the official pre-training code of SimMIM and BEiT: mask token and bias tables do decay."""
        return ("cls_token", "pos_embed")

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, *size) -> tokens (B, N, D). Aux `position_bias` (1, heads, 1 + N, 1 + N): that of all blocks."""
        x = self.embed(view, mask.at(self.spec.grid))
        shared_bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        x, answers = run_blocks(self.blocks, x, ask, shared_bias)
        x = self.final_norm(x)
        aux = {"position_bias": shared_bias} if "position_bias" in ask.aux else {}
        return Latent(x[:, 1:], self.spec.grid, prefix=x[:, :1], aux=aux, **answers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def embed(self, view: Tensor, mask: Mask) -> Tensor:
        """view (B, C, *size) -> (B, 1 + N, D): class token and patches, hidden ones replaced, with positions.

        Of several masks of a sample each has a row.
        """
        patches = put_mask_token(self.patch_embed(view), self.mask_token, mask, always=self.training)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed


class BEiTViT(MaskTokenViT):
    """The ViT that BEiT, BEiT v2 and SimMIM share; their plugins give it its names.

    Relative position biases that all blocks share instead of positions, layer scale, no bias of the key.
    """

    class Config(MaskTokenViT.Config):
        position: Literal["learned", "sincos", "none"] = "none"
        """Absolute positions added to the tokens: learned ones, MAE's fixed table, or none."""
        relative_bias: Literal["none", "shared", "per_block"] = "shared"
        """Learned biases of the attention by relative position: none, one table for all blocks, or one for each."""
        qkv_bias: Literal["full", "qv", "none"] = "qv"
        """Biases of query, key and value: all, query and value only, or none."""
        layer_scale: float | None = Field(0.1, ge=0)
        """Initial value of a learned factor on every channel of each residual branch; null or 0 for none."""
        decay_bias_tables: bool = True
        """Weight decay for tables of relative positions, as in the official pre-training; false exempts them."""

    config: Config

    init_cut = ONE_STD

    def init_weights(self) -> None:
        """As officially: normal of 0.02 cut at one standard deviation, residual branches smaller with depth."""
        super().init_weights()
        self.rescale_by_depth()

    def no_weight_decay(self) -> tuple[str, ...]:
        """Class token and absolute positions; the mask token does decay."""
        tables = (name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table"))
        return ("cls_token", "pos_embed", *(() if self.config.decay_bias_tables else tables))
