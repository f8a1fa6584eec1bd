"""Test images that pre-training had are found by their content, reading no more than needed, or said to be unknown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim_framework.base.errors import BrokenImage
from mim_framework.base.section import Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data.sources.folder import FolderSource
from mim_framework.evaluate import overlap
from mim_framework.evaluate.overlap import Overlap, content_of, find_overlap
from mim_framework.evaluate.splits import NumberedAs


class Held(Source):
    """Samples that are given; None is a broken one."""

    name = "held"

    def __init__(self, *data: Any, remote: bool = False) -> None:
        super().__init__(Section())
        self.data, self.remote = data, remote

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Sample:
        if self.data[index] is None:
            raise BrokenImage(str(index), "empty", "no bytes")
        return Sample(self.data[index], f"{self.name}{index}")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for index in range(6):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + index, 4), (index, 0, 0)).save(tmp_path / "train" / "a" / f"{index}.png")
    (tmp_path / "test" / "a").mkdir(parents=True)
    Image.new("RGB", (64, 4), (7, 0, 0)).save(tmp_path / "test" / "a" / "new.png")
    shutil.copy(tmp_path / "train" / "a" / "2.png", tmp_path / "test" / "a" / "copy.png")
    return tmp_path / "train", tmp_path / "test"


def folder(root: Path) -> FolderSource:
    return FolderSource(FolderSource.Config(root=str(root), labels=True))


def test_a_copy_under_another_name_is_found(folders):
    train, test = map(folder, folders)
    found = find_overlap(test, train)
    assert found == Overlap(2, 6, ("a/copy.png",))
    assert str(found) == "1 of the 2 test images are also among those of pre-training: a/copy.png"
    assert find_overlap(NumberedAs(train, test), train) == found
    assert len(find_overlap(train, train).names) == 6


def test_of_files_only_those_are_read_that_have_the_size_of_another(folders, monkeypatch):
    train, test = map(folder, folders)
    Path(folders[0] / "a" / "5.png").write_bytes(b"0" * 5000)
    read = []
    original = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, index: (read.append(index), original(self, index))[1])
    assert find_overlap(test, train).names == ("a/copy.png",)
    same_size = {path.stat().st_size for path in folders[1].rglob("*.png")}
    expected = [path for root in folders for path in root.rglob("*.png") if path.stat().st_size in same_size]
    assert len(read) <= len(expected) < 8


def test_sources_in_memory_are_compared_whole_and_broken_images_are_left_out():
    images = [np.full((2, 2), value, dtype="uint8") for value in range(4)]
    found = find_overlap(Held(images[1], None, images[3].copy()), Held(*images[:2], None, images[3]))
    assert found == Overlap(3, 4, ("held0", "held2"))
    assert (
        str(find_overlap(Held(images[1]), Held(images[0])))
        == "none of the 1 test images is among the 1 of pre-training"
    )


def test_of_many_names_the_first_are_told():
    images = [bytes([value]) for value in range(8)]
    told = str(find_overlap(Held(*images), Held(*images)))
    assert told.endswith("pre-training: held0, held1, held2, held3, held4 and 3 more")


def test_what_is_not_compared_is_told(monkeypatch):
    def told(*sources: Source) -> str:
        found = find_overlap(*sources)
        assert found.names == ()
        return str(found)

    unknown = "whether the 1 test images are among those of pre-training is not known: "
    assert told(Held(b"1"), Held(b"1", remote=True)) == f"{unknown}one of the sources is behind a network"
    assert told(Held({1}), Held({1})) == f"{unknown}samples that hold set cannot be compared"
    monkeypatch.setattr(overlap, "READ_AT_MOST", 1)
    text = f"{unknown}2 would have to be read, which is done up to 1"
    assert told(Held(b"1"), Held(b"1", b"2")) == text


def test_content_is_told_apart_by_values_shape_type_and_page():
    zeros = np.zeros((2, 3), dtype="uint8")
    every = [zeros, zeros.T, zeros.astype("uint16"), zeros + 1, torch.zeros(2, 3), b"", b"0", Image.new("L", (2, 3)),
             Image.new("RGB", (2, 3))]  # fmt: skip
    contents = [content_of(Sample(data, "x")) for data in every]
    contents += [content_of(Sample(b"0", "x", page=1))]
    assert len(set(contents)) == len(every) + 1
    assert content_of(Sample(b"0", "other", label=3)) == content_of(Sample(b"0", "x"))
