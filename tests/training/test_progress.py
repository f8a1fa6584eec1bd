"""What the console shows on a terminal, in a log file and on other ranks."""

from __future__ import annotations

import io
from datetime import timedelta
from types import SimpleNamespace

import pytest
from rich.console import Console

from mim_framework.training.progress import Progress, summary

SPEED = {"images_per_s": 812.4, "step_s": 0.5, "wait_share": 0.034}
THROUGHPUT = SimpleNamespace(recent=lambda: SPEED, eta=lambda remaining: timedelta(seconds=remaining))


def a_run(rank: int = 0) -> SimpleNamespace:
    return SimpleNamespace(total_steps=5, world=SimpleNamespace(is_main=rank == 0))


def a_console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, markup=False, highlight=False, width=120)


def show(console: Console, *, rank: int = 0, seconds_per_step: float = 0.0) -> str:
    now = [0.0]
    with Progress(a_run(rank), start=2, console=console, clock=lambda: now[0]) as progress:
        for done in (3, 4, 5):
            now[0] += seconds_per_step
            progress.update(done, {"loss": 1 / done, "grad_norm": 2.0}, lr={"lr": 1.5e-4}, throughput=THROUGHPUT)
            if done == 4:
                progress.note("step 4: kNN top-1 91.5 % [of 360]")
    return console.file.getvalue()


def test_the_summary_names_losses_rates_speed_and_time_left():
    measured = {"loss": 0.43211, "loss/main": 0.4, "grad_norm": 3.0, "lr": 1.5e-4}
    assert summary(measured, SPEED, timedelta(seconds=723)) == (
        "loss 0.4321  lr 1.50e-04  812 images/s  data wait 3 %  ETA 0:12:03"
    )
    phases = {"masker/loss": 1.0, "main/loss": float("nan"), "lr/main": 1.0, "lr/masker": 0.1}
    assert summary(phases, {}, None) == "masker/loss 1.0000  main/loss nan  lr/main 1.00e+00  lr/masker 1.00e-01"
    assert "2.8 images/s" in summary({}, {**SPEED, "images_per_s": 2.8}, None)


def test_a_log_file_gets_the_first_and_the_last_step_and_notes():
    assert show(a_console(terminal=False)).splitlines() == [
        "step 3/5  loss 0.3333  lr 1.50e-04  812 images/s  data wait 3 %  ETA 0:00:02",
        "step 4: kNN top-1 91.5 % [of 360]",
        "step 5/5  loss 0.2000  lr 1.50e-04  812 images/s  data wait 3 %  ETA 0:00:00",
    ]


def test_a_log_file_gets_a_line_every_ten_seconds():
    lines = show(a_console(terminal=False), seconds_per_step=10.0).splitlines()
    assert [line.split()[1] for line in lines] == ["3/5", "4/5", "4:", "5/5"]


def test_a_terminal_gets_a_bar_with_the_note_above_it():
    shown = show(a_console(terminal=True), seconds_per_step=1.0)
    assert "step 4: kNN top-1 91.5 % [of 360]" in shown
    assert "step 5/5" in shown.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert "ETA 0:00:00" in shown
    assert "━" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(terminal):
    assert show(a_console(terminal), rank=1) == ""
