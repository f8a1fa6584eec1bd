"""Two heads on the ids of a frozen tokenizer (BEiT v2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from methods.harness import (
    GRID,
    NO_HEAD,
    in_training,
    lines_of,
    plugin,
    watch,
)
from torch import Tensor, nn

from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.losses import CrossEntropyLoss
from mim_framework.contract.components import Encoder, Target
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec, TargetSpec
from mim_framework.nn.patches import patchify
from mim_framework.testing.runs import same, state_of


@plugin
class Tokenizer(Encoder):
    """Ids of 5 codes. Its normalisation would move, and change the ids, if it were ever in train mode."""

    name = "tokenizer"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.norm, self.codes = nn.BatchNorm1d(48), nn.Linear(48, 5)
        self.spec = EncoderSpec(5, GRID, 4, 1, 1, offers=Ask(aux=frozenset({"ids"})))

    def forward(self, view, mask, ask=Ask()):
        logits = self.codes(self.norm(patchify(view, 4).flatten(0, 1))).unflatten(0, (len(view), 16))
        return Latent(logits, GRID, aux={"ids": logits.argmax(-1)} if "ids" in ask.aux else {})


@plugin
class TokenIds(Target):
    """The frozen tokenizer's ids of the clean image."""

    name = "token_ids"
    seen: list[tuple[Tensor, Tensor]] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = TargetSpec("ids", specs.teacher("vqkd").dim, specs.teacher("vqkd").grid)

    def teacher_asks(self):
        return {"vqkd": Ask(aux=frozenset({"ids"}))}

    def forward(self, step, masked):
        ids = step.teacher("vqkd", masked.clean("x")).aux["ids"]
        if in_training(step):
            self.seen.append((masked.clean("x"), ids))
        return ids


@plugin
class LayerDecoder(LinearDecoder):
    """A linear head on an inner layer."""

    name = "linear_on_layer"

    class Config(LinearDecoder.Config):
        layer: int
        """Encoder layer that it reads."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.ask = Ask(layers=frozenset({self.config.layer}))

    def forward(self, latent, mask):
        return super().forward(replace(latent, tokens=latent.layers[self.config.layer]), mask)


@plugin
class RecordedCrossEntropy(CrossEntropyLoss):
    name = "recorded_cross_entropy"
    seen: list[float] = []

    def forward(self, pred, target, mask, latent):
        loss = super().forward(pred, target, mask, latent)
        self.seen.append(loss.loss.item())
        return loss


def test_two_heads_learn_the_ids_of_a_tokenizer_that_stays_frozen_to_the_bit(tmp_path):
    TokenIds.seen, RecordedCrossEntropy.seen = [], []
    early = {
        "target": "token_ids",
        "decoder": {"type": "linear_on_layer", "layer": 0},
        "loss": "recorded_cross_entropy",
    }
    heads = {
        "late": {"target": "token_ids", "decoder": "linear", "loss": "cross_entropy"},
        "early": {**early, "weight": {"shape": "linear", "from": 1.0, "to": 0.0}},
    }
    run_dir, tokenizers = watch(
        tmp_path,
        lambda model: state_of(model.teachers["vqkd"]),
        "train.steps=20",
        teachers={"vqkd": {"encoder": "tokenizer", "random": True}},
        heads=heads,
        **NO_HEAD,
    )
    assert len(tokenizers) == 21
    assert all(same(tokenizers[0], later) for later in tokenizers)
    assert any(name.endswith("running_mean") for name in tokenizers[0])
    lines = lines_of(run_dir)
    unweighted = RecordedCrossEntropy.seen[-20:]  # the first calls are those of the check and the preflight
    for index, line in enumerate(lines):
        assert line["loss/early"] == pytest.approx((1 - index / 20) * unweighted[index], rel=1e-5)
        assert line["loss"] == pytest.approx(line["loss/early"] + line["loss/late"], rel=1e-5)
    first, last = (sum(line["loss/late"] for line in part) for part in (lines[:5], lines[-5:]))
    assert last < first
