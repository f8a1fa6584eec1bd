"""A run: steps, epochs, batch arithmetic, precision; its directory, who may write to it, and who listens to it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml

from mim_framework.assembly.length import batch_layout, run_length
from mim_framework.base.errors import CheckpointError, DataError, MimError, RecipeError
from mim_framework.base.precision import uses_bfloat16
from mim_framework.checkpoints import checkpoint
from mim_framework.contract.hooks import hookimpl
from mim_framework.contract.world import World
from mim_framework.data.sources.digits import DigitsSource
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.training import TrainSection
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.directory import prepare_directory, sole_run
from mim_framework.training.run import Run
from mim_framework.training.setup import set_up
from mim_framework.training.trainer import Trainer, train


def recipe(**train):
    section = TrainSection(**{"total_batch_size": 64, "epochs": 4, **train})
    return SimpleNamespace(train=section, location=lambda where: f"r.yaml: {where}")


def test_an_epoch_is_the_number_of_whole_batches():
    assert run_length(recipe(), 1281) == (20, 80)
    assert run_length(recipe(epochs=0.5), 640) == (10, 5)
    assert run_length(recipe(epochs=None, steps=7), 640) == (10, 7)
    assert run_length(recipe(epochs=800, total_batch_size=4096), 1_281_167) == (312, 249_600)  # as the official run


def test_a_set_smaller_than_a_batch_has_one_step_an_epoch():
    assert run_length(recipe(), 10) == (1, 4)


def test_the_micro_batch_is_derived_or_checked():
    assert batch_layout(recipe(), 0, 4).batch_size == 16
    layout = batch_layout(recipe(batch_size=4), 1, 2)
    assert (layout.batch_size, layout.accum_steps, layout.rank) == (4, 8, 1)
    with pytest.raises(RecipeError, match=r"64 images do not divide into 3 ranks; use 63, for example"):
        batch_layout(recipe(), 0, 3)


def test_epochs_count_steps_in_the_order_of_the_official_arithmetic():
    run = Run(None, recipe(), *[None] * 5, steps_per_epoch=3, total_steps=12, engine=None)
    assert [run.epoch(index) for index in (0, 1, 3, 5)] == [0.0, 1 / 3, 1.0, 2 / 3 + 1]
    assert run.epochs == 4
    assert [done for done in range(1, 13) if run.due(done, 2)] == [6, 12]
    assert not any(run.due(done, 0) for done in range(1, 13))
    assert [done for done in range(1, 7) if run.due(done, 0.5)] == [2, 4, 6]


def test_precision_is_what_was_asked_for():
    cpu = torch.device("cpu")
    assert uses_bfloat16("bfloat16", cpu)
    assert not uses_bfloat16("float32", cpu)
    assert not uses_bfloat16("auto", torch.device("mps"))


# --- the run directory -----------------------------------------------------------------------------------------------


def tiny_recipe(folder: Path, registry: RegistryWith, *overrides: str):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"recipe_{os.getpid()}.yaml"  # ranks are processes
    file.write_text(yaml.safe_dump(tiny.RECIPE))
    return load_recipe(file, [f"output_dir={folder}", *overrides], registry)


def train_tiny(folder: Path, *overrides: str, registry: RegistryWith | None = None) -> Path:
    registry = registry or RegistryWith()
    return train(tiny_recipe(folder, registry, *overrides), registry)


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json"])
def test_a_crash_while_the_record_is_written_leaves_the_old_one(tmp_path, monkeypatch, name):
    registry = RegistryWith()
    directory = prepare_directory(tiny_recipe(tmp_path, registry), registry, World(), fresh=False)
    before = (directory / name).read_text()

    def crash(self: Path, target: Path) -> None:
        if target.name == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare_directory(tiny_recipe(tmp_path, registry, "seed=5"), registry, World(), fresh=False)
    assert (directory / name).read_text() == before


def test_all_ranks_get_the_error_of_rank_0_that_prepares_the_directory(tmp_path):
    (tmp_path / "tiny").write_text("")

    def rank_main(rank: int):
        registry = RegistryWith()
        with pytest.raises(MimError, match="output_dir .*: cannot write .*tiny: File exists") as raised:
            prepare_directory(tiny_recipe(tmp_path, registry), registry, World(rank, 2), fresh=False)
        return raised.value.told_by_another_rank

    assert run_ranks(rank_main) == [False, True]


def in_a_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked process that then sleeps; returns when it has begun to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(writer, b"ready")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 5) == b"ready"
    os.close(reader)
    return child


def test_a_run_directory_has_one_run_at_a_time_and_is_free_after_a_kill(tmp_path):
    recipe = tiny_recipe(tmp_path, RegistryWith())
    workers = tmp_path / "workers"

    held = sole_run(recipe, World())

    def hold() -> None:
        held.__enter__()
        workers.write_text(str(in_a_child(lambda: None)))  # forked while the lock is held, as data workers are

    child = in_a_child(hold)
    try:
        wanted = rf"tiny is in use by another run \(pid {child} on .*\); wait .* name=.* delete .*run\.lock"
        with pytest.raises(MimError, match=wanted), sole_run(recipe, World()):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with sole_run(recipe, World()):  # although the worker is still there
            assert (tmp_path / "tiny/run.lock").read_text().startswith(f"pid {os.getpid()} on ")
    finally:
        os.kill(int(workers.read_text()), signal.SIGKILL)


def test_a_second_run_in_a_thread_of_the_same_process_is_refused_and_takes_no_lock_away(tmp_path):
    recipe = tiny_recipe(tmp_path, RegistryWith())
    said = []

    def second() -> None:
        try:
            with sole_run(recipe, World()):
                said.append("ran")
        except MimError as error:
            said.append(str(error))

    def try_in_a_thread() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    def in_another_process() -> bytes:
        reader, writer = os.pipe()
        if os.fork() == 0:
            said.clear()
            second()
            os.write(writer, said[0].encode())
            os._exit(0)
        os.close(writer)
        os.wait()
        with os.fdopen(reader, "rb") as file:
            return file.read()

    with sole_run(recipe, World()):
        try_in_a_thread()
        assert b"is in use by another run (pid" in in_another_process()
    try_in_a_thread()
    assert len(said) == 2
    assert said[0].startswith(f"{tmp_path / 'tiny'} is in use by another run of this process; wait until")
    assert said[1] == "ran"


def test_a_file_system_without_locks_is_put_up_with(tmp_path, monkeypatch):
    def no_locks(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with sole_run(tiny_recipe(tmp_path, RegistryWith()), World()):
        pass


# --- resume ----------------------------------------------------------------------------------------------------------


class FewerDigits(DigitsSource):
    """The digits without the last ones."""

    name = "fewer"
    num_missing = 0

    def __len__(self) -> int:
        return super().__len__() - self.num_missing


def test_a_run_is_not_resumed_on_another_number_of_images(tmp_path, monkeypatch):
    registry = RegistryWith(FewerDigits)
    run_dir = train_tiny(tmp_path, "data.source.type=fewer", registry=registry)
    num_images = checkpoint.find_latest(run_dir / "checkpoints").state["num_images"]
    monkeypatch.setattr(FewerDigits, "num_missing", 10)
    change = f"{num_images} images -> {num_images - 10}"
    wanted = rf"data.source has changed since .*: {change}\. .*name=\.\.\. init=.*step_00000002"
    with pytest.raises(DataError, match=wanted):
        train_tiny(tmp_path, "data.source.type=fewer", registry=registry)
    told = train_tiny(tmp_path, "data.source.type=fewer", "name=other", f"init={run_dir}", registry=registry)
    assert read_metrics(told)[-1]["step"] == 2


def start_of(recipe: Recipe, registry: RegistryWith, world: World) -> int:
    """The step from which a rank would go on."""
    directory = partial(prepare_directory, recipe, registry, world, fresh=False)
    trainer = Trainer(set_up(recipe, registry, world, torch.device("cpu"), directory), registry)
    trainer.go_on_from(trainer.checkpoints.newest())
    return trainer.start


def test_only_rank_0_hashes_the_checkpoint(tmp_path):
    run_dir = train_tiny(tmp_path)

    def rank_main(rank: int):
        hashed: list[str] = []
        real = checkpoint._sha256
        checkpoint._sha256 = lambda path: hashed.append(path.name) or real(path)
        registry = RegistryWith()
        recipe = tiny_recipe(tmp_path, registry)
        return start_of(recipe, registry, World(rank, 2)), "model.safetensors" in hashed

    assert run_ranks(rank_main) == [(2, True), (2, False)]
    assert run_dir.is_dir()


def test_a_rank_that_does_not_see_the_checkpoint_names_the_folder(tmp_path):
    train_tiny(tmp_path / "node0")
    (tmp_path / "node1").mkdir()

    def rank_main(rank: int):
        registry = RegistryWith()
        recipe = tiny_recipe(tmp_path / f"node{rank}", registry)
        if rank == 0:
            return start_of(recipe, registry, World(rank, 2))
        with pytest.raises(CheckpointError, match=r"rank 0 resumes from .*node1.*output_dir must be a folder that all"):
            start_of(recipe, registry, World(rank, 2))
        return None

    assert run_ranks(rank_main) == [2, None]


def test_a_checkpoint_that_rank_0_cannot_write_fails_on_all_ranks(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise CheckpointError("cannot write checkpoint: the disk is full")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)

    def rank_main(rank: int):
        with pytest.raises(CheckpointError, match="the disk is full") as raised:
            train_tiny(tmp_path)
        return raised.value.told_by_another_rank

    assert run_ranks(rank_main) == [False, True]


# --- listeners -------------------------------------------------------------------------------------------------------


def test_a_listener_that_fails_is_named_once_and_ends_nothing(tmp_path, caplog):
    registry, told = RegistryWith(), []

    class Faulty:
        @hookimpl
        def mim_run_started(self):
            raise ValueError("no server")

        @hookimpl
        def mim_metrics_logged(self, step):
            raise ValueError("no server")

        @hookimpl
        def mim_checkpoint_saved(self, path):
            raise ValueError("no server")

        @hookimpl
        def mim_run_finished(self, error):
            raise ValueError("no server")

    class Sound:
        @hookimpl
        def mim_metrics_logged(self, run, step):
            told.append((run.dir.name, step))

        @hookimpl
        def mim_run_finished(self, error):
            told.append(error)

    registry.listen(Sound(), name="sound")
    registry.listen(Faulty(), name="faulty")
    run_dir = train_tiny(tmp_path, registry=registry)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]
    assert told == [("tiny", 1), ("tiny", 2), None]
    [record] = [each for each in caplog.records if "faulty" in each.message]
    assert record.message.startswith("plugin 'faulty' failed in mim_run_started: ValueError: no server.")
