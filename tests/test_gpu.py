"""The same run on a GPU. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mim_framework.base import rng
from mim_framework.checkpoints import checkpoint
from mim_framework.commands.bench import run_bench
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.training.trainer import train

pytestmark = pytest.mark.gpu
TINY = ["train.epochs=null", "train.total_batch_size=16", "evaluate=[]", "log.tensorboard=false"]


def run(folder: Path, *overrides: str) -> Path:
    recipe = load_recipe("quickstart", [f"output_dir={folder}", *TINY, "log.every_steps=1", *overrides], Registry())
    return train(recipe, Registry())


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def test_random_numbers_are_those_of_the_cpu():
    positions = torch.arange(1000)
    on_gpu = rng.uniform(7, "mask", positions.cuda(), 64)
    assert torch.equal(on_gpu.cpu(), rng.uniform(7, "mask", positions, 64))


def test_float32_losses_are_those_of_the_cpu(tmp_path):
    options = ["train.steps=3", "train.precision=float32"]
    on_cpu = losses_of(run(tmp_path / "cpu", "train.device=cpu", *options))
    assert losses_of(run(tmp_path / "gpu", "train.device=cuda", *options)) == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_bfloat16_trains_and_keeps_its_weights_in_float32(tmp_path, compiled):
    run_dir = run(tmp_path, "train.steps=20", "train.precision=bfloat16", f"train.compile={compiled}")
    losses = losses_of(run_dir)
    assert losses[-1] < losses[0]
    weights = checkpoint.load_weights(run_dir)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_bench_reports_the_memory_of_the_gpu():
    text = run_bench(load_recipe("quickstart", ["train.total_batch_size=64"], Registry()), Registry(), steps=3)
    assert "cuda" in text
    assert "peak memory" in text
