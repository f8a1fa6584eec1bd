"""What holds for every method that ships: its small recipe trains, on ranks as on one, resumed as uninterrupted.

The recipes are those named `*quickstart`, shortened and with fewer images at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mim_framework import checkpoint
from mim_framework.evaluate.knn import KNNSection
from mim_framework.evaluate.run import evaluate_run
from mim_framework.hookspecs import hookimpl
from mim_framework.metrics import read_metrics
from mim_framework.plugins import Registry
from mim_framework.recipe import load_recipe
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.trainer import train

pytestmark = pytest.mark.slow

RECIPES = sorted(info.name for info in Registry().recipes() if info.name.endswith("quickstart"))
TOKENIZERS: dict[str, Path] = {}
SHORT = [
    "train.epochs=null", "train.steps=3", "train.total_batch_size=8", "train.device=cpu", "train.precision=float32",
    "checkpoint={every_epochs: 0}", "log={every_steps: 1, tensorboard: false, images_every_epochs: 0, num_images: 0}",
    "evaluate.knn=null",
]  # fmt: skip
SGD = "optim={type: momentum, lr: 0.05, shape: constant, weight_decay: 0, options: {momentum: 0.0}}"
"""Adam would turn the rounding of a gradient that is zero into a step of full size."""


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Short runs of the first stages that second stages name, by the name of their recipe."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for recipe in RECIPES:
        if named := load_recipe(recipe, [], Registry()).tokenizer:
            stage_one = Path(named).name
            TOKENIZERS[stage_one] = run(folder, stage_one, "train.steps=22", "train.total_batch_size=16")
    yield
    TOKENIZERS.clear()


def run(folder: Path, recipe: str, *overrides: str, registry: Registry | None = None) -> Path:
    registry = registry or RegistryWith()
    named = load_recipe(recipe, [], registry).tokenizer
    stage_one = [f"tokenizer={TOKENIZERS[Path(named).name]}"] if named else []
    return train(load_recipe(recipe, [*SHORT, f"output_dir={folder}", *stage_one, *overrides], registry), registry)


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.find_latest(run_dir / "checkpoints").tensors("model")


def test_there_is_a_small_recipe_of_every_method():
    assert {info.plugin for info in Registry().recipes()} == {
        info.plugin for info in Registry().recipes() if info.name in RECIPES
    }


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_with_accumulation_learn_what_one_learns(tmp_path: Path, recipe: str, mode: str):
    alone = run(tmp_path / "alone", recipe, SGD)
    run_ranks(lambda rank: run(tmp_path / mode, recipe, SGD, f"train.distributed={mode}", "train.batch_size=2"))
    together = tmp_path / mode / alone.name
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-5)
    weights = weights_of(together)
    for name, tensor in weights_of(alone).items():
        assert torch.allclose(weights[name], tensor, atol=2e-6), name


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, recipe: str):
    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            if path.name.endswith("2"):
                raise KeyboardInterrupt

    straight = run(tmp_path / "straight", recipe)
    registry = RegistryWith()
    registry._manager.register(Crash())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", recipe, "checkpoint.every_steps=1", registry=registry)
    resumed = run(tmp_path / "resumed", recipe)
    assert losses_of(resumed) == losses_of(straight)
    weights = weights_of(resumed)
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(straight).items())


def test_bfloat16_stays_near_float32(tmp_path: Path, recipe: str):
    full = losses_of(run(tmp_path / "full", recipe))
    half = losses_of(run(tmp_path / "half", recipe, "train.precision=bfloat16"))
    assert half == pytest.approx(full, rel=2e-2)
    assert half != full


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, when it looks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_give_the_losses_of_eager_ones(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch):
    """Blocks are captured and differentiated as a whole; machine code is left to test_trainer.py, it takes a minute."""
    compiled = []

    def compile_without_code_generation(block: torch.nn.Module) -> None:
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code_generation)
    torch.compiler.reset()
    eager = run(tmp_path / "eager", recipe, "train.steps=2")
    with_graphs = run(tmp_path / "compiled", recipe, "train.steps=2", "train.compile=true")
    assert compiled
    assert losses_of(with_graphs) == pytest.approx(losses_of(eager), rel=1e-5)


LATE = {
    "maskfeat_quickstart", "simmim_quickstart", "simmim_vit_quickstart", "beit_quickstart", "beit_v2_quickstart",
    "beit_dvae_quickstart", "beit_v2_vqkd_quickstart",
}  # fmt: skip
"""A sixth of the recipe is not enough for their features to pass those of the untrained encoder."""


def test_a_few_epochs_on_digits_lower_the_loss_and_soon_beat_the_untrained_encoder(tmp_path: Path, recipe: str):
    """A sixth of the recipe's own length; what the whole of it brings is in the README of its plugin."""
    epochs = load_recipe(recipe, [], Registry()).train.epochs / 6
    options = ["train.steps=null", f"train.epochs={epochs}", "train.total_batch_size=64", "log.every_steps=22"]
    run_dir = run(tmp_path, recipe, *options)
    losses = losses_of(run_dir)
    assert losses[-1] < 0.95 * losses[0]
    if recipe not in LATE:
        top1 = evaluate_run(run_dir, section=KNNSection())
        assert top1["trained"] > top1["untrained"] + 0.03
