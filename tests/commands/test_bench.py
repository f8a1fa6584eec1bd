"""Bench on the quickstart recipe."""

from __future__ import annotations

import re

import pytest
import torch

from mim_framework.commands.bench import run_bench
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime import metrics


@pytest.mark.parametrize("data", ["synthetic", "real"])
def test_bench_prints_rate_split_flops_share_and_memory(data):
    text = run_bench(load_recipe("quickstart", ["train.total_batch_size=8"]), Registry(), data=data, steps=2, warmup=1)
    rate = float(re.search(r"quickstart: ([\d.,]+) images/s", text)[1].replace(",", ""))
    assert rate > 1
    shares = [int(share) for share in re.findall(r"\((\d+)%\)", text)]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert re.search(r"matmul peak [\d.]+ T a second measured, of which \d+% used", text)
    assert re.search(r"peak memory [\d.]+ GiB", text)


def test_bench_takes_the_memory_from_where_the_log_does(monkeypatch):
    monkeypatch.setattr("mim_framework.commands.bench.peak_memory", lambda device: None)
    text = run_bench(load_recipe("quickstart", ["train.total_batch_size=8"]), Registry(), steps=1, warmup=0)
    assert text.endswith("peak memory not known here")
    assert metrics.peak_memory(torch.device("cpu")) > 2**20


def test_bench_of_the_loader_alone():
    text = run_bench(load_recipe("quickstart", ["train.total_batch_size=8"]), Registry(), data="loader-only", steps=2)
    assert re.fullmatch(r"loader only  [\d.,]+ images/s, micro-batch 8", text)
