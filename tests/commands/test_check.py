"""What `mim check` says of a recipe, and that `mim run` refuses the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mim_framework.commands.check import report
from mim_framework.commands.cli import main
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry


def test_check_reports_model_batch_and_length():
    text = report(load_recipe("quickstart", ["train.batch_size=16"]), Registry())
    assert "64 images a step = 16 x 1 ranks x 4 accumulation steps" in text
    assert "16 of 64 reach the encoder" in text
    assert "22 an epoch" in text


def test_check_doubts_a_warm_up_of_the_whole_run():
    text = report(load_recipe("quickstart", ["train.epochs=5"]), Registry())
    assert "warning" in text
    assert "the warm-up of optimizer 'main', 5 epochs, is no shorter than the run of 5" in text
    assert "warning" not in report(load_recipe("quickstart"), Registry())


FAULTY = """
import torch
from mim_framework import Loss, hookimpl

class Typo(Loss):
    name = "typo"

    def forward(self, pred, target, mask, latent):
        return pred.valeus.mean()

@hookimpl
def mim_losses():
    return [Typo]
"""
PATCHES = """
from torch import nn
from mim_framework import Encoder, EncoderSpec, Latent
from mim_framework import patchify
from mim_framework import Ask, Grid

class Patches(Encoder):
    name = "patches"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = EncoderSpec(dim=48, grid=Grid((8, 8)), stride=4, depth=1, num_heads=1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, view, mask, ask=Ask()):
        return Latent(patchify(view, 4) * self.scale, self.spec.grid)

@hookimpl
def mim_encoders():
    return [Patches]
"""


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optim.type=adamv"], "optim: no optimizer type 'adamv'"),
        (["optim.options={mometum: 0.9}"], "optim: 'adamw' cannot be made: TypeError"),
        (["optim.parameters=['encoder.*']"], "matches no optimizer"),
        (["optim.type=lion"], "optim: 'lion' takes no eps"),
        (["masker.mask_patch_size=2"], "mask grid 16x16, token grid 8x8"),
        (["masker.mask_patch_size=3"], "not a multiple of mask_patch_size 3"),
        (["teachers={ema: {copy: [encodr], momentum: 0.9}}"], "has no part 'encodr', did you mean 'encoder'?"),
        (["teachers={ema: {copy: [encoder], momentum: 2}}"], "'momentum' must stay between 0 and 1, got 2"),
        (["evaluate.knn.pool=cls", "encoder=patches", "decoder=linear"], "the encoder has no class token"),
        (["loss=typo"], "the model fails on a made-up batch: AttributeError: 'Pred' object has no attribute 'valeus'"),
        (["optim.lr=null"], "give the learning rate as 'lr' or as 'base_lr'"),
        (["optim.shape=constant", "optim.min_lr=1e-5"], "a constant schedule takes no 'min_lr'"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_message_of_check_and_of_run(
    install_plugin, tmp_path, monkeypatch, command, overrides, text
):
    install_plugin("faulty", FAULTY + PATCHES)
    monkeypatch.chdir(tmp_path)
    overrides = [
        "optim.eps=1e-8",
        "optim.betas=null",
        "train.steps=1",
        "train.epochs=null",
        "train.device=cpu",
        *overrides,
    ]
    result = CliRunner().invoke(main, [command, "quickstart", *overrides])
    assert result.exit_code == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(Path("runs").rglob("step_*"))
