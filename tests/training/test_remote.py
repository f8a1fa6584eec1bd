"""Images behind a server that fails: no sample is lost or replaced; a run that cannot go on saves and says so."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from remote import (
    NUM_IMAGES,
    STEPS,
    assert_counted,
    counted,
    hashes,
    nothing_replaced,
    pictures,
    run,
    run_until_it_ends,
    trained,
)
from tiny import RECIPE
from web import FAULTS, Faults, served

from mim_framework.base.errors import BrokenImage, DataError, Unreachable, WorkerKilled
from mim_framework.base.section import Section
from mim_framework.checkpoints.checkpoint import find_latest
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data import stores
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.trainer import Trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def from_disk(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("disk"), str(images))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT", 1e-3)


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(row="12")
@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FAULTS, "all"])
def test_files_that_fail_twice_are_read_at_the_third_try(tmp_path, images, from_disk, impatient, kind: str, figure):
    pytest.importorskip("aiohttp")
    faults = Faults(0.3, times=2, kinds=FAULTS if kind == "all" else (kind,))
    with served(images, faults) as url:
        assert run(tmp_path, url, timeout=0.5) == from_disk
    assert faults.failed.total() >= 10
    assert len(faults.failed) >= 3 if kind == "all" else set(faults.failed) == {kind}
    assert_counted(tmp_path, faults)
    assert nothing_replaced(tmp_path)
    failed = faults.failed.total()
    figure(f"HTTP, 30 % of the files fail twice ({kind}): {failed} faults, 0 samples lost, equal weights")


@pytest.mark.fault(row="12")
@pytest.mark.slow
@pytest.mark.parametrize("retries", [1, 9])
def test_with_independent_faults_a_run_ends_with_the_same_bits_or_stops_saved(
    tmp_path, images, from_disk, impatient, retries: int, figure
):
    """With one further try, about one read in eleven is given up: every stop makes a checkpoint, and it goes on."""
    pytest.importorskip("aiohttp")
    faults = Faults(0.3, independent=True, kinds=("500", "503", "reset", "short"))
    with served(images, faults) as url:
        found, stops = run_until_it_ends(tmp_path, url, faults, retries=retries)
    assert found == from_disk
    assert stops == 0 if retries == 9 else stops > 0
    assert_counted(tmp_path, faults)
    assert counted(tmp_path).get("unreachable", 0) == stops
    failed = faults.failed.total()
    figure(f"HTTP, 30 % of all requests fail, {retries} retries: {failed} faults, {stops} stops, 0 lost, equal weights")


@pytest.mark.fault(row="12")
@pytest.mark.slow
@pytest.mark.parametrize("answers", [30, 61])
def test_a_server_that_stays_away_stops_the_run_after_a_checkpoint(
    tmp_path, images, from_disk, impatient, answers: int, figure
):
    pytest.importorskip("aiohttp")
    with served(images, Faults(gone_after=answers)) as url, pytest.raises(Unreachable, match="does not answer"):
        run(tmp_path, url, retries=2)
    done = answers // 8
    assert find_latest(tmp_path / "tiny" / "checkpoints").step == done
    assert counted(tmp_path) == {"retries": 2, "unreachable": 1}
    assert nothing_replaced(tmp_path)
    with served(images) as url:
        assert run(tmp_path, url, retries=5) == from_disk
    assert counted(tmp_path) == {"retries": 2, "unreachable": 1}
    figure(f"HTTP, gone after {answers} answers: stops saved at step {done} of {STEPS}, later ends with equal weights")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["disk", "server"])
def test_a_run_goes_on_elsewhere_and_its_state_is_the_same(tmp_path, images, from_disk, monkeypatch, first: str):
    """A server tells no sizes, which stand beside the state; what both know is compared."""
    pytest.importorskip("aiohttp")

    def interrupted(*arguments: Any) -> Any:
        if arguments[1] == 7:
            raise KeyboardInterrupt
        return train_step(*arguments)

    train_step = Trainer.train_step
    with served(images) as url:
        roots = [str(images), url] if first == "disk" else [url, str(images)]
        monkeypatch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, roots[0], every=6)
        monkeypatch.setattr(Trainer, "train_step", train_step)
        assert run(tmp_path, roots[1], every=6) == from_disk
    found = sorted((tmp_path / "tiny" / "checkpoints").rglob("manifest.json"))
    beside = [json.loads(each.read_text()).get("beside", {}) for each in found]
    assert [list(each) for each in beside] == ([["sizes"], []] if first == "disk" else [[], ["sizes"]])


# --- the same without a server ---------------------------------------------------------------------------------------


class Distant(Source):
    """32 pictures; `gone` raises for one of them while the file `here` is missing, others are always broken."""

    name = "distant"

    class Config(Section):
        here: str
        """A file; without it the store is unreachable."""
        gone: int = -1
        """Index of the sample that cannot be reached."""
        killed: bool = False
        """Whether the process ends itself there, as if the system had killed it."""
        broken: list[int] = []
        """Indices of broken samples."""

    config: Config

    def __len__(self) -> int:
        return NUM_IMAGES

    def read(self, index: int) -> Sample:
        if index == self.config.gone and not Path(self.config.here).exists():
            if self.config.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Unreachable(f"sample {index} is out of reach")
        if index in self.config.broken:
            raise BrokenImage(f"{index}.png", "truncated", "a half")
        pixels = np.random.default_rng(index).integers(0, 255, (20, 20, 3), np.uint8)
        return Sample(pixels, f"{index}.png")


def distant(folder: Path, *, workers: int = 0, train_options: dict[str, Any] | None = None, **source: Any) -> Path:
    content = {
        **RECIPE,
        "output_dir": str(folder),
        "data": {
            "source": {"type": "distant", "here": str(folder / "here"), **source}, "workers": workers, "max_broken": 0.5
        },
        "train": {**RECIPE["train"], "steps": STEPS, **(train_options or {})},
        "checkpoint": {"every_epochs": 0, "every_steps": 5},
    }  # fmt: skip
    return trained(folder, content, RegistryWith(Distant))


def order(positions: range) -> list[int]:
    from mim_framework.data.order import SampleOrder

    return SampleOrder(0, NUM_IMAGES).indices(positions)


@pytest.mark.parametrize(
    ("position", "options"),
    [(27, {}), (21, {"batch_size": 2}), pytest.param(17, {"batch_size": 4}, marks=pytest.mark.slow)],
)
def test_an_unreachable_sample_saves_the_steps_before_it(tmp_path, position: int, options: dict[str, Any]):
    """In the middle of the first epoch, in the first or a later micro-batch of step 3 or 2."""
    [gone] = order(range(position, position + 1))
    with pytest.raises(Unreachable, match=f"sample {gone} is out of reach"):
        distant(tmp_path / "stopped", gone=gone, train_options=options)
    assert find_latest(tmp_path / "stopped" / "tiny" / "checkpoints").step == position // 8
    (tmp_path / "stopped" / "here").touch()
    distant(tmp_path / "stopped", gone=gone, train_options=options)
    distant(tmp_path / "whole", train_options=options)
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("position", [0, 6])
def test_a_run_that_cannot_read_its_first_step_ends_at_once_and_saves_nothing(tmp_path, position: int):
    [gone] = order(range(position, position + 1))
    with pytest.raises(Unreachable, match=f"sample {gone} is out of reach"):
        distant(tmp_path, gone=gone, train_options={"batch_size": 2})
    assert find_latest(tmp_path / "tiny" / "checkpoints") is None


@pytest.mark.parametrize("position", [26, pytest.param(29, marks=pytest.mark.slow)])
def test_all_ranks_save_when_one_cannot_read(tmp_path, position: int):
    """Step 3 has the positions 24 to 31, the first half of which is rank 0's."""
    [gone] = order(range(position, position + 1))

    def main(rank: int) -> tuple[str, bool]:
        with pytest.raises(DataError) as info:
            distant(tmp_path / "stopped", gone=gone, train_options={"batch_size": 4})
        return str(info.value), info.value.told_by_another_rank

    told = run_ranks(main)
    mine = 0 if position < 28 else 1
    assert told[mine] == (f"sample {gone} is out of reach", False)
    assert told[1 - mine] == ("another rank could not read its images", True)
    assert find_latest(tmp_path / "stopped" / "tiny" / "checkpoints").step == 3
    (tmp_path / "stopped" / "here").touch()
    run_ranks(lambda rank: distant(tmp_path / "stopped", gone=gone, train_options={"batch_size": 4}))
    run_ranks(lambda rank: distant(tmp_path / "whole", train_options={"batch_size": 4}))
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


@pytest.mark.fault(row="e")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_data_worker_is_one_sentence_after_a_checkpoint(tmp_path, workers: int, figure):
    [gone] = order(range(30, 31))
    with pytest.raises(WorkerKilled) as info:
        distant(tmp_path / "stopped", workers=workers, gone=gone, killed=True)
    assert "was killed by SIGKILL, most often by the system when memory runs out" in str(info.value)
    assert f"data.workers={workers // 2} needs less memory" in str(info.value)
    assert multiprocessing.active_children() == []
    assert find_latest(tmp_path / "stopped" / "tiny" / "checkpoints").step >= 1
    (tmp_path / "stopped" / "here").touch()
    distant(tmp_path / "stopped", gone=gone, killed=True)
    distant(tmp_path / "whole")
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
    figure(f"1 of {workers} workers dies while it reads: 1 sentence after a checkpoint, 0 workers left, the same bits")


# --- counts and lists of broken images -------------------------------------------------------------------------------


def listed(folder: Path) -> list[tuple[int, str]]:
    lines = [
        line for path in (folder / "tiny").glob("broken_images.rank*.jsonl") for line in path.read_text().splitlines()
    ]
    return sorted((line["position"], line["name"]) for line in map(json.loads, lines))


@pytest.mark.fault(row="11")
@pytest.mark.parametrize("broken", [[3, 11, 30], list(range(0, NUM_IMAGES, 5))])
def test_counts_and_lists_are_the_same_after_a_stop(tmp_path, broken: list[int], figure):
    [gone] = order(range(60, 61))
    while gone in broken:
        gone += 1
    distant(tmp_path / "whole", broken=broken)
    with pytest.raises(Unreachable):
        distant(tmp_path / "stopped", broken=broken, gone=gone)
    [torn] = (tmp_path / "stopped" / "tiny").glob("broken_images.rank0.jsonl")
    last = find_latest(tmp_path / "stopped" / "tiny" / "checkpoints").step
    later = {"position": last * 8 + 1, "index": 3, "name": "3.png", "cause": "truncated", "detail": "a half"}
    torn.write_text(torn.read_text() + json.dumps(later) + '\n{"posi')  # as after a kill
    (tmp_path / "stopped" / "here").touch()
    distant(tmp_path / "stopped", broken=broken, gone=gone)
    assert listed(tmp_path / "stopped") == listed(tmp_path / "whole")
    assert len(listed(tmp_path / "whole")) > 3
    assert counted(tmp_path / "stopped") == counted(tmp_path / "whole")
    assert counted(tmp_path / "whole") == {"broken/truncated": len(listed(tmp_path / "whole"))}
    number = len(listed(tmp_path / "whole"))
    figure(f"stopped and torn: {number} of {number} readings of {len(broken)} broken images counted and listed once")


@pytest.mark.fault(row="11")
@pytest.mark.parametrize("broken", [[3, 11, 30], list(range(0, NUM_IMAGES, 5))])
def test_the_log_counts_the_broken_images_of_all_ranks(tmp_path, broken: list[int], figure):
    distant(tmp_path / "one", broken=broken)
    run_ranks(lambda rank: distant(tmp_path / "two", broken=broken, train_options={"batch_size": 4}))
    assert counted(tmp_path / "two") == counted(tmp_path / "one")
    assert listed(tmp_path / "two") == listed(tmp_path / "one")
    rows = find_latest(tmp_path / "two" / "tiny" / "checkpoints").state["reading"]
    assert len(rows) == 2
    assert sum(row["broken/truncated"] for row in rows) == len(listed(tmp_path / "one"))
    figure(f"2 ranks: the log and the lists hold {len(listed(tmp_path / 'two'))}, as with one")


def test_counts_survive_a_change_of_the_number_of_ranks(tmp_path):
    [gone] = order(range(60, 61))
    broken = [index for index in (3, 11, 30) if index != gone]
    two = {"batch_size": 4}
    distant(tmp_path / "one", broken=broken)
    with pytest.raises(RuntimeError, match="out of reach|could not read"):
        run_ranks(lambda rank: distant(tmp_path / "two", broken=broken, gone=gone, train_options=two))
    (tmp_path / "two" / "here").touch()
    distant(tmp_path / "two", broken=broken, gone=gone, train_options=two)
    assert counted(tmp_path / "two") == counted(tmp_path / "one")
    assert listed(tmp_path / "two") == listed(tmp_path / "one")


@pytest.mark.parametrize("cause", ["truncated", "of a plugin's own"])
def test_a_list_that_cannot_be_written_is_warned_about_and_the_run_goes_on(tmp_path, caplog, monkeypatch, cause: str):
    monkeypatch.setattr(Distant, "read", lambda self, index: broken_at_three(index, cause))
    (tmp_path / "tiny" / "broken_images.rank0.jsonl").mkdir(parents=True)
    distant(tmp_path)
    assert [each for each in caplog.messages if "broken_images.rank0.jsonl: Is a directory" in each] != []
    name = "broken/truncated" if cause == "truncated" else "broken/other"
    assert counted(tmp_path) == {name: order(range(8 * STEPS)).count(3)}


def broken_at_three(index: int, cause: Any) -> Sample:
    if index == 3:
        raise BrokenImage("3.png", cause, "a half")
    return Sample(torch.full((20, 20, 3), index, dtype=torch.uint8).numpy(), f"{index}.png")
