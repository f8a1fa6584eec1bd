"""Training where the command's means are not there: in a thread, on a system without POSIX signals and locks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny

from mim_framework.recipe.recipe import Recipe
from mim_framework.training.trainer import train


@pytest.mark.parametrize("workers", [0, 1])
def test_training_works_in_a_thread(workers: int, tmp_path: Path) -> None:
    data = {**tiny.RECIPE["data"], "workers": workers}
    recipe = Recipe.model_validate({**tiny.RECIPE, "data": data, "output_dir": str(tmp_path)})
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(train(recipe))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [tmp_path / "tiny"]
    assert (tmp_path / "tiny" / "checkpoints" / "step_00000002").is_dir()


WITHOUT = """
import signal, sys, tempfile
for name in ("SIGUSR1", "SIGHUP", "SIGQUIT", "pthread_sigmask", "SIG_BLOCK", "SIG_UNBLOCK"):
    delattr(signal, name)
import torch, torch.distributed.elastic.multiprocessing  # what Windows has of torch is torch's affair
sys.modules["fcntl"] = sys.modules["resource"] = None
import json
from mim_framework.recipe.recipe import Recipe
from mim_framework.training.trainer import train
import mim_framework.commands.cli, mim_framework.runtime.launch
print(train(Recipe.model_validate(json.loads(sys.argv[1]))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_training_works_without_posix_signals_and_locks(workers: int, tmp_path: Path) -> None:
    data = {**tiny.RECIPE["data"], "workers": workers}
    recipe = json.dumps({**tiny.RECIPE, "data": data, "output_dir": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", WITHOUT, recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this system has no file locks: do not start a second run in" in done.stderr
    assert (tmp_path / "tiny" / "checkpoints" / "step_00000002").is_dir()
