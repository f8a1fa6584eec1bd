"""Several ranks in a test, in a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mim_framework.runtime.launch import free_port

torch.set_num_threads(1)  # before any other use of torch: OpenMP threads do not survive a fork


def run_ranks(function: Callable[[int], Any], world_size: int = 2, timeout: float = 120.0) -> list[Any]:
    """Call `function(rank)` in forked processes that share a gloo group; returns their results in rank order.

    A fork takes 0.2 s where a spawn takes 7, but threads do not survive it: importing this module leaves torch one
    thread, and must come before any other use of torch.

    Raises:
        RuntimeError: with the traceback of the first rank that failed, or if a rank is silent for `timeout` seconds.
    """
    if torch.get_num_threads() != 1:
        raise RuntimeError("run_ranks forks, which needs torch.set_num_threads(1)")
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(function, rank, world_size, port, sender), daemon=False)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return [_result(rank, pipe, timeout) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _result(rank: int, pipe: Any, timeout: float) -> Any:
    if not pipe.poll(timeout):
        raise RuntimeError(f"rank {rank} was silent for {timeout} seconds")
    try:
        succeeded, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if not succeeded:
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


def _rank(function: Callable[[int], Any], rank: int, world_size: int, port: int, sender: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        outcome = (True, function(rank))
    except BaseException:
        outcome = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))  # by value: torch would share memory that dies with this process
    sender.close()
    if outcome[0]:
        dist.barrier()  # gloo aborts now and then if one rank leaves early
        dist.destroy_process_group()
    os._exit(0 if outcome[0] else 1)  # no exit handlers of the forked test runner
