"""VQ-KD, stage one of BEiT v2: a ViT whose patches become ids of a codebook, trained to keep a teacher's features.

Start at `VQKDEncoder.forward`. The codes are in `codebook.py`; target and loss are the core's `features` of a frozen
teacher and `cosine`. In stage two the trained encoder is the tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

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
    Step,
    Views,
    ViTSizes,
    without_autocast,
)
from mim_framework.nn import (
    NORM_EPS,
    Block,
    PatchEmbed,
    Renormalize,
    check_heads,
    gather_tokens,
    init_linear,
    patch_grid,
    rescale_by_depth,
    trunc_normal,
    usage_picture,
)
from mim_plugin_beitv2.codebook import EMACodebook

logger = logging.getLogger(__name__)

ENOUGH_TO_JUDGE = 4
"""Vectors per code that must have been seen before little use of the codebook is a fault."""


class Transformer(nn.Module):
    """ViT on a whole grid: class token, learned positions, no bias of the key; only patch tokens are normalised."""

    def __init__(
        self, patch_embed: nn.Module, grid: Grid, dim: int, depth: int, num_heads: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid.num_patches, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias="qv") for _ in range(depth))
        self.fc_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As officially; the patch embedding keeps PyTorch's values."""
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal(parameter)
        self.blocks.apply(init_if_linear)
        rescale_by_depth(self.blocks)

    def forward(self, patches: Tensor) -> Tensor:
        """What `patch_embed` takes -> (B, N, D)."""
        x = self.patch_embed(patches)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x, _ = block(x)
        return self.fc_norm(x[:, 1:])


def init_if_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        init_linear(module)


def task_layer(dim: int, out_dim: int) -> nn.Sequential:
    """Linear, tanh, linear: between a transformer and the codes or the teacher's features."""
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out_dim)).apply(init_if_linear)


class VQKDEncoder(Encoder):
    """ViT whose patch tokens are replaced by the nearest codes of a codebook; its ids make it a tokenizer.

    Aux `ids` (B, N) are the numbers of the codes, aux `features` (B, N, D) the tokens before they are projected to
    codes. `Latent.tokens` (B, N, C) are the codes, through which gradients pass straight to the projected tokens.
    """

    name = "vqkd"

    class Config(ViTSizes):
        num_codes: int = Field(8192, gt=0)
        """Size of the codebook, which is the vocabulary of the token ids."""
        code_dim: int = Field(32, gt=0)
        """Width of a code; small, so that all codes are used."""
        decay: float = Field(0.99, ge=0, le=1)
        """A used code becomes decay * code + (1 - decay) * mean of its vectors, once per optimizer step."""
        beta: float = Field(1.0, ge=0)
        """Weight of the commitment loss, the squared distance of a vector from its code."""
        kmeans_init: bool = True
        """Place the codes by k-means over the vectors of the first step, else at random."""
        revive_after: int | None = Field(None, gt=0)
        """Optimizer steps without use after which a code is replaced by a random vector; null for never, as officially.
        """
        warn_usage: float = Field(0.1, ge=0, lt=1)
        """Share of codes in use below which a warning is logged once; 0 for none."""

    counted_for_the_log = ("codebook.window",)

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        grid = patch_grid(view.img_size, c.patch_size)
        zeros, ones, half = ((value,) * view.in_chans for value in (0.0, 1.0, 0.5))
        if view.mean is None or view.std is None:  # a view that is not normalised is in [0, 1]
            view = replace(view, mean=zeros, std=ones)
        self.to_signed = Renormalize(view, half, half)
        patch_embed = PatchEmbed(grid, c.patch_size, view.in_chans, c.embed_dim)
        self.vit = Transformer(patch_embed, grid, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)
        self.task_layer = task_layer(c.embed_dim, c.code_dim)
        self.codebook = EMACodebook(
            c.num_codes, c.code_dim, c.decay, revive_after=c.revive_after, begins_from_data=c.kmeans_init
        )
        self.step: Step | None = None
        self.warned = False
        self.spec = EncoderSpec(
            dim=c.code_dim,
            grid=grid,
            stride=c.patch_size,
            depth=c.depth,
            num_heads=c.num_heads,
            in_chans=view.in_chans,
            accepts=frozenset({"none"}),
            offers=Ask(aux=frozenset({"ids", "features"})),
            num_classes=c.num_codes,
        )

    def no_weight_decay(self) -> tuple[str, ...]:
        return ("vit.cls_token", "vit.pos_embed")

    def repeated_blocks(self) -> nn.ModuleList:
        return self.vit.blocks

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W), of which nothing is hidden -> codes (B, N, code_dim)."""
        features = self.vit(self.to_signed(view))
        vectors = self.vectors(features)
        codes, ids = self.codebook(vectors)
        losses = {}
        if self.training:
            losses["commitment"] = self.config.beta * mse_loss(vectors, codes)
            if self.step is not None:
                self.codebook.keep_spares(vectors, self.step)
        aux = {name: tensor for name, tensor in (("ids", ids), ("features", features)) if name in ask.aux}
        straight_through = vectors + (codes - vectors).detach()
        return Latent(straight_through, self.spec.grid, aux=aux, losses=losses)

    def vectors(self, features: Tensor) -> Tensor:
        """Patch tokens (B, N, D) -> (B, N, code_dim) float32 of length 1, also under autocast."""
        with without_autocast():
            return normalize(self.task_layer(features.float()), dim=-1)

    def calibrate(self, batches: Sequence[tuple[Step, Views]]) -> None:
        """Place the codes by k-means, unless they come from a checkpoint."""
        if self.codebook.initted.item():
            return
        training = self.training
        self.eval()
        found = [self.vectors(self.vit(self.to_signed(views["x"]))) for _, views in batches]
        self.train(training)
        step = batches[0][0]
        vectors = step.world.gather(torch.cat(found))
        positions = step.world.gather(torch.cat([step.positions for step, _ in batches]))
        self.codebook.begin_from(vectors[positions.argsort()].flatten(0, 1), step)

    def begin_step(self, step: Step) -> None:
        self.step = replace(step, teachers=None)  # whose passes would stay in memory

    def before_step(self, step: Step) -> None:
        self.codebook.take()

    def after_step(self, step: Step) -> None:
        self.codebook.update(step)

    def metrics(self) -> dict[str, Tensor]:
        """`codebook_usage` and `perplexity` of all images of all ranks since the last line of the log."""
        book, least = self.codebook, self.config.warn_usage
        num_vectors = book.window.sum()
        if not num_vectors:
            return {}
        usage, perplexity = book.usage()
        if usage < least and num_vectors >= ENOUGH_TO_JUDGE * book.num_codes and not self.warned:
            self.warned = True
            if self.step is None or self.step.world.is_main:
                logger.warning(
                    f"{int((book.window > 0).sum())} of {book.num_codes} codes are in use, a share below warn_usage "
                    f"{least:g}. Fewer num_codes, a smaller code_dim, decoder.depth=1, larger batches or "
                    "revive_after may help"
                )
        book.start_window()
        return {"codebook_usage": usage, "perplexity": perplexity}

    def pictures(self) -> dict[str, Tensor]:
        """How often each code is used, most used first, on a logarithmic scale."""
        counts = self.codebook.window if self.codebook.window.any() else self.codebook.last_window
        return {} if counts is None else {"codebook_usage": usage_picture(counts)}


class VQKDDecoder(Decoder):
    """Small ViT from codes to the teacher's features, with learned positions (BEiT v2); needs a token everywhere."""

    name = "vqkd_decoder"

    class Config(Section):
        embed_dim: int = Field(768, gt=0)
        """Width; a multiple of `num_heads`."""
        depth: int = Field(3, gt=0)
        """Number of transformer blocks: 3 give the better tokens, with 1 more codes are used."""
        num_heads: int = Field(12, gt=0)
        """Attention heads per block."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs, as a multiple of `embed_dim`."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        encoder, target, c = specs.encoder, specs.target, self.config
        if encoder.visible_only:
            raise ValueError(
                "decoder 'vqkd_decoder' needs an encoder with a token at every position; this one drops hidden tokens"
            )
        if target.grid != encoder.grid:
            raise ValueError(f"decoder 'vqkd_decoder': target grid {target.grid}, encoder grid {encoder.grid}")
        self.grid = encoder.grid
        patch_embed = nn.Linear(encoder.dim, c.embed_dim)
        self.vit = Transformer(patch_embed, self.grid, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)
        self.task_layer = task_layer(c.embed_dim, target.dim)
        self.spec = PredSpec.for_target(target, self.grid)

    def no_weight_decay(self) -> tuple[str, ...]:
        return ("vit.cls_token", "vit.pos_embed")

    def repeated_blocks(self) -> nn.ModuleList:
        return self.vit.blocks

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        ids = mask.at(self.grid).ids_predict
        tokens = self.vit(latent.tokens)
        return Pred(self.task_layer(tokens if ids is None else gather_tokens(tokens, ids)), self.grid, ids)
