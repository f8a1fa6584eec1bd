"""The log of a run that was stopped between two lines goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import yaml

from mim_framework.builtins.losses import MSELoss
from mim_framework.checkpoints import checkpoint
from mim_framework.contract.hooks import hookimpl
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train

OF_THE_CLOCK = ("images_per_s", "step_s", "wait_share", "peak_memory_gb")


class Counting(MSELoss):
    """Logs how many images it has seen since the last line."""

    name = "counting"
    counted_for_the_log = ("seen",)

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, pred, target, mask, latent):
        if self.training:
            self.seen += len(pred.values)
        return super().forward(pred, target, mask, latent)

    def metrics(self):
        seen = self.seen.clone()
        self.seen.zero_()
        return {"seen": seen}


def crash_after_saving(step: int, *components: type) -> RegistryWith:
    registry = RegistryWith(*components)

    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, path):
            if path.name.endswith(f"{step:08d}"):
                raise KeyboardInterrupt

    registry.listen(Crash())
    return registry


def log_of(run_dir: Path) -> list[dict]:
    return [{name: v for name, v in line.items() if name not in OF_THE_CLOCK} for line in read_metrics(run_dir)]


def test_what_a_component_counts_for_the_log_is_exact_after_a_resume(tmp_path):
    options = ["train.steps=8", "log.every_steps=3", "checkpoint.every_steps=2"]

    def run(folder: Path, registry: RegistryWith) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**tiny.RECIPE, "loss": "counting"}))
        return train(load_recipe(folder / "recipe.yaml", [*options, f"output_dir={folder}"], registry), registry)

    straight = run(tmp_path / "straight", RegistryWith(Counting))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", crash_after_saving(4, Counting))
    found = checkpoint.load(tmp_path / "resumed/tiny/checkpoints/step_00000004")
    assert {name: float(each) for name, each in found.tensors("log").items()} == {"heads.main.loss.seen": 8.0}
    resumed = run(tmp_path / "resumed", RegistryWith(Counting))
    assert log_of(resumed) == log_of(straight)
    assert [line["heads.main.loss/seen"] for line in log_of(resumed)] == [24, 24, 16]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["beit_dvae_quickstart", "beit_v2_vqkd_quickstart"])
def test_usage_and_perplexity_of_codes_are_exact_after_a_resume(tmp_path, recipe):
    options = ["train.epochs=null", "train.steps=6", "train.total_batch_size=8", "log.every_steps=4", "evaluate=[]"]
    options += ["checkpoint.every_steps=3", "log.tensorboard=false", "log.num_images=0", "train.precision=float32"]

    def run(folder: Path, registry: RegistryWith) -> Path:
        return train(load_recipe(recipe, [*options, f"output_dir={folder}"], registry), registry)

    straight = run(tmp_path / "straight", RegistryWith())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", crash_after_saving(3))
    assert log_of(run(tmp_path / "resumed", RegistryWith())) == log_of(straight)
    assert any("perplexity" in name for name in log_of(straight)[-1])
