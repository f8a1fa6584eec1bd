"""Help and listings answer at once: they import neither torch nor any plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "torchvision", "timm", "numpy", "PIL", "pydantic", "tensorboard", "fsspec", "safetensors")
COMMANDS = [["--help"], ["plugins", "list"], ["plugins", "show", "builtins"], ["recipes", "list"], ["run", "--help"]]
BUDGET = 0.5  # seconds more than a bare interpreter that imports click and pluggy

LOUD = """
raise RuntimeError("imported")
from mim_framework import Loss, hookimpl

class Loud(Loss):
    name = "loud"

@hookimpl
def mim_losses():
    return [Loud]
"""

# Runs the command, then prints which heavy modules it brought in.
WRAPPER = f"""
import sys
from mim_framework.commands.cli import main
main(sys.argv[1:], standalone_mode=False)
print("HEAVY", sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture
def python(install_plugin):
    """Runs an interpreter that sees a plugin which raises on import."""
    site = install_plugin("loud", LOUD, files={"recipes/loud.yaml": "# Loud.\n"})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=True)

    return python


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_listing_imports_nothing_heavy(python, command):
    result = python("-c", WRAPPER, *command)
    assert result.stderr == "HEAVY []\n"
    if command[-1] == "list":
        assert "loud" in result.stdout


def test_a_new_plugin_is_written_without_anything_heavy(python, tmp_path):
    result = python("-c", WRAPPER, "plugins", "new", "dust", "--output", str(tmp_path))
    assert result.stderr == "HEAVY []\n"
    assert (tmp_path / "mim-plugin-dust/pyproject.toml").is_file()


@pytest.mark.slow
def test_listings_answer_within_the_budget(python):
    def fastest(*arguments: str) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            python(*arguments)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    bare = fastest("-c", "import click, pluggy")
    for command in COMMANDS:
        assert fastest("-m", "mim_framework", *command) - bare < BUDGET, command
