"""docs/features.md is a session that runs: its commands, then its Python, from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mim_framework.commands.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text()


@pytest.fixture
def folder_of_the_page(make_run, tmp_path, monkeypatch) -> Path:
    """What the page names: runs/mae, photos and labelled images."""
    rng = np.random.default_rng(0)
    for name in ("photos/a.png", "photos/b.png", "labelled/cats/0.png", "labelled/dogs/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "runs").mkdir()
    make_run("runs/mae", data={"source": {"type": "folder", "root": str(tmp_path / "photos")}, "workers": 0})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_session_runs(folder_of_the_page, capsys):
    commands = [line.partition("#")[0] for line in re.findall(r"^mim embed .*", PAGE, re.MULTILINE)]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)[1:]
        words[1] = words[1].replace("timm:vit_base_patch16_224.mae", "timm:test_vit,random")  # no internet
        result = CliRunner().invoke(main, [*words, "--workers=0", "--batch-size=512"])
        assert result.exit_code == 0, f"{command}: {result.output}"
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, namespace)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "FrozenEncoder('runs/mae', dim=48, grid=4x4, img_size=32x32)"
    assert printed[0] in PAGE
    assert printed[1:] == ["mae 9 54", "cats", "small 9 0"] or printed[1:] == ["mae 9 54", "dogs", "small 9 0"]
    assert namespace["features"].shape == (2, 48)
    assert namespace["map_of_image"].shape == (4, 4)
