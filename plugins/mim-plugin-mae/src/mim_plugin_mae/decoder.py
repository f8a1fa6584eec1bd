"""The light decoder of MAE. Start at `MAEDecoder.forward`."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from mim_framework import Decoder, Latent, Mask, Pred, PredSpec, Section, Specs
from mim_framework.nn import (
    NORM_EPS,
    Block,
    check_heads,
    gather_tokens,
    sincos_position_table,
    split_heads,
    xavier_if_linear,
)


class LastBlock(Block):
    """A block for a caller who needs the output of some tokens only; exact, without the work for the others."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """x (B, T, D), ids (B, M) or None for all tokens -> (B, M, D). Every token remains key and value."""
        if ids is None:
            return super().forward(x)[0]
        dim, normed = x.shape[-1], self.norm1(x)
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        queries = linear(gather_tokens(normed, ids), weight[:dim], bias[:dim])
        (q,) = split_heads(queries, self.attn.num_heads, count=1)
        k, v = split_heads(linear(normed, weight[dim:], bias[dim:]), self.attn.num_heads, count=2)
        return self.finish(gather_tokens(x, ids), self.attn.output(q, k, v))


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
        check_heads(options.embed_dim, options.num_heads)
        self.num_prefix_tokens = encoder.num_prefix_tokens

        self.decoder_embed = nn.Linear(encoder.dim, options.embed_dim)
        needs_mask_token = encoder.visible_only and specs.masker.num_hidden > 0  # unused, it would stop DDP
        self.mask_token = nn.Parameter(torch.empty(1, 1, options.embed_dim)) if needs_mask_token else None
        table = sincos_position_table(options.embed_dim, encoder.grid, num_prefix_tokens=encoder.num_prefix_tokens)
        self.register_buffer("decoder_pos_embed", table[None])
        kinds = [Block] * (options.depth - 1) + [LastBlock]
        self.decoder_blocks = nn.ModuleList(
            kind(options.embed_dim, options.num_heads, options.mlp_ratio) for kind in kinds
        )
        self.decoder_norm = nn.LayerNorm(options.embed_dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(options.embed_dim, target.dim)
        self.apply(xavier_if_linear)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        self.spec = PredSpec.for_target(target, encoder.grid)

    def repeated_blocks(self) -> nn.ModuleList:
        return self.decoder_blocks

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """Predictions at `mask.ids_predict` (B, M), or at every position if that is None; of several sets, of each."""
        tokens = latent.tokens if latent.prefix is None else torch.cat([latent.prefix, latent.tokens], dim=1)
        x = self.decoder_embed(tokens)
        if latent.ids is not None:
            x = self.insert_mask_tokens(x, latent.ids)
        x = x + self.decoder_pos_embed

        mask = mask.at(self.spec.grid)
        ids = mask.ids_predict
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x, _ = block(x)
        if ids is None or mask.num_sets > 1:  # of several sets each takes its own from one pass over all positions
            x = last(x)[:, self.num_prefix_tokens :]
            x = mask.per_set(x) if ids is None else gather_tokens(x, ids)
        else:
            x = last(x, ids + self.num_prefix_tokens)
        return Pred(self.decoder_pred(self.decoder_norm(x)), self.spec.grid, ids)

    def insert_mask_tokens(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (B, prefix + K, D) at the positions ids (B, K) -> (B, prefix + N, D), the mask token everywhere else."""
        prefix = torch.arange(self.num_prefix_tokens, device=ids.device).expand(len(ids), -1)
        index = torch.cat([prefix, ids + self.num_prefix_tokens], dim=1)
        length = self.num_prefix_tokens + self.spec.grid.num_patches
        sequence = self.mask_token.expand(len(x), length, -1)  # stays float32 under autocast, as the residual stream
        return sequence.scatter(1, index[:, :, None].expand_as(x), x.to(sequence.dtype))
