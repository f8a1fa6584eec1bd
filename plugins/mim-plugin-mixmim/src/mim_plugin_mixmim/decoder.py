"""The decoder of MixMIM, which reconstructs both images of a mixture. Start at `MixDecoder.forward`."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mim_framework import Decoder, Latent, Mask, Pred, PredSpec, Section, Specs
from mim_framework.nn import check_heads, sincos_position_table, trunc_normal, xavier_if_linear
from mim_plugin_mixmim.blocks import Block


class JoiningBlock(Block):
    """The last block of the decoder: of two branches it finishes, at every position, the one that is wanted there."""

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (2B, 1, T, D), hidden (B, 1, T, 1) -> (B, 1, T, D): the first half where hidden, else the second."""
        mixed = self.attn(self.norm1(x))
        return self.finish(*(torch.where(hidden, *each.chunk(2)) for each in (x, mixed)))


class MixDecoder(Decoder):
    """Light transformer that reconstructs both images of a mixture, each from its own tokens and mask tokens.

    The tokens of an image lie in two rows: those that its own row shows, and those that ride in its partner's. Each
    share alone predicts the positions of the other, so that every position is predicted exactly once, unseen.
    """

    name = "mixmim_decoder"
    unmixes = True

    class Config(Section):
        embed_dim: int = Field(512, gt=0)
        """Width of the decoder, independent of the encoder's; a multiple of 4 and of `num_heads`."""
        depth: int = Field(8, gt=0)
        """Number of transformer blocks."""
        num_heads: int = Field(16, gt=0)
        """Attention heads per block."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs, as a multiple of `embed_dim`."""
        norm_eps: float = Field(1e-5, gt=0)
        """Term under the root of every LayerNorm; mmpretrain has 1e-6."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        encoder, target, c = specs.encoder, specs.target, self.config
        if encoder.visible_only:
            raise ValueError("decoder 'mixmim_decoder' needs an encoder with a token at every position")
        if target.grid != encoder.grid:
            raise ValueError(
                f"decoder 'mixmim_decoder': the target's grid {target.grid} is not the encoder's {encoder.grid}"
            )
        check_heads(c.embed_dim, c.num_heads)
        self.decoder_embed = nn.Linear(encoder.dim, c.embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        self.register_buffer("decoder_pos_embed", sincos_position_table(c.embed_dim, encoder.grid)[None])
        kinds = [Block] * (c.depth - 1) + [JoiningBlock]
        self.decoder_blocks = nn.ModuleList(
            kind(c.embed_dim, c.num_heads, c.mlp_ratio, norm_eps=c.norm_eps) for kind in kinds
        )
        self.decoder_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.decoder_pred = nn.Linear(c.embed_dim, target.dim)
        self.apply(xavier_if_linear)
        trunc_normal(self.mask_token)
        self.spec = PredSpec.for_target(target, encoder.grid)

    def repeated_blocks(self) -> nn.ModuleList:
        return self.decoder_blocks

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """Predictions of every image at every position (B, N, C)."""
        mask = mask.at(self.spec.grid)
        hidden = mask.hidden[..., None]
        x = self.decoder_embed(latent.tokens)
        shown = torch.where(hidden, self.mask_token, x)
        riding = torch.where(hidden, x[mask.partner], self.mask_token)  # partners hide the same positions
        x = torch.cat([shown, riding])[:, None] + self.decoder_pos_embed
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        x = last(x, hidden[:, None])[:, 0]
        return Pred(self.decoder_pred(self.decoder_norm(x)), self.spec.grid)
