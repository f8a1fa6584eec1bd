"""What a run says and keeps when memory runs out, a worker is killed, a disk is full, or somebody wants it to stop."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from faulty import hashes

from mim_framework.base.errors import CheckpointError, TrainingError
from mim_framework.base.files import SideFile
from mim_framework.builtins.losses import MSELoss
from mim_framework.checkpoints import checkpoint
from mim_framework.commands.cli import main
from mim_framework.contract.world import World
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.trainer import Trainer, train
from mim_framework.training.troubles import is_lost_contact, is_out_of_memory


class Interfering(MSELoss):
    """Calls `action` at the forward pass number `at` of training."""

    name = "interfering"
    at, calls, action = -1, 0, staticmethod(lambda: None)
    counts_in_a_buffer = False

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.register_buffer("seen", torch.zeros(()))
        type(self).calls = -1  # the preflight is a call

    def forward(self, pred, target, mask, latent):
        type(self).calls += 1
        if self.counts_in_a_buffer:
            self.seen += 1
        if self.calls - 1 == self.at:
            self.action()
        return super().forward(pred, target, mask, latent)


@pytest.fixture
def interfere(monkeypatch):
    def at(number: int, action, *, counts_in_a_buffer: bool = False) -> None:
        monkeypatch.setattr(Interfering, "at", number)
        monkeypatch.setattr(Interfering, "action", staticmethod(action))
        monkeypatch.setattr(Interfering, "counts_in_a_buffer", counts_in_a_buffer)

    return at


def run(folder: Path, *overrides: str, registry: RegistryWith | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**tiny.RECIPE, "loss": "interfering"}))
    registry = registry or RegistryWith(Interfering)
    return train(load_recipe(folder / "recipe.yaml", [f"output_dir={folder}", *overrides], registry), registry)


def saved(run_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run_dir / "checkpoints")]


def raising(error: BaseException):
    def action():
        raise error

    return action


# --- memory and workers ----------------------------------------------------------------------------------------------


@pytest.mark.fault(row="9")
def test_memory_that_runs_out_is_told_with_the_next_batch_size_and_loses_no_step(tmp_path, interfere, figure):
    interfere(5, lambda: torch.empty(2**46))
    wanted = (
        r"memory of cpu ran out in step 2 \(it tried to allocate \d+ bytes\), with 4 images per rank and micro-batch, "
        r"of which [\d.]+ GB were held at the peak; use train.batch_size=2, which reaches the same total batch in 4 "
        r"accumulation steps\. The same command goes on from step 2, which was saved"
    )
    options = ["train.batch_size=4", "train.steps=4"]
    with pytest.raises(TrainingError, match=wanted):
        run(tmp_path, *options)
    assert saved(tmp_path / "tiny") == [2]
    interfere(-1, lambda: None)
    assert hashes(run(tmp_path, *options)) == hashes(run(tmp_path / "whole", *options))
    figure("a tensor of 70 TB in step 2: 1 sentence with the peak and train.batch_size=2, 0 steps lost, the same bits")


def test_a_state_that_the_failed_step_has_changed_is_not_saved(tmp_path, interfere):
    interfere(2, raising(MemoryError()), counts_in_a_buffer=True)
    with pytest.raises(TrainingError, match=r"use train.batch_size=4, .*goes on from the last checkpoint"):
        run(tmp_path, "train.steps=4", "checkpoint.every_steps=1")
    assert saved(tmp_path / "tiny") == [1, 2]


def test_a_batch_of_one_that_does_not_fit_is_told_so(tmp_path, interfere):
    interfere(0, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")))
    with pytest.raises(TrainingError, match=r"tried to allocate 2\.00 GiB\).*cannot be divided further: use a smaller"):
        run(tmp_path, "train.total_batch_size=1")


def test_failed_allocations_are_known_by_their_kind():
    known = [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), torch.OutOfMemoryError("x")]
    known += [RuntimeError("Caught RuntimeError in DataLoader worker\nDefaultCPUAllocator: can't allocate memory: you")]
    assert all(map(is_out_of_memory, known))
    assert not any(map(is_out_of_memory, [RuntimeError("shapes"), OSError(errno.ENOSPC, "full"), ValueError("x")]))


@pytest.mark.slow
@pytest.mark.parametrize("end", [raising(MemoryError()), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_rank_whose_peer_has_ended_says_so_and_the_run_goes_on_exactly(tmp_path, interfere, end):
    options = ["train.steps=5", "checkpoint.every_steps=2"]

    def main(rank: int) -> None:
        try:
            run(tmp_path, *options)
        except TrainingError as error:
            (tmp_path / f"said{rank}.txt").write_text(f"{error.told_by_another_rank}: {error}")
            os._exit(1)  # as the command does

    interfere(3, lambda: end() if os.environ["RANK"] == "1" else None)
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(main)
    lost = r"False: rank 0 of 2 lost contact with another rank in step 3: .* goes on from the last checkpoint"
    assert re.fullmatch(lost, (tmp_path / "said0.txt").read_text())
    assert saved(tmp_path / "tiny") == [2]
    interfere(-1, lambda: None)
    run_ranks(main)
    run_ranks(lambda rank: run(tmp_path / "whole", *options))
    assert hashes(tmp_path / "tiny") == hashes(tmp_path / "whole/tiny")


def test_failed_collectives_are_known_by_their_kind():
    told = "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:19151: Connection reset by peer"
    assert is_lost_contact(RuntimeError(told))
    assert is_lost_contact(torch.distributed.DistBackendError("NCCL error in: x.cpp, remote process exited"))
    assert not any(map(is_lost_contact, [RuntimeError("shapes"), ConnectionResetError("a server"), ValueError("x")]))


@pytest.mark.fault(row="e")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_data_worker_that_is_killed_is_named_with_the_way_out(tmp_path, figure):
    """In a process of its own: torch's handler of SIGCHLD strikes at whatever line it is."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.RECIPE))
    options = [f"output_dir={tmp_path}", "data.workers=1", "train.steps=100000", "checkpoint.every_steps=2"]
    command = [sys.executable, "-m", "mim_framework", "run", str(tmp_path / "recipe.yaml"), *options]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    log = tmp_path / "tiny/metrics.jsonl"
    give_up = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    [worker] = {child for task in tasks for child in (task / "children").read_text().split()}
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait(60) == 1
    text = (tmp_path / "said").read_text()
    assert re.search(r"mim: a data worker \(process \d+\) was killed by SIGKILL, .*; data\.workers=0 needs less", text)
    assert "Traceback" not in text
    assert saved(tmp_path / "tiny")
    figure("killed by SIGKILL: 1 sentence with the process and data.workers=0, exit 1, checkpoints kept")


def test_other_errors_stay_what_they_are(tmp_path, interfere):
    interfere(1, raising(RuntimeError("a component broke")))
    with pytest.raises(RuntimeError, match="a component broke"):
        run(tmp_path)


@pytest.mark.parametrize(("rank", "says"), [(0, True), (1, False), (4, True), (5, False)])
def test_one_rank_of_each_machine_says_for_what_a_stop_waits_and_for_how_long(rank, says):
    run = SimpleNamespace(world=World(rank, 8, rank % 4), layout=SimpleNamespace(accum_steps=2))
    log = SimpleNamespace(throughput=SimpleNamespace(recent=lambda: {"step_s": 2.0}))
    said = Trainer._until_the_stop(SimpleNamespace(run=run, log=log))
    assert bool(said) == says
    assert not says or said.startswith("stopping at the end of the step, about 2.0 s, with a checkpoint")


# --- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(row="4")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_list_that_cannot_be_written_is_warned_about_once_and_the_run_goes_on(tmp_path, caplog, figure):
    (tmp_path / "list").symlink_to("/dev/full")
    side = SideFile(tmp_path / "list")
    side.append(["a"])
    side.append(["b"])
    assert [record.message for record in caplog.records] == [
        f"cannot write {tmp_path / 'list'}: No space left on device. The run goes on without it"
    ]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/nonfinite.jsonl").symlink_to("/dev/full")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.RECIPE))
    registry = RegistryWith()
    overrides = [f"output_dir={tmp_path}", "optim.lr=1e38", "optim.warmup_epochs=0", "train.max_nonfinite_steps=9"]
    run_dir = train(load_recipe(tmp_path / "recipe.yaml", [*overrides, "train.steps=4"], registry), registry)
    assert read_metrics(run_dir)[-1]["step"] == 4
    figure("nonfinite.jsonl on a full disk: 1 warning, 4 of 4 steps made")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["broken_images.rank0.jsonl", "broken_images.rank1.jsonl", "environment.json"])
def test_a_record_in_whose_place_a_device_without_an_end_lies_does_not_hold_a_run_up(tmp_path, name):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / name).symlink_to("/dev/full")
    assert read_metrics(run(tmp_path, "train.steps=2"))[-1]["step"] == 2


@pytest.mark.fault(row="4")
def test_a_checkpoint_that_cannot_be_written_ends_the_run_or_is_warned_about(tmp_path, monkeypatch, caplog, figure):
    real, full = checkpoint.save_checkpoint, {1, 2}

    def save(folder, step, *more):
        if step in full:
            raise CheckpointError("cannot write checkpoint: the disk is full")
        return real(folder, step, *more)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    options = ["checkpoint.every_steps=1", "train.steps=3"]
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(tmp_path / "stop", *options)
    run_dir = run(tmp_path / "warn", *options, "train.on_save_error=warn")
    assert saved(run_dir) == [3]
    assert caplog.text.count("the disk is full. The run goes on, as train.on_save_error is warn") == 2
    full.add(3)
    with pytest.raises(CheckpointError, match="the disk is full"):  # the last one must be written
        run(tmp_path / "last", *options, "train.on_save_error=warn")
    figure("train.on_save_error=warn: 2 of 2 failed saves told, the run ends with its last one, which must be written")


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_a_signal_says_for_what_it_waits_and_stops_at_the_next_micro_batch(tmp_path, interfere, capfd):
    interfere(13, lambda: os.kill(os.getpid(), signal.SIGINT))  # the second micro-batch of step 3
    options = ["train.batch_size=2", "train.steps=6"]
    with pytest.raises(SystemExit) as left:
        run(tmp_path, *options)
    assert left.value.code == 130
    assert Interfering.calls - 1 == 13  # no other micro-batch was made
    said = capfd.readouterr().err
    assert "mim: SIGINT: stopping at the next micro-batch or the end of the step, about " in said
    assert "stopped by signal after step 3; the same command goes on from here" in said
    assert saved(tmp_path / "tiny") == [3]
    interfere(-1, lambda: None)
    assert hashes(run(tmp_path, *options)) == hashes(run(tmp_path / "whole", *options))


def test_a_step_that_has_changed_a_buffer_is_finished_before_the_stop(tmp_path, interfere):
    interfere(13, lambda: os.kill(os.getpid(), signal.SIGTERM), counts_in_a_buffer=True)
    with pytest.raises(SystemExit):
        run(tmp_path, "train.batch_size=2", "train.steps=6")
    assert saved(tmp_path / "tiny") == [4]


def test_a_second_ctrl_c_ends_with_130_and_one_line(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mim_framework.training.trainer.train", interrupted)
    result = CliRunner().invoke(main, ["run", "quickstart"])
    assert result.exit_code == 130
    assert result.output.splitlines()[-1] == "mim: interrupted"
