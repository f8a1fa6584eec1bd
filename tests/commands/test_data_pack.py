"""`mim data pack`: its arguments and its lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from click.testing import CliRunner

from mim_framework.base.errors import RecipeError
from mim_framework.commands.cli import main
from mim_framework.commands.data_pack import part_of


def test_the_command_packs_a_source_and_says_what_is_there(tmp_path):
    command = ["--no-plugins", "data", "pack", "{type: digits, split: test}", str(tmp_path / "out"), "--workers", "0"]
    halves = [CliRunner().invoke(main, [*command, "--per-shard", "100", "--shard", f"{i}/2"]) for i in range(2)]
    assert [each.exit_code for each in halves] == [0, 0], halves[0].output
    assert "part 0/2 of digits (split=test) is in " in halves[0].output
    assert "digits (split=test): 359 of 359 images" in halves[1].output
    assert "4 shards, " in halves[1].output
    facts = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert [each["images"] for each in facts["shards"].values()] == [100, 100, 100, 59]
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as file:
        assert file.getnames()[:2] == ["digits/4_000000000.png", "digits/4_000000000.cls"]


@pytest.mark.slow
def test_packing_that_is_killed_ends_like_one_that_is_not(tmp_path):
    command = [sys.executable, "-m", "mim_framework", "--no-plugins", "data", "pack", "digits", "--per-shard", "20"]
    process = subprocess.Popen([*command, str(tmp_path / "killed"), "--workers", "1"], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("*.tar")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ready = len(list((tmp_path / "killed").glob("*.tar")))
    assert 0 < ready < 72, "it was over before it could be killed"
    for name in ("killed", "whole"):
        found = CliRunner().invoke(main, [*command[3:], str(tmp_path / name), "--workers", "0"])
        assert found.exit_code == 0, found.output
    killed, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("killed", "whole")
    )
    assert len(whole) == 74
    assert killed == whole


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "0/0"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="give I/N with I from 0 to N - 1"):
        part_of(text)
    assert part_of("1/2") == (1, 2)
