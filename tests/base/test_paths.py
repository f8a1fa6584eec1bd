"""Paths mean the same in every option and command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import RECIPE

from mim_framework.base.errors import RecipeError
from mim_framework.base.paths import is_url, local_path, path_or_url
from mim_framework.commands.cli import main
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs", "HOME/runs"),
        ("~", "HOME"),
        ("file:///data/images", "/data/images"),
        ("local:///data/images", "/data/images"),
        ("file://~/images", "HOME/images"),
        ("runs", "runs"),
        ("../runs", "../runs"),
        ("/data/a~b", "/data/a~b"),
        ("./~x", "./~x"),
        ("./$x", "./$x"),
        ("/data/cost_in_$", "/data/cost_in_$"),
    ],
)
def test_a_local_path_by_hand(home, text, path):
    wanted = path.replace("HOME", str(home))
    assert path_or_url(text) == local_path(text) == wanted


@pytest.mark.parametrize("url", ["s3://bucket/images", "https://host/~someone/images", "zip://images::~/a.zip"])
def test_a_url_is_left_as_it_is_and_refused_where_only_a_local_path_will_do(url):
    assert is_url(url)
    assert path_or_url(url) == url
    with pytest.raises(ValueError, match="needs a local path, got the URL"):
        local_path(url)


def test_a_home_folder_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="there is no home folder of '~nobody_here'; write ./~nobody_here/x"):
        local_path("~nobody_here/x")


@pytest.mark.parametrize("text", ["$HOME/runs", "${SCRATCH}/runs", "file://$HOME/runs"])
def test_a_variable_of_the_shell_is_refused_instead_of_a_folder_of_that_name(text):
    with pytest.raises(ValueError, match=r"variables such as \$\{?(HOME|SCRATCH)\}? are not looked up here; write the"):
        local_path(text)


def recipe_with(folder: Path, *overrides: str):
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(RECIPE))
    return load_recipe(file, overrides, Registry())


OPTIONS = ["output_dir", "init", "tokenizer", "data.tokens", "teachers.t.checkpoint", "encoder.checkpoint"]
AROUND = {
    "data.tokens": ["data.views_per_image=2"],
    "encoder.checkpoint": ["encoder={type: timm, model: test_vit}"],
}


def value_at(recipe, key: str):
    value = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("text", ["~/some/folder", "file://~/some/folder"])
def test_every_option_that_takes_a_path_knows_the_home_folder(home, tmp_path, key, text):
    recipe = recipe_with(tmp_path, *AROUND.get(key, []), f"{key}={text}")
    assert value_at(recipe, key) == f"{home}/some/folder"
    assert f"{home}/some/folder" in dump_recipe(recipe)


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_that_takes_a_local_path_refuses_a_url(tmp_path, key):
    with pytest.raises(RecipeError, match=rf"{key}: .*needs a local path, got the URL 's3://bucket/x'"):
        recipe_with(tmp_path, *AROUND.get(key, []), f"{key}=s3://bucket/x")


@pytest.mark.parametrize("key", ["data.source", "data.eval_source", "data.eval_train_source"])
def test_the_folders_of_images_may_be_local_or_behind_a_url(home, tmp_path, key):
    for text, wanted in {"~/images": f"{home}/images", "file:///images": "/images", "s3://b/i": "s3://b/i"}.items():
        options = json.dumps({"type": "folder", "root": text})
        assert value_at(recipe_with(tmp_path, f"{key}={options}"), f"{key}.root") == wanted


def test_commands_take_the_same_paths_as_recipes(home, tmp_path):
    (home / "plugins").mkdir()
    done = CliRunner().invoke(main, ["plugins", "new", "spiral", "--output", "~/plugins"])
    assert done.exit_code == 0, done.output
    assert (home / "plugins" / "mim-plugin-spiral").is_dir()
    done = CliRunner().invoke(main, ["recipes", "copy", "quickstart", "file://~/copied.yaml"])
    assert done.exit_code == 0, done.output
    assert (home / "copied.yaml").is_file()
    assert load_recipe("~/copied.yaml").name == "quickstart"
    done = CliRunner().invoke(main, ["export", "s3://bucket/run", "--to", "timm"])
    assert done.exit_code == 2
    assert "needs a local path, got the URL 's3://bucket/run'" in done.output
