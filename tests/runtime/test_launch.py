"""Devices, process groups and the launcher: who stops whom, and who says so."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api as launcher

from mim_framework.base.errors import MimError, RecipeError
from mim_framework.commands import cli
from mim_framework.runtime.launch import choose_device, launch, process_group


def test_a_device_that_is_not_there_is_named():
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(MimError, match=r"train.device is 'cuda', but this machine has only"):
            choose_device("cuda")


def test_there_must_be_a_gpu_for_every_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_device("cuda", 1) == torch.device("cuda", 1)
    wanted = r"4 ranks on this machine, but only 2 visible GPUs; use --nproc-per-node 2, or train.device=cpu"
    for local_rank in (2, 3):
        with pytest.raises(MimError, match=wanted) as raised:
            choose_device("auto", local_rank)
        assert raised.value.told_by_another_rank == (local_rank == 3)


def test_a_task_that_sees_its_own_gpu_only_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda", 3) == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mim")  # under torchrun all ranks see the same one
    with pytest.raises(MimError, match="4 ranks on this machine, but only 1 visible GPUs"):
        choose_device("cuda", 3)


def test_a_launcher_that_sets_half_of_the_variables_is_told_the_rest(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    wanted = "RANK and WORLD_SIZE are set, but MASTER_ADDR not. A launcher such as torchrun sets RANK, LOCAL_RANK"
    with pytest.raises(MimError, match=wanted), process_group("cpu"):
        pass


# --- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "wanted"),
    [(None, ["barrier", "destroy"]), (SystemExit(143), ["barrier", "destroy"]), (ValueError("no luck"), [])],
)
def test_a_rank_that_fails_does_not_wait_for_the_others(monkeypatch, end, wanted):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    calls: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))

    def use() -> None:
        with process_group("cpu"):
            if end is not None:
                raise end

    if end is None:
        use()
    else:
        with pytest.raises(type(end)):
            use()
    assert calls == wanted


# --- rank 0 for all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told_by_another_rank", "local_rank", "said"),
    [
        (MimError("no"), False, "1", "mim: no\n"),
        (MimError("no"), True, "0", ""),
        (RecipeError("no"), False, "0", "mim: no\n"),
        (RecipeError("no"), False, "1", ""),
    ],
)
def test_an_error_of_all_ranks_is_printed_by_one(monkeypatch, error, told_by_another_rank, local_rank, said):
    def fail(settings: cli.Settings, *args: object) -> None:
        raise error

    monkeypatch.setattr(cli.Settings, "recipe", fail)
    monkeypatch.setattr(cli, "TELLING_SECONDS", 0.0)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    error.told_by_another_rank = told_by_another_rank
    result = CliRunner().invoke(cli.main, ["run", "any"])
    assert (result.exit_code, result.output) == (1, said)


# --- the launcher ----------------------------------------------------------------------------------------------------


def test_several_nodes_need_a_meeting_point():
    with pytest.raises(MimError, match="--nnodes 2 needs --rdzv-endpoint HOST:PORT"):
        launch([], nproc_per_node=1, nnodes=2)


def fails_with(monkeypatch, error: Exception) -> None:
    """Ranks that end as they would under the agent."""

    def agent(config, entrypoint):
        def start(*arguments):
            raise error

        return start

    monkeypatch.setattr(launcher, "elastic_launch", agent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_the_exit_code_of_the_launcher(monkeypatch, number):
    fails_with(monkeypatch, SignalException("signal", number))
    with pytest.raises(SystemExit) as left:
        launch([], nproc_per_node=2)
    assert left.value.code == 128 + number


@pytest.mark.parametrize("code", [143, 138])
def test_ranks_that_a_signal_stopped_give_the_launcher_their_exit_code(monkeypatch, code):
    failure = ProcessFailure(local_rank=1, pid=os.getpid(), exitcode=code, error_file="none")
    fails_with(monkeypatch, ChildFailedError("mim_framework", {1: failure}))
    with pytest.raises(SystemExit) as left:
        launch([], nproc_per_node=2)
    assert left.value.code == code


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (1, "rank 1 ended with exit code 1; its message is above"),
        (-9, "rank 1 ended with exit code -9, killed by SIGKILL; its message is above"),
    ],
)
def test_a_rank_that_failed_is_named(monkeypatch, code, message):
    failure = ProcessFailure(local_rank=1, pid=os.getpid(), exitcode=code, error_file="none")
    fails_with(monkeypatch, ChildFailedError("mim_framework", {1: failure}))
    with pytest.raises(MimError) as raised:
        launch([], nproc_per_node=2)
    assert str(raised.value) == message


def test_the_launcher_passes_sigusr1_on_and_keeps_what_nohup_ignores(monkeypatch):
    configs = []
    monkeypatch.setattr(launcher, "elastic_launch", lambda config, entrypoint: lambda *args: configs.append(config))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    passed_on = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT]
    before = {number: signal.getsignal(number) for number in passed_on}  # under nohup, or in the background, ignored
    try:
        for number in passed_on:
            signal.signal(number, signal.SIG_DFL)
        launch([], nproc_per_node=2)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        launch([], nproc_per_node=2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    plain, under_nohup = (config.signals_to_handle.split(",") for config in configs)
    assert plain == ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"]
    assert under_nohup == ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
