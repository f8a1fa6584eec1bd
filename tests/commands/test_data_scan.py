"""`mim data scan`: its files and lines, wherever it was killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from mim_framework.base.errors import DataError, MimError, RecipeError
from mim_framework.commands.cli import main
from mim_framework.commands.data_scan import run_scan
from mim_framework.commands.image_progress import ImageProgress
from mim_framework.registry.registry import Registry

REGISTRY = Registry(only=())
EVIL = "<img src=x onerror=alert(1)>\x1b[31m.png"


def make_images(root, count=6):
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number:04}.png")
    return root


def scanned(source, output, **options):
    return run_scan(str(source), REGISTRY, output=output, workers=0, report=lambda line: None, **options)


def test_the_command_writes_a_page_and_numbers_and_says_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_images(tmp_path / "my photos")
    (root / "cat" / "broken.jpg").write_bytes(b"nothing")
    result = CliRunner().invoke(main, ["--no-plugins", "data", "scan", str(root), "--labels", "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert f"{root}: 7 images, 6 can be read" in result.output
    assert "broken: 1 (1 not_an_image): cat/broken.jpg" in result.output
    assert "2 classes, of 2 (dog) to 4 images (cat)" in result.output
    assert "  views:\n    mean: [0." in result.output
    assert "7/7 images  1 broken" in result.output
    folder = tmp_path / "scans" / "my_photos"
    assert sorted(path.name for path in folder.iterdir()) == ["scan.html", "scan.json"]
    facts = json.loads((folder / "scan.json").read_text())
    assert facts["classes"] == {"cat": 4, "dog": 2}
    assert len(facts["recipe"]["views"]["mean"]) == 3


def test_a_source_may_be_a_name_or_a_mapping(tmp_path):
    facts = scanned("{type: digits, split: test}", tmp_path / "digits").facts
    assert (facts["source"], facts["images"], sum(facts["classes"].values())) == ("digits (split=test)", 359, 359)
    with pytest.raises(RecipeError, match="SOURCE nowhere: there is no such folder"):
        scanned("nowhere", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"SOURCE\.root: '.*/none' does not exist"):
        scanned(f"{tmp_path}/none", tmp_path / "none")


def test_names_of_files_are_shown_and_do_nothing(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / EVIL.replace("/", "")).write_bytes(b"nothing")
    lines = scanned(root, tmp_path / "out").lines
    html = (tmp_path / "out" / "scan.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;\\x1b[31m.png" in html
    assert "<img" not in html
    assert "\x1b" not in html
    assert "default-src 'none'" in html
    assert any("broken: 1" in line for line in lines)


def test_the_page_holds_what_the_numbers_hold(tmp_path):
    root = make_images(tmp_path / "images")
    (root / "cat" / "copy.png").write_bytes((root / "dog" / "0000.png").read_bytes())
    Image.new("L", (40, 20), 7).save(root / "cat" / "flat.png")
    scanned(root, tmp_path / "out")
    html = (tmp_path / "out" / "scan.html").read_text()
    for text in ("cat/copy.png", "cat/flat.png", "8x8", "40x20", "mean: [0.", "PNG", "grey, 8 bit", "Short side"):
        assert text in html
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")


def test_a_scan_of_other_images_is_not_replaced(tmp_path):
    scanned("digits", tmp_path / "out")
    scanned("digits", tmp_path / "out")
    with pytest.raises(MimError, match=r"holds the scan of digits, not of .*images; name another folder with --output"):
        scanned(make_images(tmp_path / "images"), tmp_path / "out")
    (tmp_path / "out" / "scan.json").write_text("[1]")
    with pytest.raises(MimError, match="is no report of a scan"):
        scanned("digits", tmp_path / "out")


def test_no_secret_of_an_address_is_in_the_files(tmp_path):
    from fsspec.implementations.memory import MemoryFileSystem

    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    MemoryFileSystem().pipe("/somebody:hunter2@scanned/a.png", picture.getvalue())
    written = scanned("memory://somebody:hunter2@scanned", tmp_path / "out")
    assert written.facts["source"] == "memory://***@scanned"
    assert all("hunter2" not in path.read_text() for path in (tmp_path / "out").iterdir())


def test_progress_is_a_line_now_and_then_or_a_bar():
    plain, clock = io.StringIO(), iter([0.0, 10.0, 31.0, 40.0])
    with ImageProgress(console=Console(file=plain, soft_wrap=True), clock=lambda: next(clock)) as progress:
        for done in (64, 96, 374, 400):
            progress(done, 400, "0 broken")
    assert plain.getvalue().splitlines() == [
        "374/400 images  0 broken  10.0 images/s  ETA 0:00:03",
        "400/400 images  0 broken  8.4 images/s  ETA 0:00:00",
    ]
    terminal = io.StringIO()
    with ImageProgress(console=Console(file=terminal, force_terminal=True, width=100)) as progress:
        progress(5, 10, "0 broken")
        progress(10, 10, "0 broken")
    assert "10/10" in terminal.getvalue()


@pytest.mark.slow
def test_a_scan_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    root = make_images(tmp_path / "images", count=1500)
    whole = scanned(root, tmp_path / "whole").facts
    output, kills = tmp_path / "killed", 0
    command = [sys.executable, "-m", "mim_framework", "--no-plugins", "data", "scan", str(root), "--workers", "1"]
    lengths = []
    while kills < 2:
        process = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.DEVNULL)
        journal = output / ".scan.jsonl"
        before = lengths[-1] if lengths else 0
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > before + 2000):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        lengths.append(journal.stat().st_size)
    assert kills, "the scan was over before it could be killed"
    facts = scanned(root, output).facts
    assert facts == whole
    assert sorted(path.name for path in output.iterdir()) == ["scan.html", "scan.json"]
