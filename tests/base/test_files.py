"""Files that are whole or not there, and what a kill leaves is gone with the next call."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mim_framework.base.files import new_folder, replace_file, replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_by_a_kill(folder: Path, kind: str) -> None:
    if kind == "file":
        (folder / ".weights.tmp").write_bytes(b"a half")
    else:
        (folder / ".weights.tmp").mkdir()
        (folder / ".weights.tmp" / ".tmpXyZ").write_bytes(b"of a library")


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("left", ["file", "folder"])
def test_the_next_call_takes_away_what_a_kill_left(tmp_path: Path, left: str, in_folder: bool):
    left_by_a_kill(tmp_path, left)
    with replacing(tmp_path / "weights", in_folder=in_folder) as temporary:
        temporary.write_bytes(b"whole")
        (tmp_path / "another").write_bytes(b"is left alone")
    assert (tmp_path / "weights").read_bytes() == b"whole"
    assert names(tmp_path) == ["another", "weights"]


@pytest.mark.parametrize("in_folder", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, in_folder: bool):
    replace_file(tmp_path / "weights", b"old")

    def half() -> None:
        with replacing(tmp_path / "weights", in_folder=in_folder) as temporary:
            temporary.write_bytes(b"a ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert (tmp_path / "weights").read_bytes() == b"old"
    assert names(tmp_path) == ["weights"]


@pytest.mark.parametrize("left", ["file", "folder"])
def test_a_new_folder_takes_away_what_a_kill_left(tmp_path: Path, left: str):
    left_by_a_kill(tmp_path, left)
    with new_folder(tmp_path / "weights") as temporary:
        (temporary / "a").write_bytes(b"whole")
    assert names(tmp_path) == ["weights"]
    assert names(tmp_path / "weights") == ["a"]


def test_a_link_that_was_left_is_taken_away_and_not_followed(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_bytes(b"kept")
    os.symlink(tmp_path / "folder", tmp_path / ".weights.tmp")
    replace_file(tmp_path / "weights", b"whole")
    assert names(tmp_path) == ["folder", "weights"]
    assert names(tmp_path / "folder") == ["precious"]
