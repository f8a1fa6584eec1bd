"""`evaluate` is a list: its entries are slots like any other, can be called by their names, and were a mapping once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import RECIPE

from mim_framework.base.errors import RecipeError
from mim_framework.contract.evaluation import Evaluation
from mim_framework.recipe.draft import load_recipe, load_written
from mim_framework.recipe.evaluations import EvaluationChoice
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry
from mim_framework.training.directory import changed_keys

BEFORE = """\
name: tiny
data: {source: digits, workers: 0}
masker: none
encoder: {type: vit, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}
target: pixels
decoder: linear
loss: mse
optim: {lr: 1e-3}
train: {total_batch_size: 8, steps: 3}
"""
REGISTRY = Registry(only=())


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reads a recipe with the given `evaluate`, in lines 10 and on, and overrides; returns its evaluations as dicts."""
    monkeypatch.chdir(tmp_path)

    def read(evaluate: str, *overrides: str) -> list[dict]:
        Path("r.yaml").write_text(BEFORE + evaluate)
        recipe = load_recipe("r.yaml", overrides, REGISTRY, complete=False)
        return [entry.model_dump() for entry in recipe.evaluate]

    return read


def knn(**changes) -> dict:
    return {"type": "knn", "every_epochs": 20.0, "forward_batch_size": 256, "layers": "last", **changes}


def test_neighbours_every_20_epochs_are_the_default(read):
    assert read("") == [knn()]


@pytest.mark.parametrize(
    ("layers", "found"), [("last", "last"), ("each", "each"), ("[3, -1]", (3, -1)), ("[]", "last"), ("null", "last")]
)
def test_layers_are_the_last_or_each_or_some(read, layers, found):
    assert read("", f"evaluate.knn.layers={layers}") == [knn(layers=found)]


@pytest.mark.parametrize("evaluate", ["evaluate: []", "evaluate: null", "evaluate:"])
def test_nothing_is_measured_if_the_list_is_empty_or_null(read, evaluate):
    assert read(evaluate) == []


def test_an_entry_is_a_name_or_a_mapping_with_the_name_when_and_options(read):
    assert read("evaluate: [knn]") == [knn()]
    assert read("evaluate:\n  - type: knn\n    every_epochs: 5\n    k: 3") == [knn(every_epochs=5.0, k=3)]


def test_defaults_of_the_options_are_written_out_and_read_again(tmp_path):
    (tmp_path / "r.yaml").write_text(BEFORE + "evaluate: [{type: knn, every_epochs: 5}]")
    recipe = load_recipe(tmp_path / "r.yaml", [], REGISTRY)
    assert recipe.evaluate[0].options["temperature"] == 0.07
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml", [], REGISTRY) == recipe
    assert load_written(tmp_path / "again.yaml", REGISTRY) == recipe


@pytest.mark.parametrize(
    ("evaluate", "overrides", "found"),
    [
        ("", ["evaluate.knn.k=10"], [knn(k=10)]),
        ("", ["evaluate.0.k=10"], [knn(k=10)]),
        ("evaluate: [knn]", ["evaluate.knn.k=10"], [knn(k=10)]),
        ("evaluate: [{type: knn, k: 5}]", ["evaluate.knn.every_epochs=0"], [knn(k=5, every_epochs=0.0)]),
        ("evaluate: [{type: knn, k: 5}]", ["evaluate.knn={pool: cls}"], [knn(pool="cls")]),
        ("evaluate: []", ["evaluate.knn.k=10"], [knn(k=10)]),
        ("evaluate: null", ["evaluate.knn.k=10"], [knn(k=10)]),
        ("evaluate: [knn]", ["evaluate.knn=null"], []),
        ("", ["evaluate.knn=null"], []),
        ("evaluate: []", ["evaluate.knn=null"], []),
        ("evaluate: [knn]", ["evaluate=[]"], []),
        ("evaluate: [knn]", ["evaluate=null"], []),
        ("evaluate: []", ["evaluate=[{type: knn, k: 1}]"], [knn(k=1)]),
    ],
)
def test_overrides_call_an_entry_by_its_name_or_number(read, evaluate, overrides, found):
    assert read(evaluate, *overrides) == found


@pytest.mark.parametrize(
    ("evaluate", "overrides", "message"),
    [
        (
            "evaluate: [{type: knm}]",
            [],
            "r.yaml:10:13: evaluate.0.type: no evaluation 'knm' is installed, did you mean",
        ),
        ("evaluate: [knm]", [], "r.yaml:10:12: evaluate.0: no evaluation 'knm' is installed, did you mean 'knn'"),
        ("evaluate: [mse]", [], "r.yaml:10:12: evaluate.0: 'mse' is a component of kind loss, not evaluation"),
        ("evaluate: [{type: knn, kk: 3}]", [], "r.yaml:10:24: evaluate.0.kk: unknown key, did you mean 'k'?"),
        ("evaluate: [{type: knn, k: 0}]", [], "r.yaml:10:24: evaluate.0.k: must be greater than 0, got 0"),
        ("evaluate: [{type: knn, every_epochs: -1}]", [], "r.yaml:10:24: evaluate.0.every_epochs: must be at least 0"),
        ("evaluate: [{type: knn, every_epochs: yes}]", [], "evaluate.0.every_epochs: needs a number, got 'yes'"),
        ("evaluate: [{type: knn, layers: all}]", [], "r.yaml:10:24: evaluate.0.layers: "),
        ("evaluate: [{k: 3}]", [], "r.yaml:10:12: evaluate.0: names no component; write 'type: NAME' here"),
        ("evaluate: [3]", [], "evaluate.0: needs the name of a component, or a mapping with 'type' and its options"),
        ("evaluate: knn", [], "r.yaml:10:1: evaluate: needs a list, got 'knn'"),
        ("evaluate: [knn, knn]", [], "r.yaml:10:17: evaluate.1: evaluation 'knn' stands in the list already"),
        ("", ["evaluate.knn.kk=3"], "override 'evaluate.knn.kk=3': evaluate.0.kk: unknown key, did you mean 'k'?"),
        ("", ["evaluate.knm.k=3"], "override 'evaluate.knm.k=3': evaluate.1.type: no evaluation 'knm' is installed"),
        ("", ["evaluate.1.k=3"], "override 'evaluate.1.k=3': evaluate: is a list of 1; '1' is none of its numbers"),
    ],
)
def test_what_is_wrong_with_an_entry_is_told_with_its_place(read, evaluate, overrides, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        read(evaluate, *overrides)


def test_places_move_up_when_an_override_leaves_an_entry_out(read):
    with pytest.raises(RecipeError, match=re.escape("r.yaml:12:5: evaluate.0.type: no evaluation 'b' is installed")):
        read("evaluate:\n  - knn\n  - type: b\n", "evaluate.knn=null")


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("{knn: {every_epochs: 5, k: 3}}", "[{type: knn, every_epochs: 5, k: 3}]"),
        ("{knn: {batch_size: 64}}", "[{type: knn, forward_batch_size: 64}]"),
        ("{knn: null}", "[]"),
        ("{}", "[{type: knn}]"),
    ],
)
def test_the_former_mapping_is_refused_with_what_to_write(read, tmp_path, former, now):
    with pytest.raises(RecipeError) as error:
        read(f"evaluate: {former}")
    assert str(error.value) == f"r.yaml:10:1: evaluate: is a list of evaluations now; write evaluate: {now}"


def test_what_an_earlier_version_wrote_into_a_run_directory_is_read(tmp_path, caplog):
    file = tmp_path / "recipe.yaml"
    file.write_text(BEFORE + "evaluate: {knn: {every_epochs: 5, batch_size: 64, k: 3}}")
    old = load_written(file, REGISTRY)
    assert "was written by an earlier version; it now reads evaluate: [{type: knn, every_epochs: 5" in caplog.text
    file.write_text(BEFORE + "evaluate: [{type: knn, every_epochs: 5, forward_batch_size: 64, k: 3}]")
    assert load_written(file, REGISTRY) == old


def test_a_resumed_run_may_be_evaluated_otherwise():
    old, new = (Recipe.model_validate({**RECIPE, "evaluate": each}) for each in ([], [{"type": "knn", "k": 3}]))
    assert changed_keys(old, new) == []


def test_no_option_of_an_evaluation_may_be_called_like_a_key_of_every_entry():
    assert {"type", "layers", *Evaluation.reserved} == set(EvaluationChoice.own_keys())
