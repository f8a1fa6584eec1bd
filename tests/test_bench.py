"""Cost, check and bench on the quickstart recipe."""

from __future__ import annotations

import re

import pytest
import torch

from mim_framework.bench import run_bench
from mim_framework.check import report
from mim_framework.cost import matmul_peak, measure_cost
from mim_framework.plugins import Registry
from mim_framework.recipe import load_recipe


def test_cost_of_vit_base_matches_the_fact_sheet():
    """9.78 G multiply-adds an image forward, of which we save the prediction head and part of a block."""
    cost = measure_cost(load_recipe("mae", ["data.source=digits"]), Registry())
    assert cost.parameters == {"encoder": 85_798_656 - 197 * 768, "heads": 26_109_184 - 197 * 512}  # tables are buffers
    assert 0.96 < cost.forward_flops / (2 * 9.78e9) < 1.0
    assert 2.9 < cost.train_flops / cost.forward_flops < 3.05
    assert (cost.tokens, cost.positions) == (49, 196)


def test_check_reports_model_batch_and_length():
    text = report(load_recipe("quickstart", ["train.batch_size=16"]), Registry())
    assert "64 images a step = 16 x 1 ranks x 4 accumulation steps" in text
    assert "16 of 64 reach the encoder" in text
    assert "22 an epoch" in text


@pytest.mark.parametrize("data", ["synthetic", "real"])
def test_bench_prints_rate_split_flops_share_and_memory(data):
    text = run_bench(load_recipe("quickstart", ["train.total_batch_size=8"]), Registry(), data=data, steps=2, warmup=1)
    rate = float(re.search(r"quickstart: ([\d.,]+) images/s", text)[1].replace(",", ""))
    assert rate > 1
    shares = [int(share) for share in re.findall(r"\((\d+)%\)", text)]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert re.search(r"matmul peak [\d.]+ T a second measured, of which \d+% used", text)
    assert re.search(r"peak memory [\d.]+ GiB", text)


def test_bench_of_the_loader_alone():
    text = run_bench(load_recipe("quickstart", ["train.total_batch_size=8"]), Registry(), data="loader-only", steps=2)
    assert re.fullmatch(r"loader only  [\d.,]+ images/s, micro-batch 8", text)


def test_matmul_peak_is_of_this_machine():
    assert matmul_peak(torch.device("cpu"), torch.float32, seconds=0.1) > 1e8
