"""Our health measures against numbers that two independent float64 implementations of the papers' formulas gave.

Every `eval-health_*.safetensors` in `MIM_PARITY_DIR` is one case; by default those committed beside this file.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from parity.harness import cases
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mim_framework.evaluate.health import measures

CASES = pytest.mark.parametrize("path", cases("eval-health_*.safetensors"), ids=lambda path: path.stem)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative


@cache
def read(path: Path) -> tuple[dict[str, Tensor], dict[str, float], dict]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), json.loads(metadata["metrics"]), json.loads(metadata["config"])


def rank_measures(x: Tensor, wanted: dict[str, float]) -> dict[str, float]:
    """Those whose names say with which eps or over which ranks."""
    found = {}
    singular, eigenvalues = measures.singular_values(x), measures.covariance_eigenvalues(x)
    for name in wanted:
        if match := re.fullmatch(r"rankme(_centred)?_eps(.+)", name):
            values = measures.singular_values(measures.centred(x)) if match[1] else singular
            found[name] = measures.rankme(values, eps=float(match[2]))
        elif match := re.fullmatch(r"alpha(_r2)?_(\d+)_(\d+)", name):
            law = measures.power_law(eigenvalues, int(match[2]), int(match[3]))
            found[name] = law.r2 if match[1] else law.alpha
    return found


def measured(x: Tensor, views: Tensor, wanted: dict[str, float], config: dict) -> dict[str, float]:
    eigenvalues, cov = measures.covariance_eigenvalues(x), measures.covariance(x)
    of_views, eps = measures.lidar_eigenvalues(views, delta=config["delta"]), config["eps"]
    return rank_measures(x, wanted) | {
        "effective_rank_of_covariance": measures.effective_rank(eigenvalues),
        "participation_ratio": measures.participation_ratio(eigenvalues),
        "stable_rank": measures.stable_rank(eigenvalues),
        "mean_abs_offdiag_covariance": measures.off_diagonal(cov).abs().mean().item(),
        "mean_sq_offdiag_covariance": measures.off_diagonal(cov).square().mean().item(),
        "mean_abs_offdiag_correlation": measures.off_diagonal(measures.correlation(cov)).abs().mean().item(),
        "vicreg_covariance_term": measures.vicreg_covariance(cov),
        "vicreg_variance_term": measures.vicreg_variance(cov),
        "mean_channel_std": measures.mean_channel_std(x),
        "uniformity_t2": measures.uniformity(x),
        "mean_cosine": measures.mean_cosine(x),
        "std_of_normalised_times_sqrt_d": measures.relative_std(x),
        "alignment_first_two_views": measures.alignment(views[:, 0], views[:, 1]),
        "lidar_eps_after": measures.lidar(of_views, eps),
        "lidar_eps_inside": measures.lidar(of_views, eps, inside=True),
        "lidar_top_eigenvalue": of_views.max().item(),
        "lidar_eigenvalue_sum": of_views.sum().item(),
    }


@CASES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_number_is_the_papers(path, dtype):
    tensors, wanted, config = read(path)
    ours = measured(tensors["input/features"].to(dtype), tensors["input/views"].to(dtype), wanted, config)
    assert ours.keys() == wanted.keys()
    assert ours == {name: pytest.approx(value, rel=TOLERANCE[dtype]) for name, value in wanted.items()}


@CASES
def test_spectra_are_those_of_the_file(path):
    tensors, _, _ = read(path)
    x = tensors["input/features"]
    for name, ours in {
        "singular_values": measures.singular_values(x), "covariance_eigenvalues": measures.covariance_eigenvalues(x)
    }.items():  # fmt: skip
        official = tensors[f"out/{name}"]
        assert (ours - official).abs().max() < 1e-12 * official.max(), name


@CASES
def test_a_slip_in_a_definition_would_be_seen(path):
    """Negative controls: each of these is a plausible misreading, and each is further off than the tolerance."""
    tensors, wanted, _ = read(path)
    x, views = tensors["input/features"], tensors["input/views"]
    singular, eigenvalues = measures.singular_values(x), measures.covariance_eigenvalues(x)
    of_views = measures.lidar_eigenvalues(views)
    as_another_object = views.roll(1, 0)
    shuffled = torch.cat([views[:, :1], as_another_object[:, 1:]], dim=1)
    (alpha, first, last) = next(
        (name, int(match[1]), int(match[2])) for name in wanted if (match := re.fullmatch(r"alpha_(\d+)_(\d+)", name))
    )
    slips = {
        "rankme_eps1e-7": [
            measures.rankme(singular, eps=1e-5),
            measures.rankme(singular.square(), eps=1e-7),
            measures.rankme(measures.singular_values(measures.centred(x)), eps=1e-7),
        ],
        "effective_rank_of_covariance": [measures.effective_rank(eigenvalues.sqrt())],
        alpha: [measures.power_law(eigenvalues, *ranks).alpha for ranks in ((first + 1, last), (first, last - 1))],
        "mean_channel_std": [x.std(0, unbiased=False).mean().item()],
        "vicreg_variance_term": [measures.vicreg_variance(measures.covariance(x) / 2)],
        "uniformity_t2": [measures.uniformity(x, t=1.0)],
        "lidar_eps_after": [measures.lidar(measures.lidar_eigenvalues(shuffled)), measures.lidar(of_views.sqrt())],
        "lidar_top_eigenvalue": [measures.lidar_eigenvalues(views, delta=1e-3).max().item()],
    }  # fmt: skip
    for name, values in slips.items():
        for value in values:
            assert value != pytest.approx(wanted[name], rel=1e-6), name
