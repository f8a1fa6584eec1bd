"""The script that measures on a GPU, rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_parts
import pytest
from gpu import environment_of, failures, row, run_part, table
from gpu_parts import CHECK, PARTS, REHEARSAL, Failed

SCRIPT = Path(gpu.__file__).with_suffix(".sh")
MACHINE = {"device": "CPU", "cpus": 2, "torch": "2.14", "python": "3.11", "commit": None}
STEP = {
    "precision": "bfloat16", "batch_size": 256, "images_per_second": 5120.0, "seconds": 0.05, "first": 31.0,
    "fastest": 0.045, "slowest": 0.06, "share_of_peak": 0.405, "peak_memory": 3 * 2**33,
}  # fmt: skip


def start(folder: Path, *options: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess:
    command = [str(SCRIPT), *options]
    settings = {**os.environ, "PYTHON": python, **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=300)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
def test_a_rehearsal_measures_every_part_on_the_cpu(tmp_path):
    result = start(tmp_path, "--rehearse", "--output", "a folder")  # relative to where it is called
    report = report_of(tmp_path / "a folder")
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(report["parts"]) == ["check", "tests", "mae_eager", "mae_compiled", "losses"]
    assert failures(report) == {}
    figures = {name: part["figures"] for name, part in report["parts"].items()}
    assert figures["tests"]["failed"] == 0
    assert figures["tests"]["passed"] + figures["tests"]["skipped"] >= 5
    for name in ("mae_eager", "mae_compiled"):
        step = figures[name]
        assert step["batch_size"] == 2
        assert step["images_per_second"] == pytest.approx(2 / step["seconds"])
        assert 0 < step["fastest"] <= step["slowest"]
        assert min(step["first"], step["share_of_peak"], step["flops_per_image"], step["peak_memory"]) > 0
    assert len(figures["losses"]["cpu"]) == 20
    assert figures["losses"]["cpu"] == figures["losses"]["device"]  # of the CPU twice
    assert figures["losses"]["cpu"][0] > figures["losses"]["cpu"][-1] > 0
    written = (tmp_path / "a folder/gpu.md").read_text()
    assert written.startswith("A rehearsal")
    assert written.count("| MAE ViT-B/16") == 2
    assert written in result.stdout


@pytest.mark.slow
def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ImportError('broken on purpose')\n")
    result = start(
        tmp_path, "--rehearse", "--only", "losses", "tests", "--output", str(tmp_path), PYTHONPATH=str(tmp_path)
    )
    parts = report_of(tmp_path)["parts"]
    assert result.returncode == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        "check": "passed", "tests": "failed", "losses": "passed",
    }  # fmt: skip
    assert parts["tests"]["error"] == "pytest ended with status 1 before it ran a test"
    assert "- **tests failed**: pytest ended with status 1" in (tmp_path / "gpu.md").read_text()
    assert "broken on purpose" in (tmp_path / "gpu.log").read_text()


@pytest.mark.slow
def test_without_a_gpu_nothing_but_the_check_runs(tmp_path):
    result = start(tmp_path, "--output", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    parts = report_of(tmp_path)["parts"]
    assert list(parts) == ["check"]
    assert "GPU" in parts["check"]["error"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    result = start(tmp_path, "--rehearse", "--output", "file/results")
    assert result.returncode == 1
    assert result.stderr.startswith(f"gpu.sh: cannot write to {tmp_path}/file/results: Not a directory; choose another")


def test_without_a_python_that_has_torch_the_script_says_where_it_looked(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to("/usr/bin/dirname")
    (tools / "bash").symlink_to("/bin/bash")
    away = tmp_path / "benchmarks/gpu.sh"  # a checkout without .venv
    away.parent.mkdir()
    away.write_text(SCRIPT.read_text())
    environment = {"PATH": str(tools), "PYTHON": "/nowhere/python"}
    result = subprocess.run(["/bin/bash", str(away)], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "no Python of at least 3.11 with torch in $PYTHON, $VIRTUAL_ENV, .venv or PATH" in result.stderr


def test_all_limits_together_are_under_six_minutes():
    assert CHECK.seconds + sum(part.seconds for part in PARTS.values()) <= gpu.TOTAL_SECONDS < 360


def outcome_of(folder: Path, code: str, limit: float = 30.0) -> dict[str, Any]:
    result = folder / "result.json"
    with (folder / "log").open("w") as log:
        return run_part([sys.executable, "-c", code, str(result)], result, limit, dict(os.environ), folder, log)


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_at_its_limit_with_what_it_started(tmp_path):
    child = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    outcome = outcome_of(tmp_path, child, limit=2.0)
    assert outcome["status"] == "failed"
    assert outcome["error"] == "not done after 2 s"
    assert 2 <= outcome["seconds"] < 12
    pid = int((tmp_path / "log").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} still runs")


def test_a_part_that_dies_without_a_word_is_reported(tmp_path):
    outcome = outcome_of(tmp_path, "import os; os.abort()")
    assert outcome["error"] == "ended with status -6; gpu.log says more"


def test_what_does_not_fit_into_the_time_is_not_begun(tmp_path):
    assert outcome_of(tmp_path, "raise SystemExit(7)", limit=0.5)["error"] == "no time was left"


def test_a_part_runs_alone_and_with_the_packages_of_this_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("PYTHONPATH", "/yours")
    environment = environment_of(tmp_path, rehearse=True)
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(gpu_parts.ROOT)
    assert paths[-2:] == [str(tmp_path / "site"), "/yours"]
    assert "RANK" not in environment
    assert "CUDA_VISIBLE_DEVICES" in environment


def test_the_row_of_a_step_by_hand():
    assert row(PARTS["mae_eager"], STEP) == (
        "| MAE ViT-B/16, eager | bfloat16 | 256 | 5,120.0 | 50.0 (45.0 to 60.0) | 31.0 s | 40.5% | 24.00 GiB |"
    )


def test_the_table_says_what_failed_and_keeps_what_was_found():
    passed = {"status": "passed", "seconds": 3.0}
    losses = {"recipe": "r", "cpu": [1.0, 2.0], "largest_difference": 0.5, "tolerance": 1e-4}
    parts = {
        "check": {**passed, "figures": MACHINE},
        "tests": {"status": "failed", "seconds": 100.0, "error": "not done after 100 s"},
        "mae_compiled": {**passed, "figures": STEP},
        "losses": {"status": "failed", "seconds": 2.0, "error": "losses\ndiffer", "figures": losses},
    }
    written = table({"date": "2026-01-02", "rehearsal": False, "seconds": 200.0, "parts": parts}).splitlines()
    assert written == [
        "Machine: CPU, 2 CPUs; torch 2.14, Python 3.11; 2026-01-02, commit not known. All parts together took 200 s.",
        "",
        "| step | precision | images | images/s | ms a step | first step | of the matmul peak | peak memory |",
        "|---|---|---|---|---|---|---|---|",
        row(PARTS["mae_compiled"], STEP),
        "",
        "- 2 losses of r in float32, CPU against GPU: they differ by at most 5.0e-01 of their value; 1e-04 is allowed.",
        "- **tests failed**: not done after 100 s",
        "- **losses failed**: losses differ",
    ]


@pytest.mark.parametrize("last", [1.001, float("nan")])
def test_losses_that_differ_fail_with_their_numbers(monkeypatch, last):
    found = {"cpu": [2.0] * 20, "cuda": [2.0] * 19 + [2.0 * last]}
    monkeypatch.setattr(gpu_parts, "_losses", lambda device, scale: found[device])
    with pytest.raises(Failed, match="losses differ by .* of their value, more than 1e-04") as error:
        gpu_parts.losses(gpu_parts.FULL)
    assert error.value.figures["cpu"] == found["cpu"]


@pytest.mark.slow
def test_a_batch_that_does_not_fit_gives_way_to_a_smaller_one(monkeypatch):
    import torch

    tried = []

    def full_memory(recipe, registry, **options):
        tried.append(recipe.train.batch_size)
        raise torch.OutOfMemoryError

    monkeypatch.setattr("mim_framework.commands.bench.measure_step", full_memory)
    scale = gpu_parts.Scale("cpu", (4, 2), steps=1, warmup=0, overrides=REHEARSAL.overrides)
    with pytest.raises(Failed, match="not even 2 images fit into the memory"):
        gpu_parts.mae_eager(scale)
    assert tried == [4, 2]
