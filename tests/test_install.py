"""The built wheels in a clean environment, and processes started by a launcher. Slow: these are what a user does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from mim_framework.distributed import free_port

ROOT = Path(__file__).parents[1]
PLUGINS = sorted((ROOT / "plugins").glob("mim-plugin-*"))
pytestmark = pytest.mark.slow
TINY = ["train.epochs=null", "train.steps=2", "train.total_batch_size=4", "evaluate.knn=null", "log.tensorboard=false"]


def call(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MIM_", "VIRTUAL_ENV"))}
    words, environment = [str(word) for word in command], {**clean, **environment}
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for project in (ROOT, *PLUGINS):
        call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project, cwd=folder)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture
def clean(tmp_path) -> Path:
    """A new environment that borrows the dependencies of this one, but none of our own packages."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "mim_" not in entry.name and not entry.name.endswith(".pth"):
            (borrowed / entry.name).symlink_to(entry)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    return tmp_path / "venv"


def install(clean: Path, *wheels: Path) -> None:
    call(clean / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index", *wheels, cwd=clean)


def test_installed_wheels_list_the_plugin_and_train(clean, wheels, tmp_path):
    install(clean, *wheels.values())
    assert "mim_framework" not in call(clean / "bin/python", "-c", "import sys; print(sys.path)", cwd=tmp_path).stdout
    listed = call(clean / "bin/mim", "plugins", "list", cwd=tmp_path).stdout
    assert re.search(r"mae_vit", listed)
    for plugin in PLUGINS:
        assert re.search(rf"^\w+ [\d.]+ \({plugin.name}\)$", listed, re.MULTILINE), plugin.name
    recipes = call(clean / "bin/mim-framework", "recipes", "list", cwd=tmp_path).stdout
    assert "quickstart" in recipes
    for recipe in ROOT.glob("recipes/*.yaml"):
        assert re.search(rf"\b{recipe.stem}\b", recipes), recipe.name
    call(clean / "bin/mim", "run", "quickstart", *TINY, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    assert lines[-1]["loss"] > 0


def test_a_plugin_that_builds_on_another_trains_from_its_wheel(clean, wheels, tmp_path):
    install(clean, *(wheels[name] for name in ("mim_framework", "mim_plugin_mae", "mim_plugin_mff")))
    call(clean / "bin/mim", "run", "mff_quickstart", *TINY, cwd=tmp_path)
    assert (tmp_path / "runs/mff_quickstart/checkpoints/step_00000002/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "encoder", "package"),
    [("quickstart", "mae_vit", "mim-plugin-mae"), ("simmim_quickstart", "simmim_", "mim-plugin-simmim")],
)
def test_without_the_plugin_the_recipe_names_it_in_one_line(clean, wheels, tmp_path, name, encoder, package):
    install(clean, wheels["mim_framework"])
    recipe = (ROOT / "recipes" / f"{name}.yaml").resolve()
    failed = call(clean / "bin/mim", "run", recipe, cwd=tmp_path, check=False)
    assert failed.returncode == 1
    [line] = failed.stderr.strip().splitlines()
    assert encoder in line
    assert f"pip install {package}" in line


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_command_line_starts_two_ranks_and_resumes(tmp_path, mode):
    mim = [sys.executable, "-m", "mim_framework", "run", "quickstart", f"train.distributed={mode}", *TINY]
    call(*mim, "checkpoint.every_steps=1", "--nproc-per-node", "2", cwd=tmp_path)
    lines = (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    environment = json.loads((tmp_path / "runs/quickstart/environment.json").read_text())
    assert environment["world_size"] == 2


def test_torchrun_starts_the_same_run(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mim_framework"]
    call(*torchrun, "run", "quickstart", *TINY, cwd=tmp_path)
    assert (tmp_path / "runs/quickstart/checkpoints/step_00000002/manifest.json").exists()


def test_two_machines_meet_at_an_address(tmp_path):
    """Two launchers on this machine, as they would run on two."""
    port = free_port()
    mim = [sys.executable, "-m", "mim_framework", "run", "quickstart", *TINY, "--nproc-per-node", "1", "--nnodes", "2"]
    options = ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    nodes = [
        subprocess.Popen([*mim, *options, "--node-rank", str(rank)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=240)
        assert node.returncode == 0, errors
    environment = json.loads((tmp_path / "runs/quickstart/environment.json").read_text())
    assert environment["world_size"] == 2
