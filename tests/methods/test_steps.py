"""Components that act before the optimizer, and after a step that was made (DINO)."""

from __future__ import annotations

import json
from itertools import pairwise

import torch
from methods.harness import (
    plugin,
    watch,
)

from mim_framework.base.section import Section
from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.losses import MSELoss
from mim_framework.testing.runs import state_of


@plugin
class LateDecoder(LinearDecoder):
    """Its last layer starts to learn after two steps (DINO); counts the steps that were made."""

    name = "late"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))

    def before_step(self, step):
        if step.index < 2:
            self.head.weight.grad.zero_()

    def after_step(self, step):
        self.made += 1


@plugin
class PoisonedLoss(MSELoss):
    """Not finite at one step."""

    name = "poisoned"

    class Config(Section):
        call: int
        """Number of the call, after the preflight's, that is not finite."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.calls = -1

    def forward(self, pred, target, mask, latent):
        loss = super().forward(pred, target, mask, latent).loss
        self.calls += 1
        return loss * float("nan") if self.calls - 1 == self.config.call else loss


def test_components_act_before_the_optimizer_and_after_a_step_that_was_made(tmp_path):
    run_dir, decoders = watch(
        tmp_path,
        lambda model: state_of(model.objective.heads["main"].decoder),
        "train.steps=5",
        decoder="late",
        loss={"type": "poisoned", "call": 3},
    )
    weights = [decoder["head.weight"] for decoder in decoders]
    frozen = [torch.equal(before, after) for before, after in pairwise(weights)]
    assert frozen == [True, True, False, True, False]
    assert not torch.equal(decoders[0]["head.bias"], decoders[1]["head.bias"])
    assert [int(decoder["made"]) for decoder in decoders] == [0, 1, 2, 3, 3, 4]
    [skipped] = [json.loads(line) for line in (run_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert skipped["step"] == 3
