"""Classification: the same step and slots, with the label of each image for its target, and mixup in the views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.harness import run
from torch import Tensor

from mim_framework.assembly.opened import LoadedRun, load_run
from mim_framework.contract.mask import Mask
from mim_framework.data.loader import evaluation_batches

DIGITS = {
    "masker": "none",
    "encoder": {"type": "vit", "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4, "position": "sincos"},
    "target": "labels",
    "decoder": "pooled",
    "loss": "cross_entropy",
    "optim": {"type": "adamw", "lr": 2e-3, "warmup_epochs": 1, "weight_decay": 0.05},
    "train": {"total_batch_size": 64, "steps": 300, "device": "cpu", "precision": "float32"},
    "log": {"every_steps": 300, "tensorboard": False, "images_every_epochs": 0, "num_images": 0},
}
MIXED = {"type": "image", "img_size": 16, "scale": [0.6, 1.0], "flip": 0, "mixup": 0.8, "cutmix": 1.0,
         "label_smoothing": 0.1}  # fmt: skip


@torch.no_grad()
def accuracy(loaded: LoadedRun) -> float:
    """Share of the held-out digits whose class is the likeliest."""
    objective, right = loaded.objective.eval(), []
    held_out = loaded.source.evaluation_sources()[1]
    for batch, labels in evaluation_batches(held_out, loaded.views, 100):
        latent = objective.encoder(
            loaded.views.prepare(None, batch)["x"], Mask.none(len(labels), objective.encoder.spec.grid)
        )
        logits: Tensor = objective.heads["main"].decoder(latent, None).values[:, 0]
        right += (logits.argmax(-1) == labels).tolist()
    return sum(right) / len(right)


@pytest.mark.slow
def test_digits_are_told_apart_after_training_with_mixup_and_cutmix(tmp_path: Path):
    """One in ten before."""
    run_dir = run(tmp_path, **DIGITS, views=MIXED)
    assert accuracy(load_run(run_dir)) > 0.6
