"""A ViT with a token at every position, as SimMIM, MaskFeat, BEiT and their kin use it. Start at `forward`.

Parameter names are those of BEiT, which the official code of these methods shares. A method's plugin derives its
encoder from `MaskTokenViT`: a name, defaults, and how the weights begin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn.functional import linear

from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec, Specs
from mim_framework.functional import attend, patch_grid, sincos_position_table

NORM_EPS = 1e-6
ONE_STD, FAR = 0.02, 2.0
"""Where normal weights of 0.02 are cut: at one standard deviation, as officially in pre-training of SimMIM and BEiT, or
so far out that it makes no difference, as by default in timm and torch."""


def relative_position_index(grid: Grid) -> Tensor:
    """(1 + N, 1 + N) int64: for a query (row) and a key (column), class token first, the row of the bias table.

    Patch to patch: (dy + h - 1) * (2w - 1) + dx + w - 1. The three last rows of the table are for the class token as
    query, as key, and for itself (BEiT, `modeling_finetune.py`).
    """
    height, width = grid.shape
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = row.flatten(), column.flatten()
    dy, dx = row[:, None] - row[None], column[:, None] - column[None]
    index = torch.empty(grid.num_patches + 1, grid.num_patches + 1, dtype=torch.int64)
    index[1:, 1:] = (dy + height - 1) * (2 * width - 1) + dx + width - 1
    patches = (2 * height - 1) * (2 * width - 1)
    index[0], index[:, 0], index[0, 0] = patches, patches + 1, patches + 2
    return index


def relative_position_table(grid: Grid, num_heads: int) -> nn.Parameter:
    """(relative positions + 3, heads), zeros."""
    height, width = grid.shape
    return nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1) + 3, num_heads))


class RelativePositionBias(nn.Module):
    """A learned number for every relative position and head, the same in all blocks."""

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = relative_position_table(grid, num_heads)
        self.register_buffer("relative_position_index", relative_position_index(grid), persistent=False)

    def forward(self) -> Tensor:
        """(1, heads, T, T)"""
        return look_up(self.relative_position_bias_table, self.relative_position_index)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table (rows, heads), index (T, T) -> biases (1, heads, T, T)."""
    return table.t()[:, index.flatten()].unflatten(1, index.shape)[None]


def trunc_normal(tensor: Tensor, cut: float = FAR) -> None:
    """Standard deviation 0.02 before it is cut at -cut and cut."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-cut, b=cut)


def init_linear(layer: nn.Linear | nn.Conv2d, cut: float = FAR) -> None:
    """Truncated normal weights, zero biases."""
    trunc_normal(layer.weight, cut)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def rescale_by_depth(blocks: Iterable[Block], first: int = 1) -> None:
    """Divide what block i, counted from `first`, adds to the residual stream by sqrt(2i) (BEiT, `fix_init_weight`)."""
    for number, block in enumerate(blocks, start=first):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))


class Attention(nn.Module):
    """Self-attention whose query and value may have biases without one for the key, and a bias table of its own."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: str, table_grid: Grid | None) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "full")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if table_grid is not None:
            self.relative_position_bias_table = relative_position_table(table_grid, num_heads)
            self.register_buffer("relative_position_index", relative_position_index(table_grid), persistent=False)

    def project(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> query, key and value, (3, B, heads, T, d)."""
        bias = self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        projected = linear(x, self.qkv.weight, bias)
        return projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def bias(self, shared: Tensor | None) -> Tensor | None:
        """(1, heads, T, T): the bias of all blocks, or of this one."""
        if self.relative_position_bias_table is None:
            return shared
        return look_up(self.relative_position_bias_table, self.relative_position_index)


class Block(nn.Module):
    """Pre-norm transformer block, with layer scale if asked for."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: str = "full",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        table_grid: Grid | None = None,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, table_grid)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, shared_bias: Tensor | None = None, want_qkv: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), shared_bias (1, heads, T, T) -> (B, T, D), and (3, B, heads, T, d) if wanted."""
        qkv = self.attn.project(self.norm1(x))
        mixed = self.attn.proj(attend(*qkv, self.attn.bias(shared_bias)).transpose(1, 2).flatten(2))
        x = x + self.drop_path(mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        expanded = self.mlp(self.norm2(x))
        x = x + self.drop_path(expanded if self.gamma_2 is None else self.gamma_2 * expanded)
        return x, qkv if want_qkv else None


class ViTSizes(Section):
    """How large a plain vision transformer is."""

    patch_size: int = Field(16, gt=0)
    """Side of a patch in pixels."""
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
        if c.embed_dim % c.num_heads:
            raise ValueError(f"embed_dim {c.embed_dim} is not a multiple of num_heads {c.num_heads}")

        self.patch_embed = PatchEmbed(view.img_size, c.patch_size, view.in_chans, c.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        if c.position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid.num_patches, c.embed_dim))
        elif c.position == "sincos":
            table = torch.cat([torch.zeros(1, c.embed_dim), sincos_position_table(c.embed_dim, grid)])
            self.register_buffer("pos_embed", table[None])
        else:
            self.pos_embed = None
        self.rel_pos_bias = RelativePositionBias(grid, c.num_heads) if c.relative_bias == "shared" else None
        rates = [c.drop_path_rate * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.grid = grid
        self.blocks = nn.ModuleList(self.new_block(rate) for rate in rates)
        self.norm = nn.LayerNorm(c.embed_dim, eps=NORM_EPS) if c.final_norm else nn.Identity()
        self.init_weights()

        layers = range(c.depth)
        self.spec = EncoderSpec(
            dim=c.embed_dim,
            grid=grid,
            stride=c.patch_size,
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

    def rescale_by_depth(self) -> None:
        """Make what the blocks add to the residual stream smaller with depth, for encoders that begin so."""
        rescale_by_depth(self.blocks)

    def no_weight_decay(self) -> tuple[str, ...]:
        """As the official pre-training code of SimMIM and BEiT: mask token and bias tables do decay."""
        return ("cls_token", "pos_embed")

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W) -> tokens (B, N, D). Aux `position_bias` (1, heads, 1 + N, 1 + N) is that of all blocks."""
        x = self.embed(view, mask.at(self.spec.grid))
        shared_bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        layers, attn, qkvs = {}, {}, {}
        for i, block in enumerate(self.blocks):
            x, qkv = block(x, shared_bias, i in ask.qkv or i in ask.attn)
            if i in ask.layers:
                layers[i] = x
            if i in ask.qkv:
                qkvs[i] = qkv
            if i in ask.attn:
                q, k, _ = qkv
                logits, bias = q @ k.mT * block.attn.scale, block.attn.bias(shared_bias)
                attn[i] = (logits if bias is None else logits + bias).softmax(-1)
        x = self.final_norm(x)
        aux = {"position_bias": shared_bias} if "position_bias" in ask.aux else {}
        return Latent(x[:, 1:], self.spec.grid, prefix=x[:, :1], layers=layers, attn=attn, qkv=qkvs, aux=aux)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def embed(self, view: Tensor, mask: Mask) -> Tensor:
        """view (B, C, H, W) -> (B, 1 + N, D): class token and patches, hidden ones replaced, with positions."""
        patches = self.patch_embed(view)
        if mask.num_hidden != 0 or self.training:  # an unused mask token would stop distributed training
            patches = torch.where(mask.hidden[..., None], self.mask_token, patches)
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


def vit_layer_id(name: str, depth: int) -> int:
    """Layer id for fine-tuning of ids 0 to depth + 1; norms, head and a shared bias table have the last."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed") else depth + 1
