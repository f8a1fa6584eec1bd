"""A step that does not end: the process leaves with status 1, names the rank and leaves its stacks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from mim_framework.contract.world import World
from mim_framework.training import watchdog
from mim_framework.training.watchdog import Watchdog


def status_of_a_child(work: Callable[[], None], said: Path) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hang_at_step_7(folder: Path, world: World = World()) -> Callable[[], None]:
    def work() -> None:
        dog = Watchdog(folder, world, 0.2)
        with dog.watched(), dog.over_a_step(7):
            dog.at("in a wood")
            time.sleep(60)

    return work


def test_a_step_that_hangs_ends_the_process_with_its_place_and_stacks(tmp_path):
    assert status_of_a_child(hang_at_step_7(tmp_path), tmp_path / "said") == 1
    said = (tmp_path / "said").read_text()
    assert said.startswith("mim: a step took longer than train.step_timeout=0.2 seconds: rank 0 hangs at step 7, in a")
    state, _, stacks = (tmp_path / "stacks.rank0.txt").read_text().partition("\n")
    assert json.loads(state)["place"] == "in a wood"
    assert "hang_at_step_7" in stacks or "in work" in stacks


def test_a_rank_without_stacks_is_the_one_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "GATHERING_SECONDS", 0.3)
    assert status_of_a_child(hang_at_step_7(tmp_path, World(0, 2)), tmp_path / "said") == 1
    assert "rank 1 hangs and could not even write its stacks" in (tmp_path / "said").read_text()


def test_of_several_ranks_the_one_that_came_least_far_is_named(tmp_path):
    dog = Watchdog(tmp_path, World(0, 3), 5)
    written = {rank: {"step": 4, "place": f"place {n}", "number": n} for rank, n in ((0, 2), (1, 1), (2, 2))}
    assert "seconds: rank 1 hangs at step 4, place 1." in dog._verdict(written)
    assert "all ranks hang at step 4, place 2." in dog._verdict(dict.fromkeys(range(3), written[0]))


def test_steps_in_time_and_runs_without_a_limit_are_left_alone(tmp_path):
    def work() -> None:
        for seconds in (0.3, None):
            dog = Watchdog(tmp_path, World(), seconds)
            with dog.watched():
                for _ in range(3):
                    with dog.over_a_step(7):
                        time.sleep(0.15)
                time.sleep(0.5)  # beside a step, as in an evaluation
        os._exit(5)

    assert status_of_a_child(work, tmp_path / "said") == 5
    assert list(tmp_path.glob("stacks*")) == []
