"""The built wheels in a clean environment, and processes started by a launcher. Slow: these are what a user does."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from clean_install import PLUGINS, ROOT, call, install

from mim_framework.runtime.launch import free_port

pytestmark = pytest.mark.slow
TINY = ["train.epochs=null", "train.steps=2", "train.total_batch_size=4", "evaluate=[]", "log.tensorboard=false"]


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
    environment = json.loads((tmp_path / "runs/quickstart/environment.json").read_text())[-1]
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
    environment = json.loads((tmp_path / "runs/quickstart/environment.json").read_text())[-1]
    assert environment["world_size"] == 2
