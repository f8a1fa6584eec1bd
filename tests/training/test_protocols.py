"""Runs that classify: accuracy on the way, the best state kept through a kill, and the line at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.harness import recipe_at
from PIL import Image

from mim_framework.assembly.opened import load_run
from mim_framework.base.errors import DataError
from mim_framework.checkpoints.checkpoint import CheckpointSection, list_checkpoints, prune, save_checkpoint, step_of
from mim_framework.commands.evaluate import Options, evaluate
from mim_framework.contract.evaluation import Estimate, Features
from mim_framework.contract.hooks import hookimpl
from mim_framework.evaluate.accuracy import Accuracy, hits
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import run_ranks
from mim_framework.training.best import Best
from mim_framework.training.published import comparison
from mim_framework.training.trainer import train

PROBE: dict[str, Any] = {
    "masker": "none",
    "encoder": {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "position": "sincos"},
    "objective": "classify",
    "target": "labels",
    "decoder": {"type": "classifier", "pool": "mean", "batch_norm": True},
    "loss": "cross_entropy",
    "optim": {"type": "adamw", "lr": 3e-2, "shape": "constant", "weight_decay": 0},
    "train": {"total_batch_size": 128, "epochs": 4, "device": "cpu", "precision": "float32", "frozen": ["encoder.*"]},
    "checkpoint": {"every_epochs": 1, "keep": 1, "keep_best": "accuracy_top1"},
    "evaluate": [{"type": "accuracy", "every_epochs": 1}],
}


def accuracies(run_dir: Path) -> list[float]:
    return [line["accuracy_top1"] for line in read_metrics(run_dir) if "accuracy_top1" in line]


def test_hits_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert hits(logits, torch.tensor([2, 2]), 1).tolist() == [False, True]
    assert hits(logits, torch.tensor([2, 0]), 2).tolist() == [True, False]
    assert hits(logits, torch.tensor([2, 0]), 5).tolist() == [True, True]


class Scores:
    """A subject of which only the scores are asked."""

    def __init__(self, x: list[Any], y: list[int]) -> None:
        self.scores = Features(torch.tensor(x), torch.tensor(y))

    def logits(self, split: str) -> Features:
        return self.scores


def test_accuracy_of_several_heads_is_that_of_the_best_and_all_are_told():
    right, wrong = [9.0, 0.0], [0.0, 9.0]
    accuracy = Accuracy(Accuracy.Config())
    found = accuracy(Scores([[wrong, right, right], [right, wrong, right], [right, right, right]], [0, 0, 0]))
    assert found["top1"] == found["head2_top1"] == 1.0
    assert found["best_head"] == 2
    assert [found[f"head{number}_top1"] for number in (0, 1)] == pytest.approx([2 / 3, 2 / 3])
    assert found["loss"] == accuracy(Scores([right] * 3, [0, 0, 0]))["loss"]
    assert accuracy(Scores([right, wrong], [0, 0])).keys() == {"top1", "top5", "loss"}


def test_the_best_is_the_first_highest(tmp_path: Path):
    best = Best("accuracy_top1", tmp_path)
    values = [Estimate.of_share(right, 10) for right in (3, 5, 5, 4)]
    taken = [best.take(step, {"accuracy_top1": value}) for step, value in enumerate(values)]
    assert taken == [True, True, False, False]
    assert best.state == {"metric": "accuracy_top1", "value": 0.5, "step": 1}
    assert not best.take(9, {"knn_top1": 1.0})
    assert Best("knn_top1", tmp_path, best.state).state is None  # of another number
    best.write()
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "checkpoints/step_00000001"


def test_the_best_checkpoint_is_not_pruned(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}}, {})
    prune(tmp_path, CheckpointSection(keep=1), 10, best=2)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 4]


@pytest.mark.slow
def test_a_killed_probe_goes_on_to_the_same_best_and_the_same_weights(tmp_path: Path):
    class Kill:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            if step_of(path) == 22:
                raise KeyboardInterrupt

    straight = train(recipe_at(tmp_path / "a", **PROBE), Registry())
    registry = Registry()
    registry.listen(Kill())
    with pytest.raises(KeyboardInterrupt):
        train(recipe_at(tmp_path / "b", **PROBE), registry)
    resumed = train(recipe_at(tmp_path / "b", **PROBE), Registry())
    assert accuracies(resumed) == accuracies(straight)
    assert len(accuracies(straight)) == 4
    assert accuracies(straight)[-1] > 0.2  # twice what guessing gives, of a random encoder
    assert (resumed / "best.json").read_text() == (straight / "best.json").read_text()
    best = json.loads((straight / "best.json").read_text())
    assert best["value"] == max(accuracies(straight))
    assert (straight / best["checkpoint"]).is_dir()
    judged = evaluate(["accuracy", "knn"], [straight], options=Options(checkpoint="best"))
    assert [each.step for each in judged] == [best["step"]]
    assert set(judged[0].numbers) == {"raw_pixels", "untrained", "trained"}
    assert "accuracy_top1" not in judged[0].numbers["untrained"]
    assert judged[0].numbers["trained"]["accuracy_top1"] == best["value"]
    with pytest.raises(DataError, match="its classifier tells 10 classes, and those of the images to be tested on are"):
        evaluate(
            ["accuracy"], [straight], options=Options(train=str(two_classes(tmp_path)), test=str(tmp_path / "two"))
        )
    a, b = (load_run(each).objective.state_dict() for each in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def two_classes(folder: Path) -> Path:
    for name in ("one", "two"):
        (folder / "two" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "two" / name / "1.png")
    return folder / "two"


@pytest.mark.slow
def test_ranks_share_the_images_of_accuracy_and_count_each_once(tmp_path: Path):
    changes = {**PROBE, "decoder": {"type": "classifier", "norm": "new"}, "train": {**PROBE["train"], "epochs": 1}}
    alone = train(recipe_at(tmp_path / "a", **changes), Registry())
    run_ranks(lambda rank: train(recipe_at(tmp_path / "b", **changes), Registry()))
    together = tmp_path / "b" / alone.name
    assert accuracies(together) == pytest.approx(accuracies(alone), abs=2 / 360)


def test_the_line_at_the_end_names_what_differs():
    recipe = load_recipe("mae_finetune", ["train.total_batch_size=256", "optim.layer_decay=0.7"], Registry())
    line = comparison(recipe, 0.7123, Registry())
    assert line == (
        "paper 83.6 (1600 epochs, facebookresearch/mae README.md) | this run 71.2 | deviations: optim.layer_decay 0.7 "
        "instead of 0.65, batch 256 instead of 1024, no pre-training"
    )


def test_the_line_at_the_end_looks_into_the_pre_training(tmp_path: Path):
    before = load_recipe("mae", ["train.epochs=300", "masker.mask_ratio=0.6"], Registry())
    (tmp_path / "recipe.yaml").write_text(dump_recipe(before))
    recipe = load_recipe("mae_linear", [f"init={tmp_path}"], Registry())
    line = comparison(recipe, None, Registry())
    assert line.endswith(
        "| this run not measured | deviations: pre-training 300 epochs instead of 1600 epochs, pre-training "
        "masker.mask_ratio 0.6 instead of 0.75"
    )


def test_a_recipe_without_a_published_number_ends_without_the_line():
    assert comparison(load_recipe("mae_low_shot", [], Registry()), 0.5, Registry()) is None
