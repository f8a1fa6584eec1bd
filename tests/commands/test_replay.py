"""A step is repeated bit for bit, and the first module whose output is not finite is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image
from torch.nn.functional import relu

from mim_framework.base.errors import MimError
from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.losses import MSELoss
from mim_framework.commands.replay import replay
from mim_framework.contract.records import Pred
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train


class Swish(torch.nn.Module):
    """Not finite where a token's first channel is large: exp overflows."""

    def forward(self, x):
        return x * torch.exp(1e6 * relu(x[..., :1] - 1.0))


class BrittleDecoder(LinearDecoder):
    name = "brittle"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.brittle = Swish()

    def forward(self, latent, mask):
        pred = super().forward(latent, mask)
        return Pred(self.brittle(pred.values), pred.grid, pred.ids)


class PoisonedLoss(MSELoss):
    """Its value is finite and its gradient is not, for samples at positions 8 and on."""

    name = "root_of_zero"

    def begin_step(self, step):
        self.late = step.index == 2

    def forward(self, pred, target, mask, latent):
        measured = super().forward(pred, target, mask, latent)
        zero = (pred.values.float() * 0).sum().sqrt() if self.late else 0.0
        return measured._replace(loss=measured.loss + zero)


REGISTRY = RegistryWith(BrittleDecoder, PoisonedLoss)


def run(folder: Path, *overrides: str, **changes) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**tiny.RECIPE, **changes}))
    recipe = load_recipe(file, [f"output_dir={folder}", "train.steps=6", *overrides], REGISTRY)
    return train(recipe, REGISTRY)


@pytest.mark.fault(row="7")
def test_a_poisoned_run_is_explained_by_one_command(tmp_path, figure):
    """A rate that grows too large: the loss explodes, and the page says in which module, from which sample."""
    run_dir = run(
        tmp_path, "optim={type: sgd, lr: 5.0, shape: constant}", "train.max_nonfinite_steps=9",
        encoder={"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}, decoder="brittle",
    )  # fmt: skip
    first = json.loads((run_dir / "nonfinite.jsonl").read_text().splitlines()[0])
    assert first["losses"] == ["main"]
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    page = replay(run_dir, first["step"], registry=REGISTRY, images=tmp_path / "images")
    assert "first not finite: output of heads.main.decoder.brittle (Swish): (8," in page
    assert "its inputs were finite" in page
    named = page.partition("samples: ")[2]
    assert "digits/" in named
    assert any(f"(position {position})" in named for position in first["positions"])
    with Image.open(tmp_path / "images" / f"position_{first['positions'][0]:08d}.png") as image:
        assert image.size == (16, 16)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    figure("`mim replay` names the module and its samples, 0 of the run's files changed")


def test_the_state_after_the_first_skipped_step_is_kept_and_serves_the_step_itself(tmp_path):
    run_dir = run(tmp_path, loss="root_of_zero")
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step_00000003", "step_00000006"]
    [line] = (run_dir / "nonfinite.jsonl").read_text().splitlines()
    assert (json.loads(line)["cause"], json.loads(line)["losses"]) == ("gradient", [])
    page = replay(run_dir, registry=REGISTRY)
    assert "step 2, from step_00000003" in page
    assert (
        "all outputs are finite; going backward, first not finite: gradient of the output of heads.main.decoder" in page
    )
    assert "--images FOLDER" in page


@pytest.mark.fault(row="7")
def test_a_repeated_step_has_the_loss_of_the_run_to_the_last_digit(tmp_path, figure):
    run_dir = run(tmp_path, "checkpoint.every_steps=2", "checkpoint.keep=9")
    losses = {line["step"] - 1: line["loss"] for line in read_metrics(run_dir) if "loss" in line}
    for step in (1, 3, 5):
        page = replay(run_dir, step, registry=REGISTRY, from_start=True)
        assert f"main {losses[step]:.6g}" in page
        assert "every output, gradient and loss of this step is finite" in page
    figure("`mim replay` repeats 3 of 3 steps with the loss of the run")


def test_a_step_that_cannot_be_reached_says_which_can(tmp_path):
    run_dir = run(tmp_path, "checkpoint.every_steps=3", "checkpoint.keep=9")
    with pytest.raises(MimError, match="has had no step whose loss or gradient was not finite; choose one with --step"):
        replay(run_dir, registry=REGISTRY)
    with pytest.raises(MimError, match=r"no checkpoint at or before step 1; .* 3 and later ones. --from-start repeats"):
        replay(run_dir, 1, registry=REGISTRY)
    with pytest.raises(MimError, match=r"has the steps 0 to 5; 6 is none of them"):
        replay(run_dir, 6, registry=REGISTRY)
