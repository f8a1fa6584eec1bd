"""Decoders that more than one method uses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mim_framework.base.section import Section
from mim_framework.contract.components import Decoder
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Latent, Pred
from mim_framework.contract.specs import PredSpec, Specs
from mim_framework.nn.blocks import NORM_EPS
from mim_framework.nn.init import FAR, ONE_STD, init_linear
from mim_framework.nn.masking import gather_tokens


class LinearDecoder(Decoder):
    """One linear layer on the encoder's tokens, of which there must be one at every position (SimMIM, MaskFeat)."""

    name = "linear"

    class Config(Section):
        norm: bool = False
        """LayerNorm before the linear layer, for an encoder without a final one (MaskFeat)."""
        init: Literal["trunc_normal", "trunc_normal_one_std", "torch"] = "trunc_normal"
        """Initial weights: truncated normal of 0.02 and zero biases, the same cut at one standard deviation (BEiT), or
        PyTorch's default (SimMIM)."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        if specs.encoder.visible_only:
            raise ValueError(
                "decoder 'linear' needs an encoder with a token at every position; this one drops hidden tokens. "
                "Use a decoder that re-inserts them, for example 'mae_decoder'"
            )
        if specs.target.grid != specs.encoder.grid:
            raise ValueError(f"decoder 'linear': target grid {specs.target.grid}, encoder grid {specs.encoder.grid}")
        self.grid = specs.encoder.grid
        self.norm = nn.LayerNorm(specs.encoder.dim, eps=NORM_EPS) if self.config.norm else nn.Identity()
        self.head = nn.Linear(specs.encoder.dim, specs.target.dim)
        if self.config.init != "torch":
            init_linear(self.head, ONE_STD if self.config.init == "trunc_normal_one_std" else FAR)
        self.spec = PredSpec.for_target(specs.target, self.grid)

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        mask = mask.at(self.grid)
        ids = mask.ids_predict
        if ids is None:
            return Pred(mask.per_set(self.head(self.norm(latent.tokens))), self.grid)
        return Pred(self.head(self.norm(gather_tokens(latent.tokens, ids))), self.grid, ids)


class PooledDecoder(Decoder):
    """One linear layer on the mean of an image's tokens, or on its class token: one prediction of each image."""

    name = "pooled"

    class Config(Section):
        pool: Literal["mean", "cls"] = "mean"
        """Mean over the visible tokens, or the class token."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        target, encoder, grid = specs.target, specs.encoder, Grid(())
        if target.grid != grid:
            raise ValueError(f"decoder 'pooled' predicts whole images, the target lives on grid {target.grid}")
        if self.config.pool == "cls" and not encoder.num_prefix_tokens:
            raise ValueError("decoder 'pooled': pool=cls, but the encoder has no class token; use pool=mean")
        self.head = nn.Linear(encoder.dim, target.dim)
        init_linear(self.head, FAR)
        self.spec = PredSpec.for_target(target, grid)

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """values (B, 1, num_classes)"""
        pooled: Tensor = latent.pooled() if self.config.pool == "mean" else latent.prefix[:, 0]
        return Pred(self.head(pooled).unsqueeze(1), self.spec.grid)
