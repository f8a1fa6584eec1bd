"""Patch aggregation, what BEiT v2 adds to BEiT in stage two. Start at `PatchAggregation.forward`."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from mim_framework import (
    Ask,
    Decoder,
    Head,
    Latent,
    MaskedPrediction,
    MaskTokenViT,
    Outcome,
    Parts,
    Section,
    Step,
    Views,
)
from mim_framework.nn import NORM_EPS, drop_path_ramp, rescale_by_depth


class PatchAggregation(MaskedPrediction):
    """Masked prediction twice: as usual, and from early patch tokens that know the late blocks through [CLS] alone.

    Two more blocks see the class token of the last block and the patch tokens of an early one. Every head predicts from
    their output too, by the same weights; its loss is called NAME_cls and is added with the same weight. After
    pre-training the blocks are thrown away.
    """

    name = "beit_v2"

    class Config(Section):
        early_layers: int = Field(9, gt=0)
        """Blocks that the early patch tokens have passed: 9 of 12, 21 of 24."""
        head_layers: int = Field(2, gt=0)
        """Blocks that bring these and the class token together."""
        shared_head: bool = True
        """Predict from both by the same norm and decoders, else by a norm and decoders of their own."""

    config: Config

    def __init__(self, config: Section, parts: Parts) -> None:
        super().__init__(config, parts)
        c, encoder = self.config, parts.encoder
        check_fit(encoder, c.early_layers, parts.heads)
        self.last, self.early = encoder.spec.depth - 1, c.early_layers - 1
        shares_bias = "position_bias" in encoder.spec.offers.aux
        aux = frozenset({"position_bias"} if shares_bias else ())
        self.ask |= Ask(layers=frozenset({self.early, self.last}), aux=aux)
        self.cls_blocks = nn.ModuleList(encoder.new_block(rate) for rate in self.drop_path_rates(encoder))
        # Official: these blocks keep PyTorch's initial values, except for what they add to the residual stream.
        rescale_by_depth(self.cls_blocks, first=c.early_layers + 1)
        self.cls_norm = None if c.shared_head else nn.LayerNorm(encoder.spec.dim, eps=NORM_EPS)
        self.cls_decoders = nn.ModuleDict(
            {} if c.shared_head else {name: another_decoder(head, parts) for name, head in parts.heads.items()}
        )

    def drop_path_rates(self, encoder: MaskTokenViT) -> list[float]:
        """Those of the blocks that would follow the early one, on the encoder's ramp."""
        c = self.config
        end = c.early_layers + c.head_layers
        return drop_path_ramp(encoder.config.drop_path_rate, max(encoder.spec.depth, end))[c.early_layers : end]

    def no_weight_decay(self) -> list[str]:
        """Bias tables of the added blocks, if the encoder exempts its own; names of the encoder are its own affair."""
        if getattr(self.encoder.config, "decay_bias_tables", True):
            return []
        return [name for name, _ in self.named_parameters() if name.startswith("cls_blocks.") and "bias_table" in name]

    def repeated_blocks(self) -> nn.ModuleList:
        return self.cls_blocks

    def forward(self, step: Step, views: Views) -> Outcome:
        masked = self.masker(step, views)
        targets = {name: head.target(step, masked) for name, head in self.heads.items()}
        latent = self.encode(masked)
        aggregated = self.aggregate(latent)
        found = Outcome(self.losses_beside_heads(masked, latent), {}, {})
        for name, head in self.heads.items():
            target, weight = targets[name], step.value(head.weight)
            decoder = head.decoder if self.config.shared_head else self.cls_decoders[name]
            self.add(found, name, head.measure(masked, latent, target), weight)
            self.add(found, f"{name}_cls", head.measure(masked, aggregated, target, decoder), weight)
        return found

    def aggregate(self, latent: Latent) -> Latent:
        """What the added blocks make of the last class token and the early patch tokens, normalised."""
        x = torch.cat([latent.layers[self.last][:, :1], latent.layers[self.early][:, 1:]], dim=1)
        for block in self.cls_blocks:
            x, _ = block(x, latent.aux.get("position_bias"))
        x = self.encoder.final_norm(x) if self.cls_norm is None else self.cls_norm(x)
        return replace(latent, tokens=x[:, 1:], prefix=x[:, :1], layers={}, losses={})


def check_fit(encoder: object, early_layers: int, heads: dict[str, Head]) -> None:
    """
    Raises:
        ValueError: if the encoder cannot be extended by blocks of its own kind, or a decoder wants more than tokens.
    """
    name = getattr(encoder, "name", type(encoder).__name__)
    sides = f"objective 'beit_v2' and encoder '{name}' do not fit"
    if not isinstance(encoder, MaskTokenViT) or encoder.spec.num_prefix_tokens != 1:
        raise ValueError(
            f"{sides}: it adds blocks to a plain vision transformer with mask tokens and a class token, such as 'beit'"
        )
    if early_layers >= encoder.spec.depth:
        raise ValueError(f"{sides}: early_layers {early_layers} must be less than the depth, {encoder.spec.depth}")
    for name, head in heads.items():
        if f"{name}_cls" in heads:
            raise ValueError(f"objective 'beit_v2' calls a loss of head '{name}' '{name}_cls', which is a head too")
        if head.decoder.ask != Ask():
            raise ValueError(
                f"objective 'beit_v2' and decoder '{head.decoder.name}' do not fit: the decoder asks for more than the "
                "last tokens, and the second prediction has nothing else"
            )


def another_decoder(head: Head, parts: Parts) -> Decoder:
    """A decoder like the head's, with weights of its own."""
    return type(head.decoder)(head.decoder.config, parts.specs.also(target=head.target.spec))
