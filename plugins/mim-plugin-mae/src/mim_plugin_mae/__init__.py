"""MAE, masked autoencoders (He et al. 2021, arXiv 2111.06377): the visible-only ViT and its light decoder.

Start at `MAEEncoder.forward` and `MAEDecoder.forward`: a step is those two between the core's `random` masker, `pixels`
target and `mse` loss. The layouts of official checkpoints are in `checkpoints.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import linear

from mim_framework import (
    Ask,
    Decoder,
    Encoder,
    EncoderSpec,
    Grid,
    Latent,
    Mask,
    Pred,
    PredSpec,
    Section,
    Specs,
    attend,
    gather_tokens,
    hookimpl,
    patch_grid,
    patchify,
    sincos_position_table,
)
from mim_framework.builtins.vit import ViTSizes
from mim_plugin_mae.checkpoints import MMPretrainCheckpoint, OfficialCheckpoint, TimmCheckpoint

norm_layer = partial(nn.LayerNorm, eps=1e-6)  # models_mae.py: eps of every LayerNorm


class SelfAttention(Attention):
    """timm's attention in its plain form, in steps that the blocks below can use one by one."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        return self.output(*self.split_heads(self.qkv(x)))

    def split_heads(self, projected: Tensor) -> Tensor:
        """(B, T, n * D) -> (n, B, heads, T, d)."""
        return projected.unflatten(-1, (-1, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)

    def output(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, heads, M, d), k and v (B, heads, T, d) -> (B, M, D)."""
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


BLOCK_OPTIONS = {"qkv_bias": True, "norm_layer": norm_layer, "attn_layer": SelfAttention}


class EncoderBlock(Block):
    """timm's block, which can also hand out the query, key and value of its attention."""

    def forward(self, x: Tensor, with_qkv: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> (B, T, D), and (3, B, heads, T, d) if asked for."""
        qkv = self.attn.split_heads(self.attn.qkv(self.norm1(x))) if with_qkv else None
        return super().forward(x), qkv


class LastBlock(Block):
    """timm's block for a caller who needs the output of some tokens only; exact, without the work for the others."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """x (B, T, D), ids (B, M) or None for all tokens -> (B, M, D). Every token remains key and value."""
        if ids is None:
            return super().forward(x)
        dim, normed, x = x.shape[-1], self.norm1(x), gather_tokens(x, ids)
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        (q,) = self.attn.split_heads(linear(gather_tokens(normed, ids), weight[:dim], bias[:dim]))
        k, v = self.attn.split_heads(linear(normed, weight[dim:], bias[dim:]))
        x = x + self.attn.output(q, k, v)
        return x + self.mlp(self.norm2(x))


class MAEEncoder(Encoder):
    """Plain ViT that sees the visible patches only; with a mask that hides nothing it is an ordinary ViT."""

    name = "mae_vit"

    class Config(ViTSizes):
        embed_dim: int = Field(768, gt=0)
        """Width; a multiple of 4 and of `num_heads`."""
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first; MAE pre-trains without."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, options = specs.view("x"), self.config
        grid = patch_grid(view.img_size, options.patch_size)
        require_heads(options.embed_dim, options.num_heads)

        self.patch_embed = PatchEmbed(view.img_size, options.patch_size, view.in_chans, options.embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, options.embed_dim))
        self.register_buffer("pos_embed", position_table(options.embed_dim, grid, num_prefix_tokens=1))
        rates = [options.drop_path_rate * i / max(1, options.depth - 1) for i in range(options.depth)]
        self.blocks = nn.ModuleList(
            EncoderBlock(options.embed_dim, options.num_heads, options.mlp_ratio, drop_path=rate, **BLOCK_OPTIONS)
            for rate in rates
        )
        self.norm = norm_layer(options.embed_dim)
        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))  # as if it were a linear layer
        nn.init.normal_(self.cls_token, std=0.02)

        layers = range(options.depth)
        self.spec = EncoderSpec(
            dim=options.embed_dim,
            grid=grid,
            stride=options.patch_size,
            depth=options.depth,
            num_heads=options.num_heads,
            num_prefix_tokens=1,
            in_chans=view.in_chans,
            visible_only=True,
            accepts=frozenset({"equal", "none"}),
            offers=Ask(layers=frozenset(layers), attn=frozenset(layers), qkv=frozenset(layers)),
            layers=dict.fromkeys(layers, (options.embed_dim, grid)),
        )

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W) -> tokens (B, K, D) in the order of `mask.ids_keep`."""
        mask = mask.at(self.spec.grid)
        ids = None if mask.num_hidden == 0 else mask.ids_keep
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(view), -1, -1)
        x = torch.cat([cls_token, self.embed(view, ids)], dim=1)

        layers, attn, qkvs = {}, {}, {}
        for i, block in enumerate(self.blocks):
            x, qkv = block(x, i in ask.qkv or i in ask.attn)
            if i in ask.layers:
                layers[i] = x
            if i in ask.qkv:
                qkvs[i] = qkv
            if i in ask.attn:
                q, k, _ = qkv
                attn[i] = (q @ k.mT * block.attn.scale).softmax(-1)
        x = self.final_norm(x)
        return Latent(x[:, 1:], self.spec.grid, ids, prefix=x[:, :1], layers=layers, attn=attn, qkv=qkvs)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def embed(self, view: Tensor, ids: Tensor | None) -> Tensor:
        """view (B, C, H, W) -> patch embeddings with positions (B, K, D), computed only where `ids` (B, K) says."""
        patches, positions = patchify(view, self.spec.stride), self.pos_embed[:, 1:]
        if ids is not None:
            patches, positions = gather_tokens(patches, ids), positions[0, ids]
        projection = self.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) -> (D, P*P*C), the order of `patchify`
        return linear(patches, weight, projection.bias) + positions


class MAEDecoder(Decoder):
    """Light transformer over all positions, with one learned mask token where the encoder saw nothing.

    After an encoder with a token at every position it is a plain transformer head without a mask token.
    """

    name = "mae_decoder"

    class Config(Section):
        embed_dim: int = Field(512, gt=0)
        """Width of the decoder, independent of the encoder's; a multiple of 4 and of `num_heads`."""
        depth: int = Field(8, gt=0)
        """Number of transformer blocks."""
        num_heads: int = Field(16, gt=0)
        """Attention heads per block."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs, as a multiple of `embed_dim`."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        encoder, target, options = specs.encoder, specs.target, self.config
        if target.grid != encoder.grid:
            raise ValueError(
                f"decoder 'mae_decoder': the target's grid {target.grid} is not the encoder's {encoder.grid}"
            )
        require_heads(options.embed_dim, options.num_heads)
        self.num_prefix_tokens = encoder.num_prefix_tokens

        self.decoder_embed = nn.Linear(encoder.dim, options.embed_dim)
        needs_mask_token = encoder.visible_only and specs.masker.num_hidden > 0  # unused, it would stop DDP
        self.mask_token = nn.Parameter(torch.empty(1, 1, options.embed_dim)) if needs_mask_token else None
        table = position_table(options.embed_dim, encoder.grid, encoder.num_prefix_tokens)
        self.register_buffer("decoder_pos_embed", table)
        kinds = [Block] * (options.depth - 1) + [LastBlock]
        self.decoder_blocks = nn.ModuleList(
            kind(options.embed_dim, options.num_heads, options.mlp_ratio, **BLOCK_OPTIONS) for kind in kinds
        )
        self.decoder_norm = norm_layer(options.embed_dim)
        self.decoder_pred = nn.Linear(options.embed_dim, target.dim)
        self.apply(init_weights)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        self.spec = PredSpec("probs" if target.kind in ("ids", "probs") else "dense", target.dim, encoder.grid)

    def repeated_blocks(self) -> nn.ModuleList:
        return self.decoder_blocks

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """Predictions at `mask.ids_predict` (B, M), or at every position if that is None."""
        tokens = latent.tokens if latent.prefix is None else torch.cat([latent.prefix, latent.tokens], dim=1)
        x = self.decoder_embed(tokens)
        if latent.ids is not None:
            x = self.insert_mask_tokens(x, latent.ids)
        x = x + self.decoder_pos_embed

        ids = mask.at(self.spec.grid).ids_predict
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        x = last(x)[:, self.num_prefix_tokens :] if ids is None else last(x, ids + self.num_prefix_tokens)
        return Pred(self.decoder_pred(self.decoder_norm(x)), self.spec.grid, ids)

    def insert_mask_tokens(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (B, prefix + K, D) at the positions ids (B, K) -> (B, prefix + N, D), the mask token everywhere else."""
        prefix = torch.arange(self.num_prefix_tokens, device=ids.device).expand(len(ids), -1)
        index = torch.cat([prefix, ids + self.num_prefix_tokens], dim=1)
        length = self.num_prefix_tokens + self.spec.grid.num_patches
        sequence = self.mask_token.expand(len(x), length, -1)  # stays float32 under autocast, as the residual stream
        return sequence.scatter(1, index[:, :, None].expand_as(x), x.to(sequence.dtype))


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform for every linear layer, fused query-key-value included (models_mae.py)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def position_table(dim: int, grid: Grid, num_prefix_tokens: int) -> Tensor:
    """(1, prefix + N, dim): zeros for the prefix, then the fixed sin-cos table."""
    return torch.cat([torch.zeros(num_prefix_tokens, dim), sincos_position_table(dim, grid)])[None]


def require_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")


@hookimpl
def mim_encoders():
    return [MAEEncoder]


@hookimpl
def mim_decoders():
    return [MAEDecoder]


@hookimpl
def mim_checkpoint_formats():
    return [OfficialCheckpoint, TimmCheckpoint, MMPretrainCheckpoint]
