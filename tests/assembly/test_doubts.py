"""What is allowed but hardly meant: each doubt for a recipe that deserves it, and none for the shipped ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from mim_framework.assembly import doubts as module
from mim_framework.assembly.builder import build_source
from mim_framework.assembly.doubts import doubts
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

CPU = torch.device("cpu")


@dataclass
class Costs:
    train_flops: float


def doubted(recipe: str, *overrides: str, cost: float = 0.0) -> list[str]:
    registry = Registry()
    loaded = load_recipe(recipe, overrides, registry)
    return doubts(loaded, registry, build_source(loaded, registry), CPU, cost=Costs(cost))


def folder_of(path: Path, *sizes: tuple[int, int]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        Image.new("RGB", size).save(path / f"{index}.png")
    return f"data.source={{type: folder, root: {path}}}"


@pytest.mark.slow
def test_shipped_recipes_are_not_doubted(tmp_path):
    images = folder_of(tmp_path, *[(300, 260)] * 3)
    for info in Registry().recipes():
        said = doubted(info.name, images, "train.total_batch_size=3", "train.epochs=3000", "train.batch_size=null")
        about = [text for text in said if "the learning rate" not in text]
        lacking = [text for text in about if text.startswith("train.frozen holds the whole encoder and no 'init'")]
        assert about == lacking, info.name  # a linear probe is of a run, which only its user can name
        assert bool(lacking) == bool(load_recipe(info.name, [], Registry()).train.frozen), info.name
    assert doubted("quickstart") == []


def test_a_batch_larger_than_the_data_is_doubted_with_the_passes_over_it(tmp_path):
    images = folder_of(tmp_path, *[(64, 64)] * 5)
    [doubt] = doubted("quickstart", images)
    assert doubt == (
        "train.total_batch_size 64 is more than the 5 images of data.source: every step, which counts as an epoch, "
        "sees them 12.8 times; use at most 5"
    )


def test_images_smaller_than_the_crop_are_doubted_with_a_size(tmp_path):
    few = folder_of(tmp_path / "few", (20, 90), *[(64, 64)] * 99)
    assert doubted("quickstart", few) == []  # one of many
    small = folder_of(tmp_path / "small", (20, 90), *[(30, 31)] * 70, *[(64, 64)] * 29)
    [doubt] = doubted("quickstart", small)
    assert doubt.startswith("views.img_size 32 is larger than 13 of 16 images looked at, the smallest 20x90 pixels")


def test_emulated_bfloat16_is_doubted(monkeypatch):
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: False)
    [doubt] = doubted("quickstart", "train.precision=bfloat16")
    assert "ten times slower; use train.precision=float32" in doubt
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: True)
    assert doubted("quickstart", "train.precision=bfloat16") == []


def test_epochs_of_hours_on_a_processor_are_doubted(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # 80 GFLOP a second
    [doubt] = doubted("quickstart", cost=2e12)  # 1,438 x 25 s
    assert doubt.startswith("an epoch on this processor takes about 10 hours: 1,438 images of 2000.0 GFLOP each, at 80")
    assert doubted("quickstart", cost=1.9e11) == []  # 57 minutes


@pytest.mark.parametrize(
    ("rate", "far"),
    [("optim.base_lr=0.015", "100 times the highest"), ("optim.base_lr=1e-6", "150 times below the lowest")],
)
def test_a_learning_rate_far_from_the_shipped_ones_is_doubted(tmp_path, rate, far):
    registry = Registry()
    recipe = load_recipe("mae", [rate, folder_of(tmp_path, (300, 300))], registry)
    source = build_source(recipe, registry)
    [doubt] = [each for each in doubts(recipe, registry, source, CPU, cost=Costs(0)) if "learning rate" in each]
    assert far in doubt
    assert "of encoder 'mae_vit' with adamw (mae, mae_vit_huge, mae_vit_large: 0.00015)" in doubt


@pytest.mark.slow
def test_check_and_run_say_the_same(tmp_path):
    from click.testing import CliRunner

    from mim_framework.commands.cli import main

    images = folder_of(tmp_path / "images", *[(64, 64)] * 5)
    options = ["quickstart", images, "train.epochs=null", "train.steps=1", "optim.warmup_epochs=0", "evaluate=[]"]
    checked = CliRunner().invoke(main, ["check", *options])
    ran = CliRunner().invoke(main, ["run", *options, f"output_dir={tmp_path}"])
    for each in (checked, ran):
        assert each.exit_code == 0, each.output
        assert "sees them 12.8 times; use at most 5" in each.output
