"""Bench on the quickstart recipe."""

from __future__ import annotations

import re

import pytest
import torch

from mim_framework.commands.bench import Measured, run_bench
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


def test_the_figures_of_a_measured_step_by_hand():
    measured = Measured(
        recipe="mae", batch_size=8, device="cuda", precision="bfloat16", data="synthetic",
        stages={"data": 0.0, "forward": 0.1, "backward": 0.24, "optimizer": 0.06}, first=9.0, fastest=0.3, slowest=0.5,
        flops_per_image=50e9, peak_flops=2e12, peak_memory=3 * 2**29,
    )  # fmt: skip
    assert measured.seconds == pytest.approx(0.4)
    assert measured.images_per_second == pytest.approx(20)
    assert measured.share_of_peak == pytest.approx(0.5)  # 20 times 50 G a second of 2 T
    split = "data 0.0 ms (0%), forward 100.0 ms (25%), backward 240.0 ms (60%), optimizer 60.0 ms (15%)"
    assert str(measured).splitlines() == [
        "mae: 20.0 images/s, micro-batch 8, cuda, bfloat16, data synthetic",
        f"one step    400.0 ms: {split}",
        "FLOPs       50.00 G an image, 1.000 T a second",
        "matmul peak 2.000 T a second measured, of which 50% used",
        "peak memory 1.50 GiB",
    ]
