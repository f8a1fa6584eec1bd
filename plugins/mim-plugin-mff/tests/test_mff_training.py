"""MFF on an encoder with a token at every position, as a user runs it: on ranks, resumed, compiled, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import RECIPE
from torch import Tensor

from mim_framework import hookimpl
from mim_framework.checkpoints import checkpoint
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.trainer import train

torch.set_num_threads(1)  # ranks are forked; the suite's conftest says it too, unless the plugin is tested alone

ENCODER = {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "relative_bias": "shared"}
SGD = "optim={type: momentum, lr: 0.05, shape: constant, weight_decay: 0, options: {momentum: 0.0}}"
"""Adam would turn the rounding of a gradient that is zero into a step of full size."""


def run(folder: Path, *overrides: str, registry: RegistryWith | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "recipe_in.yaml"
    changes = {
        "encoder": ENCODER,
        "decoder": "linear",
        "objective": {"type": "mff", "layers": [0, 1, 3]},
        "views": {"type": "resized_crop", "img_size": 16, "padding": 2},
    }
    file.write_text(json.dumps({**RECIPE, **changes}))
    registry = registry or RegistryWith()
    return train(load_recipe(file, [f"output_dir={folder}", "train.steps=3", *overrides], registry), registry)


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def fusion_weights_of(run_dir: Path) -> list[list[float]]:
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    return [[line[f"mff/weight_of_block_{i}"] for i in (0, 1, 3)] for line in lines]


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    return checkpoint.find_latest(run_dir / "checkpoints").tensors("model")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_with_accumulation_learn_what_one_learns(tmp_path, mode):
    alone = run(tmp_path / "alone", SGD)
    run_ranks(lambda rank: run(tmp_path / mode, SGD, f"train.distributed={mode}", "train.batch_size=2"))
    together = tmp_path / mode / alone.name
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-5)
    assert fusion_weights_of(together) == [pytest.approx(line, abs=1e-6) for line in fusion_weights_of(alone)]
    weights = weights_of(together)
    assert "fusion.proj_weights" in weights
    for name, tensor in weights_of(alone).items():
        assert torch.allclose(weights[name], tensor, atol=2e-6), name


@pytest.mark.slow
def test_a_run_on_shards_evaluates_and_draws(tmp_path):
    """The encoder alone for kNN and the fused prediction for pictures, outside of the objective's forward pass."""
    on = ["evaluate.knn={every_epochs: 0, max_train: 40, max_test: 20}", "log.num_images=2", "train.distributed=fsdp"]
    [first, _] = run_ranks(lambda rank: run(tmp_path / "fsdp", *on))
    assert read_metrics(first / "metrics.jsonl")[-1]["knn_top1"] > 0.1


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            if path.name.endswith("2"):
                raise KeyboardInterrupt

    straight = run(tmp_path / "straight")
    registry = RegistryWith()
    registry._manager.register(Crash())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", "checkpoint.every_steps=1", registry=registry)
    resumed = run(tmp_path / "resumed")
    assert losses_of(resumed) == losses_of(straight)
    assert fusion_weights_of(resumed) == fusion_weights_of(straight)
    weights = weights_of(resumed)
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(straight).items())


def test_bfloat16_stays_near_float32(tmp_path):
    full = losses_of(run(tmp_path / "full"))
    half = losses_of(run(tmp_path / "half", "train.precision=bfloat16"))
    assert half == pytest.approx(full, rel=2e-2)
    assert half != full


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, when it looks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_give_the_losses_of_eager_ones(tmp_path):
    torch.compiler.reset()
    eager, compiled = run(tmp_path / "eager"), run(tmp_path / "compiled", "train.compile=true")
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=1e-5)
