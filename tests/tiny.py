"""The recipe of most tests that train: MAE on digits of 16 pixels, a few milliseconds a step."""

from __future__ import annotations

from typing import Any

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": {"type": "digits"}, "workers": 0},
    "views": {"type": "image", "img_size": 16},
    "masker": {"type": "random", "mask_ratio": 0.75},
    "encoder": {"type": "mae_vit", "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "target": {"type": "pixels"},
    "decoder": {"type": "mae_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2},
    "loss": "mse",
    "optim": {"type": "adamw", "lr": 1e-3, "warmup_epochs": 0.001},
    "train": {"total_batch_size": 8, "steps": 2, "device": "cpu", "precision": "float32"},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 1, "tensorboard": False, "images_every_epochs": 0, "num_images": 0},
    "evaluate": [],
}
