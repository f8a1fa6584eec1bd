"""The records of a run directory: one per start, other versions told, changes by an explicit word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from click.testing import CliRunner

from mim_framework.base.errors import RecipeError
from mim_framework.commands.cli import main
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith
from mim_framework.training.directory import changed_versions, check_changeable, read_records
from mim_framework.training.trainer import train


def run(folder: Path, *overrides: str, allow_change: tuple[str, ...] = ()) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.RECIPE))
    registry = RegistryWith()
    recipe = load_recipe(folder / "recipe.yaml", [f"output_dir={folder}", *overrides], registry)
    return train(recipe, registry, allow_change=allow_change)


def rates(run_dir: Path) -> list[float]:
    return [line["lr"] for line in read_metrics(run_dir)]


def test_every_start_leaves_a_record_and_the_old_form_is_read(tmp_path):
    run_dir = run(tmp_path)
    [first] = read_records(run_dir / "environment.json")
    assert (first["step"], first["world_size"]) == (0, 1)
    (run_dir / "environment.json").write_text(json.dumps({"python": "3.11.0", "packages": {}}))
    run(tmp_path)
    old, second = read_records(run_dir / "environment.json")
    assert (old["python"], second["step"]) == ("3.11.0", 2)
    (run_dir / "environment.json").write_text("{ torn")
    run(tmp_path)
    assert [entry["step"] for entry in read_records(run_dir / "environment.json")] == [2]


def test_a_run_that_goes_on_under_other_versions_says_so(tmp_path, caplog):
    run_dir = run(tmp_path)
    records = read_records(run_dir / "environment.json")
    records[-1]["packages"]["torch"] = "1.0"
    records[-1]["plugins"]["gone"] = "0.3"
    (run_dir / "environment.json").write_text(json.dumps(records))
    run(tmp_path)
    [told] = [each.message for each in caplog.records if "other versions" in each.message]
    assert "gone 0.3 -> absent" in told
    assert "torch 1.0 -> " in told
    assert "Up to step 2 it is what it was" in told
    run(tmp_path)
    assert caplog.text.count("other versions") == 1


def test_versions_are_compared_by_name():
    before = {"packages": {"torch": "2.14.0", "timm": "1.0"}, "plugins": {}}
    now = {"packages": {"torch": "2.14.1", "timm": "1.0"}, "plugins": {"mae": "0.1"}}
    assert changed_versions(before, now) == ["torch 2.14.0 -> 2.14.1", "mae absent -> 0.1"]
    assert changed_versions({}, now) == []


@pytest.mark.fault(row="27")
def test_a_run_is_lengthened_and_slowed_by_an_explicit_word(tmp_path, figure):
    run_dir = run(tmp_path, "train.steps=3")
    with pytest.raises(RecipeError, match=r"train\.steps: 3 -> 6\. Undo .*add --allow-change train\.steps,"):
        run(tmp_path, "train.steps=6")
    changes = ["train.steps=6", "optim.lr=1e-4"]
    with pytest.raises(RecipeError, match=r"optim\.lr: 0\.001 -> 0\.0001\. Undo .*add --allow-change optim\.lr,"):
        run(tmp_path, *changes, allow_change=("train.steps",))
    run(tmp_path, *changes, allow_change=("train.steps", "optim.lr"))
    [entry] = read_records(run_dir / "changes.json")
    assert entry["step"] == 3
    assert entry["changed"] == {"train.steps": [3, 6], "optim.lr": [0.001, 0.0001]}
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    (tmp_path / "slow").mkdir()
    assert rates(run_dir)[3:] == rates(run(tmp_path / "slow", *changes))[3:]  # those of the new recipe at these steps
    run(tmp_path, *changes)  # the new recipe is the run's own now
    assert len(read_records(run_dir / "changes.json")) == 1
    figure("length and learning rate: 2 of 2 refused without --allow-change, 2 of 2 taken and recorded with it")


@pytest.mark.parametrize("key", ["seed", "encoder.depth", "train.total_batch_size", "optim.type", "optim.options"])
def test_what_no_word_can_change_is_refused(tmp_path, key):
    with pytest.raises(RecipeError, match=rf"--allow-change {key}: a run cannot change it and go on"):
        check_changeable([key])


def test_a_change_that_no_word_allows_is_refused_without_the_word(tmp_path):
    run(tmp_path)
    with pytest.raises(RecipeError, match=r"seed: 0 -> 1\. Undo the change, or give the run another name"):
        run(tmp_path, "seed=1", allow_change=("train.steps",))


def test_a_finished_run_says_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.RECIPE))
    command = ["run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path)]
    first, second = (CliRunner().invoke(main, command) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert "is finished" not in first.output
    assert "the run is finished: its 2 steps were made before. To make more, give it a new length" in second.output
    third = CliRunner().invoke(main, [*command, "train.steps=4", "--allow-change", "train.steps"])
    assert third.exit_code == 0, third.output
    assert read_metrics(tmp_path / "tiny")[-1]["step"] == 4
