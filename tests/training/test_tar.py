"""A run on tar shards: that on the folder they were packed from, on any ranks and workers, and after a stop."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remote import NUM_IMAGES, STEPS, counted, hashes, pictures, trained
from tiny import RECIPE

from mim_framework.base.errors import RecipeError, Unreachable
from mim_framework.commands.index import index_shards
from mim_framework.contract.records import Sample
from mim_framework.data.sources.tar import TarSource
from mim_framework.testing import RegistryWith, run_ranks

BROKEN = {"broken/truncated": 4}
"""The one that is cut off, in three epochs, and once more in the place of itself."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pictures(tmp_path_factory.mktemp("images"))
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for first in range(0, NUM_IMAGES, 8):
        with tarfile.open(folder / f"{first:02d}.tar", "w") as tar:
            for number in range(first, first + 8):
                tar.add(images / f"{number:02d}.png", f"{number:02d}.png")
    assert index_shards(str(folder), None, label_key="label", force=False, report=lambda line: None) == 0
    return folder


def run(
    folder: Path, source: dict[str, Any], *, workers: int = 0, ranks: int = 1, order: str = "shuffled"
) -> dict[str, str]:
    """Hashes of the tensors at the end."""
    content = {
        **RECIPE,
        "output_dir": str(folder),
        "data": {"source": source, "workers": workers, "max_broken": 0.5, "order": order, "order_window": 2},
        "train": {**RECIPE["train"], "steps": STEPS, "batch_size": 8 // ranks},
        "checkpoint": {"every_epochs": 0, "every_steps": 5},
    }
    folder.mkdir(exist_ok=True)
    if ranks == 1:
        trained(folder, content, RegistryWith())
    else:
        run_ranks(lambda rank: bool(trained(folder, content, RegistryWith())), ranks)
    return {name: each for name, each in hashes(folder).items() if name.endswith(".safetensors")}


def leaving(error: BaseException, after: int, of: str = "read") -> Callable[[TarSource, int], Sample]:
    """`TarSource.read` that fails for good after so many reads of a process."""
    read, count = getattr(TarSource, of), itertools.count()

    def leaves(source: TarSource, index: int) -> Sample:
        if next(count) >= after:
            raise error
        return read(source, index)

    return leaves


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_shards_train_as_the_folder_does_with_any_workers_and_after_a_stop(tmp_path, images, shards, monkeypatch):
    tar = {"type": "tar", "root": str(shards)}
    expected = run(tmp_path / "folder", {"type": "folder", "root": str(images)})
    assert len(expected) >= 1
    assert run(tmp_path / "tar", tar) == expected
    assert counted(tmp_path / "tar") == counted(tmp_path / "folder") == BROKEN
    assert run(tmp_path / "workers", tar, workers=2) == expected
    with monkeypatch.context() as patched:
        patched.setattr(TarSource, "read", leaving(KeyboardInterrupt(), 8 * 7 + 3))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", tar)
    assert run(tmp_path / "stopped", tar, workers=2) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_shards_train_on_two_ranks_as_a_folder_does(tmp_path, images, shards, monkeypatch):
    tar = {"type": "tar", "root": str(shards)}
    expected = run(tmp_path / "folder", {"type": "folder", "root": str(images)}, ranks=2)
    assert run(tmp_path / "tar", tar, ranks=2) == expected
    assert counted(tmp_path / "tar") == counted(tmp_path / "folder") == BROKEN
    with monkeypatch.context() as patched:
        patched.setattr(TarSource, "read", leaving(Unreachable("out of reach"), 4 * 7 + 1))
        with pytest.raises(RuntimeError, match="out of reach|could not read"):
            run(tmp_path / "stopped", tar, ranks=2)
    assert run(tmp_path / "stopped", tar, workers=2, ranks=2) == expected
    assert counted(tmp_path / "stopped") == BROKEN


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_blocks_train_the_same_with_any_workers_and_after_a_stop(tmp_path, shards, monkeypatch):
    tar = {"type": "tar", "root": str(shards)}
    expected = run(tmp_path / "tar", tar, order="blocks")
    assert run(tmp_path / "workers", tar, order="blocks", workers=2) == expected
    assert run(tmp_path / "shuffled", tar) != expected
    with monkeypatch.context() as patched:
        patched.setattr(TarSource, "_from_block", leaving(KeyboardInterrupt(), 8 * 7 + 3, of="_from_block"))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", tar, order="blocks")
    with pytest.raises(RecipeError, match="data.order: blocks -> shuffled"):
        run(tmp_path / "stopped", tar)
    assert run(tmp_path / "stopped", tar, order="blocks", workers=2) == expected
    two = run(tmp_path / "two", tar, order="blocks", ranks=2)
    assert run(tmp_path / "two_workers", tar, order="blocks", ranks=2, workers=2) == two
