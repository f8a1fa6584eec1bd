"""The encoder of MAE: a plain ViT on the visible patches. Start at `MAEEncoder.forward`."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from mim_framework import Ask, Encoder, EncoderSpec, Latent, Mask, Section, Specs, ViTSizes
from mim_framework.nn import (
    NORM_EPS,
    Block,
    PatchEmbed,
    check_heads,
    drop_path_ramp,
    gather_tokens,
    patch_grid,
    patchify,
    run_blocks,
    sides,
    sincos_position_table,
    xavier_if_linear,
)


class MAEEncoder(Encoder):
    """Plain ViT that sees the visible patches only; with a mask that hides nothing it is an ordinary ViT."""

    name = "mae_vit"

    class Config(ViTSizes):
        embed_dim: int = Field(768, gt=0)
        """Width; a multiple of 4 and of `num_heads`."""
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first; MAE pre-trains without."""
        learn_positions: bool = False
        """Train the table of positions, as the official fine-tuning does; in pre-training it is fixed."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, options = specs.view("x"), self.config
        grid = patch_grid(view.img_size, options.patch_size)
        check_heads(options.embed_dim, options.num_heads)

        self.patch_embed = PatchEmbed(grid, options.patch_size, view.in_chans, options.embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, options.embed_dim))
        positions = sincos_position_table(options.embed_dim, grid, num_prefix_tokens=1)[None]
        if options.learn_positions:
            self.pos_embed = nn.Parameter(positions)
        else:
            self.register_buffer("pos_embed", positions)
        self.blocks = nn.ModuleList(
            Block(options.embed_dim, options.num_heads, options.mlp_ratio, drop_path=rate)
            for rate in drop_path_ramp(options.drop_path_rate, options.depth)
        )
        self.norm = nn.LayerNorm(options.embed_dim, eps=NORM_EPS)
        self.apply(xavier_if_linear)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))  # as if it were a linear layer
        nn.init.normal_(self.cls_token, std=0.02)

        layers = range(options.depth)
        self.spec = EncoderSpec(
            dim=options.embed_dim,
            grid=grid,
            stride=sides(options.patch_size, len(grid.shape)),
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
        """view (B, C, *size) -> tokens (B, K, D), rows as those of the mask, in the order of `mask.ids_keep`."""
        mask = mask.at(self.spec.grid)
        ids = None if mask.num_hidden == 0 else mask.ids_keep
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(mask.hidden), -1, -1)
        x = torch.cat([cls_token, self.embed(view, ids)], dim=1)
        x, answers = run_blocks(self.blocks, x, ask)
        x = self.final_norm(x)
        return Latent(x[:, 1:], self.spec.grid, ids, prefix=x[:, :1], **answers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def embed(self, view: Tensor, ids: Tensor | None) -> Tensor:
        """view (B, C, *size) -> patch embeddings with positions (B, K, D), computed only where `ids` (B, K) says."""
        patches, positions = patchify(view, self.spec.stride), self.pos_embed[:, 1:]
        if ids is not None:
            patches, positions = gather_tokens(patches, ids), positions[0, ids]
        projection = self.patch_embed.proj
        weight = projection.weight.movedim(1, -1).flatten(1)  # (D, C, P, P) -> (D, P*P*C), the order of `patchify`
        return linear(patches, weight, projection.bias) + positions
