"""Four short runs on digits, told apart by what `health` says of them: without labels, at the end of each run.

A sound one; one whose loss is least where all images are one; one that predicts a network nobody trained; and the sound
one with its learning rate times thirty.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from mim_framework.contract.components import Loss
from mim_framework.contract.records import Measured
from mim_framework.recipe.draft import load_recipe
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train

pytestmark = pytest.mark.slow

LR = 2e-3
SMALL = (
    "views.img_size=16", "encoder.patch_size=4", "encoder.embed_dim=48", "encoder.depth=2", "decoder.embed_dim=32",
    "decoder.depth=1", "train.device=cpu", "optim.warmup_epochs=2", "checkpoint.every_epochs=0",
    "log={every_steps: 11, tensorboard: false, images_every_epochs: 0, num_images: 0}",
    "evaluate=[{type: health, every_epochs: 0, loss_images: 256, lidar_images: 40}]",
)  # fmt: skip
RANDOM_TEACHER = (
    "teachers={t: {random: true, encoder: {type: mae_vit, patch_size: 4, embed_dim: 48, depth: 2, num_heads: 4}}}",
    "target={type: features, teacher: t}",
)


class Agreement(Loss):
    """Features of the images of a batch should be alike: the classical collapse, with nothing against it."""

    name = "agreement"

    def forward(self, pred, target, mask, latent):
        tokens = latent.tokens.float().mean(1)
        return Measured((tokens - tokens.mean(0)).square().mean() + 1e-4 * pred.values.float().square().mean())


RUNS = {
    "healthy": ("train.epochs=12",),
    "collapsed": ("train.epochs=6", "loss=agreement"),
    "untrained teacher": ("train.epochs=6", *RANDOM_TEACHER),
    "learning rate too high": ("train.epochs=6", f"optim.lr={30 * LR}"),
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    folder, registry = tmp_path_factory.mktemp("runs"), RegistryWith(Agreement)

    @cache
    def run(kind: str) -> Path:
        recipe = load_recipe("quickstart", [*SMALL, *RUNS[kind], f"output_dir={folder / kind}"], registry)
        return train(recipe, registry)

    return run


@pytest.mark.parametrize("kind", RUNS)
def test_each_kind_of_run_is_told_by_its_name_at_its_end(run_of, kind):
    run_dir = run_of(kind)
    said = (run_dir / "report.md").read_text()
    assert f"\n**{kind}**: " in said
    assert f"<b>{kind}</b>: " in (run_dir / "report.html").read_text()
