"""Masked autoencoding of two kinds of images at once, as MultiMAE does it (Bachmann et al. 2022, arXiv 2204.01678).

Start at `MultiEncoder.forward`: the visible patches of an image and of its edges become one sequence. A decoder for
each view fills in what of it was hidden, and may look at the tokens of both. Masks, targets, losses and the order of a
step are those of the framework.
"""

from __future__ import annotations

import torch
from pydantic import Field
from timm.layers import Mlp
from torch import Tensor, nn

from mim_framework import (
    Ask,
    Decoder,
    EncoderSpec,
    ImageViews,
    JointEncoder,
    Latent,
    Mask,
    Pred,
    PredSpec,
    Sample,
    Section,
    Specs,
    Step,
    Stretch,
    Views,
    ViewSpec,
    ViTSizes,
    hookimpl,
)
from mim_framework.nn import (
    NORM_EPS,
    Block,
    PatchEmbed,
    attend,
    check_heads,
    gather_tokens,
    patch_grid,
    run_blocks,
    sides,
    sincos_position_table,
    split_heads,
    xavier_if_linear,
)

VIEWS = ("x", "edges")


def edges_of(image: Tensor) -> Tensor:
    """image uint8 (3, H, W) -> uint8 (1, H, W): how much a pixel differs from the ones to its right and below it."""
    grey = image.float().mean(0, keepdim=True)
    across = torch.diff(grey, dim=2, append=grey[:, :, -1:]).abs()
    down = torch.diff(grey, dim=1, append=grey[:, -1:]).abs()
    return ((across + down) / 2).round().to(torch.uint8)


class ImageAndEdges(ImageViews):
    """Two views of the same crop: "x", the image, and "edges", with one channel."""

    name = "image_and_edges"

    config: ImageViews.Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self.specs["edges"] = ViewSpec("edges", size=self.specs["x"].size, in_chans=1)

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        image = super().__call__(sample, rand)["x"]
        return {"x": image, "edges": edges_of(image)}

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """x normalised, edges in [0, 1], both float32."""
        return {**super().prepare(step, batch), "edges": batch["edges"].float() / 255}

    def evaluation_view(self, sample: Sample) -> dict[str, Tensor]:
        image = super().evaluation_view(sample)
        return {"x": image, "edges": edges_of(image)}


class MultiEncoder(JointEncoder):
    """Plain ViT of the visible patches of both views, with one class token; every view has an embedding of its own."""

    name = "multi_vit"

    class Config(ViTSizes):
        """Sizes of the transformer; `patch_size` is that of both views."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c = self.config
        check_heads(c.embed_dim, c.num_heads)
        views = {name: specs.view(name) for name in VIEWS}
        grids = {name: patch_grid(view.img_size, c.patch_size) for name, view in views.items()}
        self.patch_embed = nn.ModuleDict(
            {name: PatchEmbed(grids[name], c.patch_size, view.in_chans, c.embed_dim) for name, view in views.items()}
        )
        for name, grid in grids.items():
            self.register_buffer(f"pos_embed_{name}", sincos_position_table(c.embed_dim, grid)[None])
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        self.blocks = nn.ModuleList(Block(c.embed_dim, c.num_heads, c.mlp_ratio) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.embed_dim, eps=NORM_EPS)
        self.apply(xavier_if_linear)
        nn.init.normal_(self.cls_token, std=0.02)

        layers, stride = frozenset(range(c.depth)), sides(c.patch_size, 2)
        self.spec = EncoderSpec(
            dim=c.embed_dim,
            grid=grids["x"],
            stride=stride,
            depth=c.depth,
            num_heads=c.num_heads,
            num_prefix_tokens=1,
            in_chans=views["x"].in_chans,
            visible_only=True,
            accepts=frozenset({"equal", "none"}),
            offers=Ask(layers=layers, attn=layers, qkv=layers),
            views=VIEWS,
            grids={name: (grid, stride) for name, grid in grids.items()},
        )

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, views: Views, masks: dict[str, Mask], ask: Ask = Ask()) -> Latent:
        """Tokens (B, K of x + K of edges, D): those of the image first, each view's in the order of its `ids_keep`."""
        sequence, stretches, start = [self.cls_token.expand(len(views["x"]), -1, -1)], {}, 0
        for name in VIEWS:
            grid = self.spec.of(name).grid
            ids = masks[name].at(grid).ids_keep
            patches = self.patch_embed[name](views[name]) + self.get_buffer(f"pos_embed_{name}")
            sequence.append(gather_tokens(patches, ids))
            stretches[name] = Stretch(start, ids.shape[1], grid, ids)
            start += ids.shape[1]
        x, answers = run_blocks(self.blocks, torch.cat(sequence, dim=1), ask)
        x = self.final_norm(x)
        return Latent(x[:, 1:], self.spec.grid, prefix=x[:, :1], stretches=stretches, **answers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)


class CrossDecoder(Decoder):
    """Every position to predict asks the tokens of all views (cross-attention), and an MLP makes its values."""

    name = "cross"

    class Config(Section):
        embed_dim: int = Field(256, gt=0)
        """Width of the decoder; a multiple of 4 and of `num_heads`."""
        num_heads: int = Field(8, gt=0)
        """Attention heads."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c, grid = self.config, specs.encoder.grid
        check_heads(c.embed_dim, c.num_heads)
        self.query = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        self.register_buffer("pos_embed", sincos_position_table(c.embed_dim, grid)[None])
        self.to_q = nn.Linear(c.embed_dim, c.embed_dim)
        self.to_kv = nn.Linear(specs.encoder.dim, 2 * c.embed_dim)
        self.norm = nn.LayerNorm(c.embed_dim, eps=NORM_EPS)
        self.mlp = Mlp(c.embed_dim, 4 * c.embed_dim)
        self.head = nn.Linear(c.embed_dim, specs.target.dim)
        self.apply(xavier_if_linear)
        nn.init.normal_(self.query, std=0.02)
        self.spec = PredSpec.for_target(specs.target, grid)

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """Values at `mask.ids_predict` (B, M), or at every position if that is None."""
        seen = latent if latent.whole is None else latent.whole
        tokens = seen.tokens if seen.prefix is None else torch.cat([seen.prefix, seen.tokens], dim=1)
        ids = mask.at(self.spec.grid).ids_predict
        queries = (self.query + self.pos_embed).expand(len(tokens), -1, -1)
        queries = queries if ids is None else gather_tokens(queries, ids)
        (q,) = split_heads(self.to_q(queries), self.config.num_heads, count=1)
        k, v = split_heads(self.to_kv(tokens), self.config.num_heads, count=2)
        x = queries + attend(q, k, v).transpose(1, 2).flatten(2)
        return Pred(self.head(x + self.mlp(self.norm(x))), self.spec.grid, ids)


@hookimpl
def mim_decoders():
    return [CrossDecoder]


@hookimpl
def mim_encoders():
    return [MultiEncoder]


@hookimpl
def mim_views():
    return [ImageAndEdges]
