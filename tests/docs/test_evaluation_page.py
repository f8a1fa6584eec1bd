"""Every command on the page about evaluations works in the folder that the page speaks of."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from clean_install import ROOT
from click.testing import CliRunner
from PIL import Image
from tiny import RECIPE

from mim_framework.commands.cli import main
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.training.trainer import train

PAGE = (ROOT / "docs" / "evaluation.md").read_text()
COMMANDS = re.findall(r"^mim (.+)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs on digits, a classifier of them, and labelled photographs."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("page")
    encoder = {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    classifier = {
        "masker": "none", "objective": "classify", "target": "labels", "decoder": "classifier", "loss": "cross_entropy",
        "train": {**RECIPE["train"], "steps": None, "epochs": 0.01},
        "evaluate": [{"type": "accuracy", "every_epochs": 0}],
        "checkpoint": {"every_epochs": 0.005, "keep_best": "accuracy_top1"},
    }  # fmt: skip
    for name, more in {"quickstart": {}, "other": {}, "finetuned": classifier}.items():
        changed = {"name": name, "output_dir": str(folder / "runs"), "encoder": encoder, "decoder": "linear", **more}
        (folder / "r.yaml").write_text(json.dumps({**RECIPE, **changed}))
        train(load_recipe(folder / "r.yaml", [], Registry()), Registry())
    for split, shades in {"train": range(0, 250, 20), "test": range(10, 250, 50)}.items():
        for index, name in enumerate(("dark", "bright")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for shade in shades:
                image = Image.new("RGB", (16, 16), (shade // 2 + 127 * index, shade, shade))
                image.save(folder / "photos" / split / name / f"{shade}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_works(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, shlex.split(command), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if "--json" in command:
        assert set(re.findall(r"`(\w+)`", PAGE[PAGE.index("| key |") : PAGE.index("## During")])) >= json.loads(
            done.stdout
        ).keys() - {"format"}
    else:
        assert re.search(r"runs/(quickstart \(step 2\)|finetuned \(step \d\))", done.stdout)


def test_the_page_shows_commands():
    assert len(COMMANDS) > 8


def test_the_output_on_the_page_has_the_lines_of_the_command():
    shown = PAGE[PAGE.index("prints") : PAGE.index("The interval says")]
    for begin in ("knn top1 ", "knn reads the mean", "images: ", "overlap: none of", "in brackets: ", "kept in "):
        assert re.search(rf"^{begin}", shown, re.MULTILINE)
