"""What a run says of its source: images that were renamed or replaced since, and files that it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image as pil
from tiny import RECIPE

from mim_framework.base.errors import DataError
from mim_framework.commands.check import report
from mim_framework.data.identity import source_changes
from mim_framework.recipe.draft import load_recipe
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train


def images(folder: Path, names: list[str], shade: int = 0) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pil.new("RGB", (16, 16), (number * 20, shade, 90)).save(folder / name)
    return folder


def on_folder(tmp_path: Path, *overrides: str) -> Path:
    source = f"data.source={{type: folder, root: {tmp_path / 'images'}}}"
    file = tmp_path / "recipe_in.yaml"
    file.write_text(json.dumps(RECIPE))
    return train(load_recipe(file, [f"output_dir={tmp_path}", source, *overrides], RegistryWith()), RegistryWith())


def renamed(folder: Path) -> None:
    (folder / "3.png").rename(folder / "33.png")


def replaced(folder: Path) -> None:
    pil.effect_noise((16, 16), 50).save(folder / "3.png")


@pytest.mark.fault(row="27")
@pytest.mark.slow  # four runs
@pytest.mark.parametrize(("change", "words"), [(renamed, "other names"), (replaced, "files of other sizes")])
def test_a_run_goes_on_with_renamed_or_replaced_images_only_if_it_is_told_to(tmp_path, caplog, change, words, figure):
    images(tmp_path / "images", [f"{i}.png" for i in range(8)])
    on_folder(tmp_path, "train.steps=2")
    on_folder(tmp_path, "train.steps=2")  # nothing has changed
    change(tmp_path / "images")
    with pytest.raises(DataError, match=rf"data.source has changed since .*: {words}\. They decide"):
        on_folder(tmp_path, "train.steps=2")
    run_dir = on_folder(tmp_path, "train.steps=2", "data.accept_changed_source=true")
    [line] = [json.loads(each) for each in (run_dir / "source_changes.jsonl").read_text().splitlines()]
    assert (line["step"], line["changes"]) == (2, [words])
    assert line["then"]["num_images"] == line["now"]["num_images"] == 8
    assert "accepted by the recipe" in caplog.text
    figure(f"an image is {change.__name__}: refused with '{words}', taken and recorded by data.accept_changed_source")


def test_a_checkpoint_of_before_knows_only_the_number(tmp_path):
    assert source_changes({"num_images": 8}, {"num_images": 8, "names": "abc"}) == []
    assert source_changes({"num_images": 8, "names": "a"}, {"num_images": 9, "names": "b"}) == ["8 images -> 9"]


def test_what_is_left_out_is_said_before_and_after_a_run_and_by_check(tmp_path, capsys):
    images(tmp_path / "images", [f"{i}.png" for i in range(8)])
    (tmp_path / "images" / "photo.heic").touch()
    (tmp_path / "images" / ".DS_Store").touch()
    run_dir = on_folder(tmp_path, "train.steps=2")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "left out" in line] == ["left out of data.source: 1 .heic, 1 hidden"] * 2
    assert lines[-1].startswith("left out")
    recipe = load_recipe(run_dir / "recipe.yaml", (), RegistryWith())
    assert "left out               1 .heic, 1 hidden" in report(recipe, RegistryWith())
