"""The fusion of encoder layers in front of the heads. Start at `FusedPrediction.encode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from mim_framework import Ask, EncoderSpec, Latent, Masked, MaskedPrediction, Parts, Section

EXEMPT_FROM_DECAY = ("cls_token", "mask_token", "pos_embed")  # configs/mff; norms and biases are exempt anyway


class Fusion(nn.Module):
    """Weighted sum of the levels: a linear projection of each shallow one, and the last as it is.

    The weights are a softmax, so that they begin equal. `proj_weights` has four axes as in the official code, where it
    decays with the matrices.
    """

    def __init__(self, dim: int, num_levels: int) -> None:
        super().__init__()
        self.proj_layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_levels - 1))
        self.proj_weights = nn.Parameter(torch.ones(num_levels, 1, 1, 1), requires_grad=num_levels > 1)
        for projection in self.proj_layers:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def weights(self) -> Tensor:
        """(levels,) float32; they sum to 1."""
        return self.proj_weights.flatten().float().softmax(0)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """levels (B, T, D) each, the last block's at the end -> (B, T, D).

        The sum of the projections is one product with the weighted matrices side by side: no level's projection is ever
        held, and the weighting is done in full precision.
        """
        *shallow, last = levels
        weights = self.weights()
        if not shallow:
            return weights * last
        matrix = torch.cat([w * each.weight for w, each in zip(weights, self.proj_layers, strict=False)], dim=1)
        bias = weights[:-1] @ torch.stack([each.bias for each in self.proj_layers])
        return weights[-1:] * last + linear(torch.cat(shallow, dim=-1), matrix, bias)


class FusedPrediction(MaskedPrediction):
    """Masked prediction from a learned mix of several encoder layers; fits every encoder that hands out its layers."""

    name = "mff"

    class Config(Section):
        layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
        """Blocks whose outputs are fused, from 0, or negative from the end; the last one must be the last block. By
        default every second block from the first, without the last but one, and the last: 0, 2, 4, 6, 8, 11 of 12."""

    config: Config

    def __init__(self, config: Section, parts: Parts) -> None:
        super().__init__(config, parts)
        self.layers = levels_of(self.config.layers, parts.encoder.name, parts.encoder.spec)
        self.ask |= Ask(layers=frozenset(self.layers))
        self.fusion = Fusion(parts.encoder.spec.dim, len(self.layers))

    def encode(self, masked: Masked) -> Latent:
        """The encoder's latent, whose tokens and prefix are the fused layers after its norm."""
        latent = super().encode(masked)
        fused = self.encoder.final_norm(self.fusion([latent.layers[i] for i in self.layers]))
        num_prefix_tokens = fused.shape[1] - latent.tokens.shape[1]
        prefix = fused[:, :num_prefix_tokens] if num_prefix_tokens else None
        return replace(latent, tokens=fused[:, num_prefix_tokens:], prefix=prefix)

    def no_weight_decay(self) -> list[str]:
        """Tokens and learned positions, wherever they are; unlike MAE's, which decay. The fusion decays."""
        names = (name for name, _ in self.named_parameters())
        return [name for name in names if name.rpartition(".")[2].endswith(EXEMPT_FROM_DECAY)]

    def metrics(self) -> dict[str, Tensor]:
        """The weight of every fused block."""
        weights = self.fusion.weights().detach()
        weights = weights.full_tensor() if hasattr(weights, "full_tensor") else weights  # sharded by FSDP
        return {f"weight_of_block_{i}": weight for i, weight in zip(self.layers, weights, strict=True)}


def levels_of(layers: Sequence[int] | None, encoder: str, spec: EncoderSpec) -> tuple[int, ...]:
    """The blocks to fuse, counted from 0; the default for None.

    Raises:
        ValueError: if the list makes no sense, or the encoder cannot give these layers in one shape.
    """
    sides = f"objective 'mff' and encoder '{encoder}' do not fit"
    if not spec.offers.layers:
        raise ValueError(f"{sides}: the encoder hands out none of its layers, there is nothing to fuse")
    last = spec.depth - 1
    if layers is None:
        levels = tuple(sorted({*range(0, max(last - 1, 1), 2), last}))
        shown = f"by default it takes {', '.join(map(str, levels))}"
    else:
        levels = tuple(spec.depth + i if i < 0 else i for i in layers)
        shown = f"layers {list(layers)}"
    if set(levels) - spec.offers.layers:
        raise ValueError(f"{sides}: {shown}, the encoder hands out {_listed(spec.offers.layers)}")
    if any(a >= b for a, b in pairwise(levels)):
        raise ValueError(f"{shown} must increase, which blocks {list(levels)} do not")
    if levels[-1] != last:
        raise ValueError(
            f"{shown} must end with the last block, {last} of encoder '{encoder}': later ones would not be trained"
        )
    own = (spec.dim, spec.grid)
    for i in levels:
        dim, grid = spec.layers.get(i, own)
        if (dim, grid) != own:
            raise ValueError(
                f"{sides}: fused layers need one width and one grid, but layer {i} has width {dim} on grid {grid} and "
                f"the encoder's output {spec.dim} on {spec.grid}"
            )
    return levels


def _listed(numbers: frozenset[int]) -> str:
    first, last = min(numbers), max(numbers)
    if len(numbers) > 2 and len(numbers) == last - first + 1:
        return f"{first} to {last}"
    return ", ".join(map(str, sorted(numbers)))
