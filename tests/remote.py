"""Runs of 12 steps on 32 images behind a server, and what they leave, for tests of remote reading. Start at `run`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny import RECIPE
from web import Faults

from mim_framework.base.errors import Unreachable
from mim_framework.checkpoints.checkpoint import find_latest
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.training.trainer import train

NUM_IMAGES, STEPS = 32, 12


def pictures(folder: Path) -> Path:
    """A folder of images of noise."""
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def run(folder: Path, root: str, *, every: int = 100, workers: int = 0, **source: Any) -> dict[str, str]:
    """Hashes of the last checkpoint of a run, by file: tensors and state."""
    content = {
        **RECIPE,
        "output_dir": str(folder),
        "data": {"source": {"type": "folder", "root": root, **source}, "workers": workers},
        "train": {**RECIPE["train"], "steps": STEPS},
        "checkpoint": {"every_epochs": 0, "every_steps": every},
    }
    trained(folder, content, Registry())
    return hashes(folder)


def run_until_it_ends(folder: Path, root: str, faults: Faults, **source: Any) -> tuple[dict[str, str], int]:
    """As `run`, started again whenever the server leaves it; how often that was, since it had something saved.

    A run that has saved nothing begins its log anew, so that faults and stops of before are forgotten here too.
    """
    stops = 0
    for _ in range(100):
        try:
            return run(folder, root, **source), stops
        except Unreachable:
            stops += 1
            assert nothing_replaced(folder)
            if find_latest(folder / "tiny" / "checkpoints") is None:
                stops = 0
                faults.failed.clear()
    raise AssertionError("it does not end")


def trained(folder: Path, content: dict[str, Any], registry: Registry) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"recipe_{os.getpid()}.yaml"
    file.write_text(yaml.safe_dump(content))
    return train(load_recipe(file, (), registry), registry)


def hashes(folder: Path) -> dict[str, str]:
    found = find_latest(folder / "tiny" / "checkpoints")
    files = json.loads((found.path / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def counted(folder: Path) -> dict[str, float]:
    lines = read_metrics(folder / "tiny" / "metrics.jsonl")
    return {name: value for name, value in lines[-1].items() if name in ("retries", "unreachable") or "broken" in name}


def assert_counted(folder: Path, faults: Faults) -> None:
    """Every fault is a retry or gives up, but for resets of kept connections, which aiohttp repeats by itself."""
    counts = counted(folder)
    assert counts.keys() <= {"retries", "unreachable"}
    assert faults.failed.total() - faults.failed["reset"] <= sum(counts.values()) <= faults.failed.total()


def nothing_replaced(folder: Path) -> bool:
    return not list((folder / "tiny").glob("broken_images*"))
