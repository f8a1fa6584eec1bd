"""What `mim check` says of a recipe, and that `mim run` refuses the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from mim_framework.assembly.builder import build_model
from mim_framework.base.errors import CheckpointError
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


def weights_of_tiny(tmp_path: Path, *overrides: str) -> tuple[str, dict[str, torch.Tensor]]:
    """A recipe file, and the weights of its model."""
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps({**tiny.RECIPE, "output_dir": str(tmp_path)}))
    model = build_model(load_recipe(file, overrides, Registry()), Registry())
    return str(file), {name: tensor.clone() for name, tensor in model.objective.state_dict().items()}


def test_check_says_what_init_fills(tmp_path):
    file, state = weights_of_tiny(tmp_path)
    save_file(state, tmp_path / "whole.safetensors")
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    save_file(encoder, tmp_path / "part.safetensors")
    [line] = lines_of(file, "init", [f"init={tmp_path}/whole.safetensors"])
    assert "whole.safetensors fills encoder 18 of 18 tensors (4,384 of 4,384 values)" in line
    assert "at random" not in line
    [line] = lines_of(file, "init", [f"init={tmp_path}/part.safetensors"])
    assert "heads.main.decoder 0 of " in line
    assert line.endswith("; what it lacks starts at random")
    assert lines_of(file, "init", []) == []


def test_check_compares_an_init_of_another_image_size_after_its_tables_are_resized(tmp_path):
    file, state = weights_of_tiny(tmp_path, "views.img_size=32")
    save_file(state, tmp_path / "large.safetensors")
    [line] = lines_of(file, "init", [f"init={tmp_path}/large.safetensors"])
    assert "fills encoder 18 of 18 tensors (4,384 of 4,384 values)" in line


def lines_of(file: str, key: str, overrides: list[str]) -> list[str]:
    text = report(load_recipe(file, overrides, Registry()), Registry())
    return [line for line in text.splitlines() if line.startswith(f"{key} ")]


def with_nan(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state["encoder.norm.weight"][0] = float("nan")
    return state


@pytest.mark.parametrize(
    ("damaged", "text"),
    [
        (
            lambda state: {"encoder.cls_token": state["encoder.cls_token"]},
            r"holds 0\.36% of the encoder, less than 50%",
        ),
        (
            lambda state: {**state, "encoder.cls_token": torch.zeros(1, 1, 7)},
            r"cls_token \(1, 1, 7\), needed \(1, 1, 16\)",
        ),
        (lambda state: {**state, "encoder.more": torch.zeros(1)}, "names that the recipe's model lacks: encoder.more"),
        (with_nan, r"values that are not finite: encoder\.norm\.weight"),
    ],
    ids=["one tensor", "another shape", "another name", "not finite"],
)
def test_check_refuses_an_init_that_a_run_would_refuse(tmp_path, damaged, text):
    file, state = weights_of_tiny(tmp_path)
    save_file(damaged(state), tmp_path / "bad.safetensors")
    recipe = load_recipe(file, [f"init={tmp_path}/bad.safetensors"], Registry())
    for stops in (lambda: report(recipe, Registry()), lambda: build_model(recipe, Registry())):
        with pytest.raises(CheckpointError, match=rf"init .*bad\.safetensors.*{text}"):
            stops()


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "does not exist"), (b"\0" * 99, "cannot be read as safetensors")],
    ids=["absent", "damaged"],
)
def test_check_refuses_an_init_that_cannot_be_read(tmp_path, content, text):
    file, _ = weights_of_tiny(tmp_path)
    if content is not None:
        (tmp_path / "bad.safetensors").write_bytes(content)
    recipe = load_recipe(file, [f"init={tmp_path}/bad.safetensors"], Registry())
    with pytest.raises(CheckpointError, match=rf"init .*bad\.safetensors {text}"):
        report(recipe, Registry())


def test_check_compares_the_weights_of_a_frozen_teacher(tmp_path):
    file, state = weights_of_tiny(tmp_path)
    state.pop("encoder.norm.weight")
    save_file(state, tmp_path / "teacher.safetensors")
    encoder = tiny.RECIPE["encoder"]
    teacher = {"encoder": encoder, "checkpoint": str(tmp_path / "teacher.safetensors")}
    recipe = load_recipe(file, [f"teachers={json.dumps({'wise': teacher})}"], Registry())
    with pytest.raises(CheckpointError, match=r"lacks norm\.weight of the encoder of teacher 'wise'"):
        report(recipe, Registry())


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
