"""A checkpoint is whole or not there, whatever happens; what is loaded is bit for bit what was saved."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints import checkpoint
from mim_framework.checkpoints.checkpoint import (
    CheckpointSection,
    find_latest,
    list_checkpoints,
    load,
    load_weights,
    prune,
    save_checkpoint,
)

STATE = {"window": {"loss": 0.1}, "nonfinite_in_a_row": 0, "text": "é"}


def groups(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((3, 4), value)}, "optimizer.main": {"weight|step": torch.tensor(value)}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_as_it_was_saved(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {
        "bfloat16": torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7, dtype=torch.int32),
        "empty": torch.zeros(0, 5),
        "transposed": base.t(),
        "row": base[1],
        "tied": base,
        "tied_too": base,
        "parameter": torch.nn.Parameter(torch.tensor([0.1])),
        "shared": torch.tensor([3.0]).share_memory_(),
    }
    path = save_checkpoint(tmp_path / "checkpoints", 1000, {"model": saved, "teachers": {}}, STATE)

    found = load(path)
    assert path == tmp_path / "checkpoints" / "step_00001000"
    assert (found.step, found.state, found.path) == (1000, STATE, path)
    loaded = found.tensors("model")
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    assert found.tensors("teachers") == {}
    assert found.tensors("optimizer.main") == {}


def test_the_files_are_safetensors_json_and_a_manifest_of_them(tmp_path):
    path = save_checkpoint(tmp_path, 5, groups(), STATE)
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.main.safetensors", "state.json"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 5)
    assert manifest["files"]["model.safetensors"]["bytes"] == (path / "model.safetensors").stat().st_size
    assert manifest["files"]["model.safetensors"]["tensors"] == 1
    assert len(manifest["files"]["state.json"]["sha256"]) == 64


def test_a_group_that_cannot_be_a_file_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"group '\.\./model' cannot be a file name"):
        save_checkpoint(tmp_path, 1, {"../model": {}}, {})


# --- killed ----------------------------------------------------------------------------------------------------------


def save_and_be_killed(folder: Path, step: int, line: int) -> bool:
    """Save in a forked child that kills itself before the n-th line of checkpoint.py; True if it got to the end."""

    def trace(frame, event, argument):
        nonlocal line
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            line -= 1
            if line < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    child = os.fork()
    if child == 0:
        sys.settrace(trace)
        save_checkpoint(folder, step, groups(float(step)), STATE)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_a_save_killed_at_any_line_leaves_the_step_before_or_the_whole_new_one(tmp_path):
    save_checkpoint(tmp_path, 1, groups(1.0), STATE)
    line, finished, outcomes = 0, False, set()
    while not finished:
        finished = save_and_be_killed(tmp_path, 2, line)
        found = find_latest(tmp_path)
        assert torch.equal(found.tensors("model")["weight"], torch.full((3, 4), float(found.step)))
        assert len(names(tmp_path)) <= 3  # at most one temporary folder, however often it was killed
        outcomes.add(found.step)
        if found.step == 2 and not finished:  # killed after the rename: the step is whole, take it away and go on
            assert names(tmp_path) == ["step_00000001", "step_00000002"]
            checkpoint.shutil.rmtree(tmp_path / "step_00000002")
        line += 2
    assert line > 40
    assert outcomes == {1, 2}
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_a_killed_run_left_is_removed_by_the_next_save(tmp_path):
    leftover = tmp_path / ".step_00000007.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half a file")
    assert find_latest(tmp_path) is None
    save_checkpoint(tmp_path, 8, groups(), STATE)
    assert names(tmp_path) == ["step_00000008"]


# --- damaged ---------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def zero_fill(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, zero_fill, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.main.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_step_before_is_used(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, groups(float(step)), STATE)
    file = tmp_path / "step_00000002" / name
    damage(file)
    warnings = []

    found = find_latest(tmp_path, warnings.append)

    assert found.step == 1
    assert found.tensors("model")["weight"][0, 0] == 1.0
    assert len(warnings) == 1
    assert str(file) in warnings[0]
    assert "trying the checkpoint before it" in warnings[0]
    with pytest.raises(CheckpointError, match=r"is damaged|cannot be read: No such file"):
        load(file.parent)


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"model": {}}, {})
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        manifest.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            load(path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_begin_anew(tmp_path):
    truncate(save_checkpoint(tmp_path, 1, groups(), STATE) / "state.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*state\.json is damaged"):
        find_latest(tmp_path, lambda text: None)


def test_a_newer_format_and_foreign_files_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, groups(), STATE)

    def forge(**changes: object) -> None:
        content = {"format": 1, "step": 1, "files": {}, **changes}
        content["sha256"] = checkpoint._content_hash(content)
        (path / "manifest.json").write_text(json.dumps(content))

    forge(format=2, shards=[])
    with pytest.raises(CheckpointError, match="has format 2; this version reads format 1"):
        load(path)
    for files in ({"../../secret": {"bytes": 1, "sha256": ""}}, {"model.safetensors": {"bytes": "many"}}, []):
        forge(files=files)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            load(path)


# --- full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["save_file", "flush", "_sha256"])
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, 1, groups(), STATE)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, fail)
        with pytest.raises(CheckpointError, match=r"step_00000002: .*No space left on device.*Earlier checkpoints"):
            save_checkpoint(tmp_path, 2, groups(), STATE)
    assert names(tmp_path) == ["step_00000001"]
    assert find_latest(tmp_path).step == 1
    assert save_checkpoint(tmp_path, 2, groups(), STATE).exists()


def test_a_disk_that_is_really_full_leaks_no_byte(tmp_path):
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    try:
        save_checkpoint(tmp_path / "checkpoints", 1, {"model": {"weight": torch.ones(100_000)}}, STATE)
        free = os.statvfs(tmp_path).f_bavail
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_checkpoint(tmp_path / "checkpoints", 2, {"model": {"weight": torch.ones(200_000)}}, STATE)
        assert os.statvfs(tmp_path).f_bavail == free
        assert find_latest(tmp_path / "checkpoints").step == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_state_that_json_cannot_hold_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 1, groups(), {"bad": torch.ones(1)})
    assert names(tmp_path) == []


# --- never overwritten, retention ------------------------------------------------------------------------------------


def test_saving_the_same_step_again_keeps_the_checkpoint_that_is_there(tmp_path):
    path = save_checkpoint(tmp_path, 1, groups(), STATE)
    inode = (path / "model.safetensors").stat().st_ino
    assert save_checkpoint(tmp_path, 1, groups(), STATE) == path
    assert (path / "model.safetensors").stat().st_ino == inode
    assert names(tmp_path) == ["step_00000001"]


def test_a_damaged_or_abandoned_step_is_set_aside_and_not_overwritten(tmp_path, caplog):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, groups(float(step)), STATE)
    truncate(tmp_path / "step_00000002" / "state.json")

    save_checkpoint(tmp_path, 2, groups(22.0), STATE)  # the run went on from step 1

    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000002.aside", "step_00000003.aside"]
    assert find_latest(tmp_path).tensors("model")["weight"][0, 0] == 22.0
    assert load(tmp_path / "step_00000003.aside").tensors("model")["weight"][0, 0] == 3.0
    assert "set aside" in caplog.text


def test_the_newest_are_kept_and_those_on_a_multiple_of_the_epochs(tmp_path):
    for step in range(10, 110, 10):
        (tmp_path / f"step_{step:08d}").mkdir()
    prune(tmp_path, CheckpointSection(keep=2, keep_every_epochs=1.5), steps_per_epoch=20)
    assert names(tmp_path) == ["step_00000030", "step_00000060", "step_00000090", "step_00000100"]
    prune(tmp_path, CheckpointSection(keep=1), steps_per_epoch=20)
    assert names(tmp_path) == ["step_00000100"]


def test_a_checkpoint_that_cannot_be_deleted_is_warned_about(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, groups(), STATE)

    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", fail)
    prune(tmp_path, CheckpointSection(keep=1), steps_per_epoch=1)
    assert "cannot delete the old checkpoint" in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]


def test_steps_are_ordered_by_number_and_other_files_are_ignored(tmp_path):
    assert list_checkpoints(tmp_path / "missing") == []
    for name in ("step_123456789", "step_00000009", ".step_00000001.tmp", "step_00000002.aside", "notes.txt"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_123456789"]


# --- weights by path -------------------------------------------------------------------------------------------------


def test_weights_come_from_a_run_a_checkpoint_or_a_file(tmp_path):
    for step in (1, 2):
        path = save_checkpoint(tmp_path / "checkpoints", step, groups(float(step)), STATE)
    assert load_weights(tmp_path)["weight"][0, 0] == 2.0
    assert load_weights(tmp_path / "checkpoints" / "step_00000001")["weight"][0, 0] == 1.0
    assert load_weights(path / "model.safetensors")["weight"][0, 0] == 2.0


def test_weights_that_are_not_there_are_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist; give a run directory"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_weights(tmp_path)
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickle\.pth cannot be read as safetensors"):
        load_weights(tmp_path / "pickle.pth")


@pytest.mark.parametrize("beside", [{"sizes": "ab"}, {"sizes": "c", "place": "here"}])
def test_what_stands_beside_the_state_is_kept_and_makes_no_other_step(tmp_path, beside: dict[str, str]):
    path = save_checkpoint(tmp_path, 8, groups(), STATE, beside)
    assert (load(path).state, load(path).beside) == (STATE, beside)
    files = json.loads((path / "manifest.json").read_text())["files"]
    save_checkpoint(tmp_path / "elsewhere", 8, groups(), STATE)
    elsewhere = json.loads((tmp_path / "elsewhere" / path.name / "manifest.json").read_text())["files"]
    assert files == elsewhere
    assert save_checkpoint(tmp_path, 8, groups(), STATE, {}) == path
    assert load(path).beside == beside
    assert names(tmp_path) == ["elsewhere", "step_00000008"]  # nothing was set aside
