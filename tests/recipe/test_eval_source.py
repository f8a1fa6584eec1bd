"""`data.eval_source` is a slot for any source; the option of `folder` in its place is still read, and told."""

from __future__ import annotations

import json
import re

import pytest
from tiny import RECIPE

from mim_framework.base.errors import RecipeError
from mim_framework.recipe.draft import load_recipe, load_written
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.schema import recipe_schema
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry
from mim_framework.training.directory import changed_keys

REGISTRY = Registry()
FOLDER = {"type": "folder", "root": "imgs", "labels": True}
NOTE = (
    "r.yaml: data.source.eval_root is read as what it is called now, "
    "data.eval_source={type: folder, root: t, labels: true}"
)


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(data: dict, *overrides: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(json.dumps({**RECIPE, "data": data}))
        return load_recipe("r.yaml", overrides, REGISTRY)

    return read


@pytest.mark.parametrize("key", ["eval_source", "eval_train_source"])
def test_any_source_with_its_options_can_stand_there(read, key):
    assert getattr(read({"source": FOLDER}).data, key) is None
    chosen = getattr(read({"source": FOLDER}, f"data.{key}=digits").data, key)
    assert (chosen.type, chosen.options) == ("digits", {"split": "train", "shift": 0})
    chosen = getattr(read({"source": FOLDER}, f"data.{key}.type=folder", f"data.{key}.root=t").data, key)
    assert (chosen.options["root"], chosen.options["pages"]) == ("t", "first")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.eval_source=digts", "data.eval_source: no source 'digts' is installed, did you mean 'digits'"),
        ("data.eval_source=knn", "data.eval_source: 'knn' is a component of kind evaluation, not source"),
        ("data.eval_source={type: digits, splitt: test}", "data.eval_source.splitt: unknown key, did you mean 'split'"),
    ],
)
def test_what_is_wrong_with_it_is_told_with_its_place(read, override, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        read({"source": FOLDER}, override)


def test_the_former_option_is_read_and_what_to_write_is_told(read, caplog):
    recipe = read({"source": {**FOLDER, "eval_root": "t"}})
    assert caplog.messages == [NOTE]
    assert "eval_root" not in dump_recipe(recipe)
    assert recipe == read({"source": FOLDER, "eval_source": {**FOLDER, "root": "t"}})
    assert read({"source": FOLDER}, "data.source.eval_root=t") == recipe
    assert caplog.messages == [NOTE, NOTE]


def test_the_former_option_of_a_run_that_had_none_is_left_out(read, tmp_path, caplog):
    recipe = read({"source": FOLDER})
    text = dump_recipe(recipe).replace("labels: true", "labels: true\n    eval_root: null")
    assert "eval_root" in text
    (tmp_path / "written.yaml").write_text(text)
    assert load_written(tmp_path / "written.yaml", REGISTRY) == recipe
    assert caplog.messages == []


def test_both_spellings_at_once_are_refused(read):
    with pytest.raises(RecipeError, match=r"data\.source\.eval_root: unknown key"):
        read({"source": {**FOLDER, "eval_root": "t"}, "eval_source": "digits"})


def test_a_resumed_run_may_be_judged_by_other_images(read):
    old = read({"source": FOLDER})
    new = read({"source": FOLDER}, "data.eval_source=digits", "data.eval_train_source=digits")
    assert changed_keys(old, new) == []


def test_labels_of_the_images_that_are_trained_on_are_no_matter_of_evaluations(read):
    old = read({"source": {**FOLDER, "labels": False}})
    assert changed_keys(old, read({"source": FOLDER})) == ["data.source.labels: False -> True"]


def test_editors_are_told_which_sources_there_are():
    data = recipe_schema(REGISTRY)["$defs"]["DataSection"]["properties"]
    for key in ("source", "eval_source", "eval_train_source"):
        assert {"$ref": "#/$defs/source.digits"} in data[key]["anyOf"]
    assert data["eval_source"]["anyOf"][-1] == {"type": "null"}
