"""Signals to real processes: the launcher, its ranks and their data workers stop with a checkpoint, and say so once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import yaml

from mim_framework.checkpoints import checkpoint
from mim_framework.runtime.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a job in /proc"),
]

STEPS = 80
RECIPE = tiny.RECIPE | {
    "data": {**tiny.RECIPE["data"], "workers": 1},
    "train": {**tiny.RECIPE["train"], "steps": STEPS},
}


@dataclass
class Job:
    """`mim run` on two ranks in a folder."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def dir(self) -> Path:
        return self.folder / "tiny"

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def ranks(self) -> list[int]:
        return [pid for pid in children(self.process.pid) if b"\0run\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def everyone(self) -> list[int]:
        """The launcher, the ranks and all that they started."""
        found = [self.process.pid]
        for pid in found:
            found += children(pid)
        return found

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: (self.dir / "metrics.jsonl").exists() and logged(self.dir) >= step)

    def wait_until(self, there: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 120
        while not there():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < give_up, self.said
            time.sleep(0.02)


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []  # it has ended


def logged(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def saved(run_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run_dir / "checkpoints")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts a job in the background; whatever is left of it is killed at the end."""
    jobs: list[Job] = []

    def started(*overrides: str) -> Job:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        command = [sys.executable, "-m", "mim_framework", "run", "--nproc-per-node", "2", "--output", str(tmp_path)]
        with (tmp_path / "said.txt").open("wb") as file:
            process = subprocess.Popen(
                [*command, "--", str(recipe), *overrides], stdout=file, stderr=file, start_new_session=True
            )
        jobs.append(Job(tmp_path, process))
        return jobs[-1]

    yield started
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if os.fsencode(tmp_path) in command_line.read_bytes():
                os.kill(int(command_line.parent.name), signal.SIGKILL)
    for job in jobs:
        job.process.wait()


def to_the_launcher(job: Job) -> list[int]:
    return [job.process.pid]


def to_the_whole_job(job: Job) -> list[int]:
    return job.everyone()


def to_one_rank(job: Job) -> list[int]:
    return job.ranks()[1:]


@pytest.mark.fault(row="5")
@pytest.mark.parametrize(
    ("number", "receivers"),
    [(signal.SIGTERM, to_the_whole_job), (signal.SIGTERM, to_one_rank), (signal.SIGUSR1, to_the_launcher)],
)
def test_a_stopped_job_saves_says_so_and_resumes(start, number, receivers, figure):
    job = start()
    job.wait_for_step(3)
    everyone = job.everyone()
    assert len(job.ranks()) == 2
    assert len(everyone) >= 5  # the launcher, two ranks, a worker each
    for pid in receivers(job):
        os.kill(pid, number)
    assert job.process.wait(60) == 128 + number, job.said
    assert "Traceback" not in job.said
    [step] = saved(job.dir)
    assert step == logged(job.dir) < STEPS
    assert job.said.count("stopped by signal after step") == 1
    assert [pid for pid in everyone if Path(f"/proc/{pid}").exists()] == []

    again = start()
    assert again.process.wait(120) == 0, again.said
    assert [line["step"] for line in read_metrics(job.dir)] == list(range(1, STEPS + 1))
    to = receivers.__name__.removeprefix("to_").replace("_", " ")
    figure(f"2 ranks, {signal.Signals(number).name} to {to}: 1 checkpoint, 0 of {len(everyone)} processes left")


def test_a_killed_rank_ends_the_job_with_its_name(start):
    job = start()
    job.wait_for_step(3)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.process.wait(60) == 1
    assert "mim: rank 1 ended with exit code -9, killed by SIGKILL" in job.said


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_lives(start):
    first = start("train.steps=100000")
    first.wait_for_step(1)
    second = start("train.steps=100000")
    assert second.process.wait(120) == 1
    assert second.said.count(f"{first.dir} is in use by another run (pid {first.ranks()[0]} on ") == 1
    assert "Traceback" not in second.said
    assert first.process.poll() is None
    for pid in first.everyone():
        os.kill(pid, signal.SIGKILL)
    first.process.wait()
    third = start("train.steps=100000")
    third.wait_until(lambda: "step 1/" in third.said)


def test_what_fails_on_rank_0_is_said_once_and_ends_all(start, tmp_path):
    (tmp_path / "tiny").write_text("")  # where the run directory should be
    job = start()
    assert job.process.wait(120) == 1
    assert job.said.count(f"mim: output_dir {tmp_path}: cannot write {tmp_path / 'tiny'}") == 1
    assert "Traceback" not in job.said
    assert "mim: rank 0 ended with exit code 1; its message is above" in job.said


@pytest.mark.fault(row="c")
def test_ranks_do_not_outlive_a_launcher_that_is_killed(start, figure):
    job = start("train.steps=100000")
    job.wait_for_step(3)
    ranks = job.ranks()
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    killed = time.monotonic()
    give_up = killed + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < give_up, job.said
        time.sleep(0.1)
    gone = time.monotonic() - killed
    [step] = saved(job.dir)
    assert f"stopped by signal after step {step}" in job.said
    assert logged(job.dir) == step
    figure(f"2 of 2 ranks saved and left within {gone:.1f} s")


@pytest.mark.fault(row="10")
@pytest.mark.parametrize("hung", [0, 1])
def test_a_rank_that_hangs_is_named_and_leaves_the_stacks_of_all(start, tmp_path, monkeypatch, hung, figure):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(HANGING.format(rank=hung))
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    job = start("train.step_timeout=4")
    assert job.process.wait(120) == 1, job.said
    assert job.said.count(f"step_timeout=4 seconds: rank {hung} hangs at step 5, phase main, before its first") == 1
    stacks = [(job.dir / f"stacks.rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "a_place_to_hang_in" in stacks[hung]
    assert "a_place_to_hang_in" not in stacks[1 - hung]
    assert "train_step" in stacks[1 - hung]
    figure(f"rank {hung} of 2 hangs: named with its step after train.step_timeout, exit 1, the stacks of 2 of 2 ranks")


HANGING = """
import importlib.abc, importlib.util, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "mim_framework.training.measured" or os.environ.get("RANK") != "{rank}":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        execute = found.loader.exec_module

        def exec_module(module):
            execute(module)
            made, begin = [], module.History.__init__

            def a_place_to_hang_in(history, *args, **options):
                begin(history, *args, **options)
                made.append(1)
                if len(made) == 6:
                    time.sleep(1000)

            module.History.__init__ = a_place_to_hang_in

        found.loader.exec_module = exec_module
        return found

sys.meta_path.insert(0, Finder())
"""
