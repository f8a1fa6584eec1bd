"""Encoders from timm, unmasked: students of distillation, and above all frozen teachers."""

from __future__ import annotations

from typing import Any

import timm
from pydantic import Field
from torch import Tensor

from mim_framework.components import Encoder, Specs
from mim_framework.config import Section
from mim_framework.records import Ask, EncoderSpec, Grid, Latent, Mask


class TimmEncoder(Encoder):
    """Any timm model with a single-stride feature map, by name; it sees the whole image."""

    name = "timm"

    class Config(Section):
        model: str
        """A name that `timm.create_model` knows, for example `vit_base_patch16_224`."""
        pretrained: bool = False
        """Load timm's published weights (needs the internet or a filled cache)."""
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth."""
        view: str = "x"
        """The view it sees."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view = specs.view(self.config.view)
        options: dict[str, Any] = {"pretrained": self.config.pretrained, "num_classes": 0, "in_chans": view.in_chans}
        if self.config.drop_path_rate:
            options["drop_path_rate"] = self.config.drop_path_rate
        if not timm.is_model(self.config.model):
            close = timm.list_models(f"*{self.config.model.split('_')[0]}*")[:5]
            raise ValueError(f"timm knows no model '{self.config.model}'; for example {', '.join(close)}")
        try:
            try:  # vision transformers take the image size, convolutional networks do not
                self.model = timm.create_model(self.config.model, img_size=view.img_size, **options)
            except TypeError:
                self.model = timm.create_model(self.config.model, **options)
        except Exception as error:  # of whichever library downloads
            if not self.config.pretrained:
                raise
            raise ValueError(
                f"timm cannot load the weights of '{self.config.model}' ({type(error).__name__}: {error}); "
                "fill its cache where there is internet and set HF_HOME to it, or use pretrained=false"
            ) from error
        stride = self.model.feature_info[-1]["reduction"]
        grid = Grid(tuple(size // stride for size in view.img_size))
        self.num_prefix_tokens = getattr(self.model, "num_prefix_tokens", 0)
        self.spec = EncoderSpec(
            dim=self.model.num_features,
            grid=grid,
            stride=stride,
            depth=len(getattr(self.model, "blocks", ())),
            num_heads=0,
            num_prefix_tokens=self.num_prefix_tokens,
            in_chans=view.in_chans,
            accepts=frozenset({"none"}),
        )

    def no_weight_decay(self) -> list[str]:
        """What timm exempts."""
        named = getattr(self.model, "no_weight_decay", tuple)()
        return [f"model.{name}" for name in named]

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        features = self.model.forward_features(view)
        if features.ndim == 3:
            prefix, tokens = features[:, : self.num_prefix_tokens], features[:, self.num_prefix_tokens :]
            return Latent(tokens, self.spec.grid, prefix=prefix if self.num_prefix_tokens else None)
        channels_last = features.shape[-1] == self.spec.dim and features.shape[1] != self.spec.dim
        tokens = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        return Latent(tokens, self.spec.grid)
