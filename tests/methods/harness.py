"""What the small components of published methods share: a recipe, an encoder, and runs that can be watched.

Every component is written as a plugin's author would write it, out of core, and every test asserts what defines its
method. All of them run with kNN, pictures and `mim check` switched on, which must bear whatever a method is made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mim_framework.checkpoints import checkpoint
from mim_framework.commands.check import report
from mim_framework.contract.components import Encoder
from mim_framework.contract.hooks import hookimpl
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec
from mim_framework.nn.patches import patchify
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.directory import run_directory
from mim_framework.training.trainer import Trainer, train

GRID = Grid((4, 4))
"""16 pixels in patches of 4."""
PLUGIN: list[type] = []
"""What a plugin would register: every component of the files of tests that are imported."""

RECIPE = {
    "name": "tiny",
    "data": {"source": {"type": "digits"}, "workers": 0},
    "views": {"type": "image", "img_size": 16, "scale": [0.6, 1.0]},
    "masker": {"type": "random", "mask_ratio": 0.5},
    "encoder": "tokens",
    "target": "pixels",
    "decoder": "linear",
    "loss": "mse",
    "optim": {"type": "adamw", "lr": 1e-2, "shape": "constant", "weight_decay": 0},
    "train": {"total_batch_size": 4, "steps": 3, "device": "cpu", "precision": "float32"},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 1, "tensorboard": False, "images_every_epochs": 0, "num_images": 2},
    "evaluate": [{"type": "knn", "every_epochs": 0, "max_train": 40, "max_test": 20}],
}
VIT = {"type": "mae_vit", "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NO_HEAD = {"target": None, "decoder": None, "loss": None}
EMA = {"ema": {"copy": ["encoder"], "momentum": {"shape": "linear", "from": 0.5, "to": 1.0}}}
MAE_DECODER = {"type": "mae_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2}
SGD = {"type": "momentum", "shape": "constant", "weight_decay": 0, "lr": 0.1, "options": {"momentum": 0.0}}


def plugin(cls: type) -> type:
    PLUGIN.append(cls)
    return cls


def recipe_at(folder: Path, *overrides: str, **changes: Any):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe_in.yaml"
    file.write_text(json.dumps({**RECIPE, **changes}))  # JSON is YAML, here without anchors
    return load_recipe(file, [f"output_dir={folder}", *overrides], RegistryWith(*PLUGIN))


def run(folder: Path, *overrides: str, hooks: Any = None, **changes: Any) -> Path:
    """Check and train a recipe; returns its run directory."""
    registry, recipe = RegistryWith(*PLUGIN), recipe_at(folder, *overrides, **changes)
    assert "tokens per image" in report(recipe, registry)
    if hooks is not None:
        registry.listen(hooks)
    return train(recipe, registry)


def watch(folder: Path, see: Callable[[Any], Any], *overrides: str, **changes: Any) -> tuple[Path, list[Any]]:
    """`run`, and what `see(model)` gave before the first and after every step."""
    seen = []

    class Watch:
        @hookimpl
        def mim_run_started(self, run):
            seen.append(see(run.model))

        @hookimpl
        def mim_metrics_logged(self, run, step, metrics):
            seen.append(see(run.model))

    return run(folder, *overrides, hooks=Watch(), **changes), seen


def on_two_ranks(
    folder: Path, see: Callable[[Trainer], Any], *overrides: str, **changes: Any
) -> tuple[Path, list[Any]]:
    """The run directory of two ranks that trained together, and what `see(trainer)` gave on each of them."""
    recipe = recipe_at(folder, *overrides, **changes)

    def rank_main(rank: int) -> Any:
        with Trainer.opened(recipe, RegistryWith(*PLUGIN)) as trainer:
            trainer.fit()
            return see(trainer)

    seen = run_ranks(rank_main)
    return run_directory(recipe), seen


def assert_same_weights(a: Path, b: Path, *, atol: float = 0.0) -> None:
    """The same model and teachers in the last checkpoints of two runs; to the bit without `atol`."""
    for group in ("model", "teachers"):
        first, second = (checkpoint.find_latest(each / "checkpoints").tensors(group) for each in (a, b))
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.allclose(first[name], second[name], rtol=0, atol=atol)] == []


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if "loss" in line or any(key.endswith("/loss") for key in line)]


def in_training(step: Any) -> bool:
    """Not in the preflight, a check or an evaluation."""
    return step.total > 1


@plugin
class TokenEncoder(Encoder):
    """A token at every position, the mask token at hidden ones; rows may hide different numbers."""

    name = "tokens"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.embed, self.mask_token = nn.Linear(48, 8), nn.Parameter(torch.full((8,), 0.1))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        layers = frozenset(range(2))
        self.spec = EncoderSpec(8, GRID, 4, 2, 1, offers=Ask(layers=layers), layers=dict.fromkeys(layers, (8, GRID)))

    def forward(self, view, mask, ask=Ask()):
        x = torch.where(mask.at(GRID).hidden[..., None], self.mask_token, self.embed(patchify(view, 4)))
        layers = {}
        for i, layer in enumerate(self.layers):
            x = x + layer(x + x.mean(1, keepdim=True))
            if i in ask.layers:
                layers[i] = x
        return Latent(x, GRID, layers=layers)
