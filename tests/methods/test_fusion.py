"""A decoder that fuses several layers of the encoder (MFF)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.harness import (
    PLUGIN,
    VIT,
    lines_of,
    plugin,
    recipe_at,
    run,
)
from mim_plugin_mae import MAEDecoder
from torch import nn

from mim_framework.assembly.builder import build_model
from mim_framework.base.errors import RecipeError
from mim_framework.base.section import Section
from mim_framework.checkpoints import checkpoint
from mim_framework.contract.components import Decoder
from mim_framework.contract.records import Ask
from mim_framework.testing import RegistryWith


@plugin
class FusionDecoder(Decoder):
    """A learned softmax mixture of encoder layers, in front of MAE's decoder."""

    name = "fusion"

    class Config(Section):
        layers: tuple[int, ...] = (0,)
        """Encoder layers that are mixed with the encoder's output."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.ask = Ask(layers=frozenset(self.config.layers))
        self.num_prefix_tokens = specs.encoder.num_prefix_tokens
        self.fusion = nn.Parameter(torch.zeros(len(self.config.layers) + 1))
        self.decoder = MAEDecoder(MAEDecoder.Config(embed_dim=16, depth=1, num_heads=2), specs)
        self.spec = self.decoder.spec

    def forward(self, latent, mask):
        last = torch.cat([latent.prefix, latent.tokens], dim=1)
        layers = torch.stack([*(latent.layers[i] for i in self.config.layers), last], dim=-1)
        fused = layers @ self.fusion.softmax(0)
        prefix, tokens = fused[:, : self.num_prefix_tokens], fused[:, self.num_prefix_tokens :]
        return self.decoder(replace(latent, prefix=prefix, tokens=tokens), mask)

    def metrics(self):
        return {f"weight_{i}": weight for i, weight in enumerate(self.fusion.detach().softmax(0))}


def test_a_decoder_fuses_the_layers_it_asks_for_and_logs_their_weights(tmp_path):
    run_dir = run(tmp_path, encoder=VIT, decoder={"type": "fusion", "layers": [0, 1]})
    weights = [[line[f"heads.main.decoder/weight_{i}"] for i in range(3)] for line in lines_of(run_dir)]
    final = checkpoint.find_latest(run_dir / "checkpoints").tensors("model")["heads.main.decoder.fusion"].softmax(0)
    assert weights[-1] == pytest.approx(final.tolist())
    assert sum(weights[-1]) == pytest.approx(1)
    assert max(weights[-1]) > 1 / 3 + 1e-3


def test_a_layer_that_the_encoder_lacks_is_refused_with_both_names(tmp_path):
    recipe = recipe_at(tmp_path, encoder=VIT, decoder={"type": "fusion", "layers": [0, 2]})
    with pytest.raises(RecipeError, match=r"decoder 'fusion' asks for layers \[2\], which encoder 'mae_vit' lacks"):
        build_model(recipe, RegistryWith(*PLUGIN))
