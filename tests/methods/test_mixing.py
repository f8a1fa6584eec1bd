"""Maskers that rewrite the images: mixed with one another (MixMIM), filled by a generator (CIM)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from methods.harness import (
    GRID,
    TokenEncoder,
    in_training,
    lines_of,
    plugin,
    run,
    watch,
)
from torch import Tensor, nn

from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.maskers import RandomMasker
from mim_framework.contract.components import Loss, Masker, Target
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Masked
from mim_framework.contract.specs import MaskerSpec, TargetSpec
from mim_framework.nn.masking import mask_from_noise
from mim_framework.nn.patches import patchify, unpatchify


@plugin
class MixMasker(Masker):
    """The images of a pair (2i, 2i + 1) fill one another's hidden patches; both are to be un-mixed everywhere."""

    name = "mix"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=8, rewrites=("x",))

    def forward(self, step, views):
        partner = torch.arange(len(views["x"]), device=views["x"].device) ^ 1
        hidden = mask_from_noise(step.rand("mask", 16), 8, GRID).hidden
        hidden = torch.where((partner % 2 == 1)[:, None], hidden, ~hidden[partner])
        patches = patchify(views["x"], 4)
        mixed = unpatchify(torch.where(hidden[..., None], patches[partner], patches), 4, GRID)
        mask = Mask(hidden, GRID, predict=torch.ones_like(hidden), equal=True)
        return Masked({"x": mask}, {"x": mixed}, extra={"partner": partner}, originals={"x": views["x"]})


@plugin
class MixEncoder(TokenEncoder):
    """Sees every token of the mixture."""

    name = "mix_encoder"
    seen: list[Tensor] = []

    def forward(self, view, mask, ask=Ask()):
        self.seen.append(view)
        return super().forward(view, Mask.none(len(view), GRID, view.device), ask)


@plugin
class UnmixTarget(Target):
    """Both clean images of a mixture."""

    name = "unmix"
    seen: list[Masked] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = TargetSpec("opaque", 48, GRID)

    def forward(self, step, masked):
        if in_training(step):
            self.seen.append(masked)
        patches = patchify(masked.clean("x"), 4)
        return {"own": patches, "partner": patches[masked.extra["partner"]]}


@plugin
class UnmixDecoder(LinearDecoder):
    """Each image from its own tokens and the mask token."""

    name = "unmix"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.mask_token = nn.Parameter(torch.zeros(specs.encoder.dim))
        self.spec = replace(self.spec, kind="opaque")

    def forward(self, latent, mask):
        hidden = mask.at(GRID).hidden[..., None]
        own = torch.where(hidden, self.mask_token, latent.tokens)
        partner = torch.where(hidden, latent.tokens, self.mask_token)
        return {"own": self.head(own), "partner": self.head(partner)}


@plugin
class UnmixLoss(Loss):
    """Squared error of each image where the mixture shows the other."""

    name = "unmix"
    accepts = frozenset({"opaque"})
    seen: list[tuple[Any, Any, Mask]] = []

    def forward(self, pred, target, mask, latent):
        self.seen.append((pred, target, mask))
        own = (pred["own"] - target["own"]).square().mean(-1)
        partner = (pred["partner"] - target["partner"]).square().mean(-1)
        return torch.where(mask.hidden, own, partner).mean()


def test_a_masker_mixes_images_and_the_target_sees_them_clean(tmp_path):
    MixEncoder.seen, UnmixTarget.seen, UnmixLoss.seen = [], [], []
    parts = {"masker": "mix", "encoder": "mix_encoder", "target": "unmix", "decoder": "unmix", "loss": "unmix"}
    run_dir = run(tmp_path, **parts)
    assert len(UnmixTarget.seen) == 3
    for masked in UnmixTarget.seen:
        clean, mixed = patchify(masked.clean("x"), 4), patchify(masked.views["x"], 4)
        assert any(masked.views["x"] is view for view in MixEncoder.seen)
        for row, hidden in enumerate(masked.masks["x"].hidden):
            assert torch.equal(mixed[row][~hidden], clean[row][~hidden])
            assert torch.equal(mixed[row][hidden], clean[row ^ 1][hidden])
            assert torch.equal(hidden, ~masked.masks["x"].hidden[row ^ 1])
    pred, target, mask = UnmixLoss.seen[-1]
    errors = [
        (pred[side][row, n] - target[side][row, n]).square().mean().item()
        for row in range(4)
        for n in range(16)
        for side in ["own" if mask.hidden[row, n] else "partner"]
    ]
    assert lines_of(run_dir)[-1]["loss"] == pytest.approx(sum(errors) / 64)


@plugin
class Generator(RandomMasker):
    """Fills the hidden patches itself, learns to do it well, and leaves every patch visible (CIM)."""

    name = "generator"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.fill = nn.Linear(48, 48)
        self.spec = replace(self.spec, rewrites=("x",))

    def forward(self, step, views):
        masked = super().forward(step, views)
        hidden, patches = masked.masks["x"].hidden, patchify(views["x"], 4)
        visible = patches * ~hidden[..., None]
        filled = self.fill(visible.mean(1, keepdim=True)).expand_as(patches)
        corrupt = unpatchify(torch.where(hidden[..., None], filled.detach(), patches), 4, GRID)
        mask = Mask.none(len(patches), GRID, hidden.device).predicting(hidden)
        loss = (filled - patches)[hidden].square().mean()
        return Masked({"x": mask}, {"x": corrupt}, losses={"generator": loss}, originals={"x": views["x"]})


def test_a_masker_that_learns_brings_its_own_loss(tmp_path):
    run_dir, fills = watch(tmp_path, lambda model: model.objective.masker.fill.weight.clone(), masker="generator")
    assert all(not torch.equal(before, after) for before, after in pairwise(fills))
    for line in lines_of(run_dir):
        assert line["loss"] == pytest.approx(line["loss/generator"] + line["loss/main"])
