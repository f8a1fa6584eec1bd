"""A run directory of a small MAE whose weights are no initial ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mim_framework.assembly.builder import Model, build_model
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

RECIPE = {
    "name": "small",
    "data": {"source": {"type": "folder", "root": "."}, "workers": 0},
    "views": {"type": "image", "img_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]},
    "masker": "random",
    "encoder": {"type": "mae_vit", "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "target": "pixels",
    "decoder": {"type": "mae_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2},
    "loss": "mse",
    "optim": {"lr": 1e-3},
    "train": {"total_batch_size": 6, "steps": 9, "device": "cpu"},
}


@pytest.fixture
def make_run(tmp_path: Path):
    """Make `tmp_path/NAME` with the recipe above, changed, and checkpoints after the given steps."""

    def make(name: str = "run", steps: tuple[int, ...] = (9,), **changes) -> tuple[Path, Model]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
        model = build_model(load_recipe(folder / "recipe.yaml"), Registry())
        torch.manual_seed(0)
        for step in steps:
            with torch.no_grad():
                for parameter in model.objective.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            save_checkpoint(folder / "checkpoints", step, {"model": model.objective.state_dict()}, {})
        return folder, model

    return make
