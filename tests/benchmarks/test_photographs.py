"""The benchmark on real photographs: its table by hand, its recipes, and a short walk where the photographs are."""

from __future__ import annotations

import json

import photographs
import pytest
import yaml
from photographs import METHODS, classifier_recipe, main, table

from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry


def test_the_table_gives_the_mean_and_the_range_of_several_seeds(tmp_path):
    parts = {
        "mae_0_pretrained": {"steps": 1200},
        "mae_0_frozen": {"raw_pixels": {"knn": 0.5}, "untrained": {"knn": 0.4}, "trained": {"knn": 0.6, "linear": 0.7}},
        "mae_1_frozen": {"raw_pixels": {"knn": 0.5}, "untrained": {"knn": 0.5}, "trained": {"knn": 0.8, "linear": 0.9}},
        "mae_0_finetuned": {"top1": 0.9},
        "scratch_0_finetuned": {"top1": 0.75},
    }
    for name, content in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert list(table(tmp_path))[2:] == [
        "| raw pixels |  | 50.0 |  |  |  |",
        "| untrained encoder of MAE |  | 45.0 (40.0 to 50.0) |  |  | 75.0 |",
        "| mae | 1,200 | 70.0 (60.0 to 80.0) | 80.0 (70.0 to 90.0) |  | 90.0 |",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_the_recipes_of_every_method_are_valid(tmp_path, name):
    method, registry = METHODS[name], Registry()
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    stages = [method] if method.stage_one is None else [method.stage_one, method]
    for stage in stages:
        pretrained = load_recipe(stage.recipe, list(stage.changes), registry)
    written = classifier_recipe(pretrained.model_dump(mode="json", exclude_unset=True), method, tmp_path)
    (tmp_path / "finetuned.yaml").write_text(yaml.safe_dump(written))
    assert load_recipe(tmp_path / "finetuned.yaml", [], registry).encoder.type == pretrained.encoder.type


@pytest.mark.slow
def test_a_short_walk_ends_with_a_table_and_what_is_done_is_not_done_again(tmp_path, capsys, monkeypatch):
    pytest.importorskip("elpv_dataset", reason="pip install elpv-dataset; its licence is not free")
    short = ["--output", str(tmp_path), "--images", "20", "--minutes", "0.01", "--epochs", "1", "--seeds", "1"]
    main([*short, "--only", "mae", "scratch"])
    first = capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in first.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| raw pixels", "| untrained encoder of MAE", "| mae"]
    monkeypatch.setattr(photographs, "_mim", None)
    main([*short, "--only", "mae", "scratch"])
    assert capsys.readouterr().out in first
