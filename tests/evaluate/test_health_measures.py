"""What health measures say of features that are simple enough to know the answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mim_framework.evaluate.health import measures

EQUAL = torch.eye(4).repeat(2, 1)  # four directions, equally strong
ONE_WAY = torch.full((6, 3), 2.0)
ZERO = torch.zeros(5, 3)


def test_rank_is_the_number_of_equally_strong_directions():
    assert measures.rankme(measures.singular_values(EQUAL)) == pytest.approx(4, rel=1e-5)
    three = measures.covariance_eigenvalues(EQUAL)  # the mean takes one of the four directions away
    assert three.tolist() == pytest.approx([2 / 7] * 3 + [0], abs=1e-12)
    for rank in (measures.effective_rank, measures.participation_ratio, measures.stable_rank):
        assert rank(three) == pytest.approx(3)


def test_one_common_direction_has_rank_one_and_nothing_without_it():
    assert measures.rankme(measures.singular_values(ONE_WAY)) == pytest.approx(1, abs=1e-4)
    assert measures.effective_rank(measures.covariance_eigenvalues(ONE_WAY)) == pytest.approx(1, abs=1e-9)


def test_features_that_are_all_zero_give_finite_numbers():
    singular, eigenvalues = measures.singular_values(ZERO), measures.covariance_eigenvalues(ZERO)
    numbers = [measures.rankme(singular), measures.effective_rank(eigenvalues), measures.stable_rank(eigenvalues)]
    numbers += [measures.mean_cosine(ZERO), measures.relative_std(ZERO), measures.uniformity(ZERO)]
    assert all(math.isfinite(number) for number in numbers)


def test_a_power_law_is_found_over_the_ranks_that_are_named():
    ranks = torch.arange(1, 21, dtype=torch.float64)
    eigenvalues = ranks**-1.5
    eigenvalues[15:] = 1e-9  # a tail of noise
    law = measures.power_law(eigenvalues, 2, 15)
    assert (law.alpha, law.r2, law.first, law.last) == (pytest.approx(1.5), pytest.approx(1), 2, 15)
    assert measures.power_law(eigenvalues, 2, 20).r2 < 0.9


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 3), (1, 5), (1, 4)])
def test_ranks_without_an_eigenvalue_cannot_be_fitted(first, last):
    with pytest.raises(ValueError, match=rf"cannot fit ranks {first} to {last}: 3 of 4 eigenvalues are above 0"):
        measures.power_law(torch.tensor([3.0, 2.0, 1.0, 0.0]), first, last)


def test_lidar_counts_directions_in_which_objects_differ_and_views_do_not():
    objects = torch.cat([torch.eye(3), -torch.eye(3)])[:, None]
    noise = torch.tensor([-1.0, 1.0])[None, :, None] * 1e-3
    eigenvalues = measures.lidar_eigenvalues(objects + noise)
    assert measures.lidar(eigenvalues) == pytest.approx(3, rel=0.1)
    with pytest.raises(ValueError, match="two objects with two views each, there are 6 with 1"):
        measures.lidar_eigenvalues(objects)


def test_redundancy_by_hand():
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    cov = measures.covariance(x)
    assert cov.tolist() == [[2, 4], [4, 8]]
    assert measures.off_diagonal(cov).tolist() == [4, 4]
    assert measures.off_diagonal(torch.arange(9).view(3, 3)).tolist() == [1, 2, 3, 5, 6, 7]
    assert measures.correlation(cov).tolist() == [[pytest.approx(1)] * 2] * 2
    assert measures.vicreg_covariance(cov) == 16
    assert measures.vicreg_variance(cov) == 0
    assert measures.vicreg_variance(torch.zeros(2, 2)) == pytest.approx(0.99)
    assert measures.correlation(torch.tensor([[0.0, 0.0], [0.0, 4.0]])).tolist() == [[0, 0], [0, 1]]


def test_angles_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])  # cosines 0, -1, 0 and squared distances 2, 4, 2
    assert measures.mean_cosine(x) == pytest.approx(-1 / 3)
    assert measures.uniformity(x) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3), rel=1e-6)
    assert measures.mean_cosine(ONE_WAY) == pytest.approx(1)
    assert measures.uniformity(ONE_WAY) == pytest.approx(0, abs=1e-6)
    assert measures.alignment(x, 5 * x) == 0
    assert measures.alignment(x, -x) == 4
    assert measures.relative_std(ONE_WAY) == 0


def test_uniformity_in_parts_is_that_of_all_pairs(monkeypatch):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    whole = measures.uniformity(x)
    monkeypatch.setattr(measures, "_PAIRS_AT_ONCE", 70)
    assert measures.uniformity(x) == pytest.approx(whole, rel=1e-6)


def test_entropy_of_attention_is_a_share_of_the_largest():
    even, single = torch.full((1, 1, 4, 4), 0.25), torch.eye(4)[None, None]
    assert measures.attention_entropy(torch.cat([even, single])).tolist() == pytest.approx([1, 0])
    assert measures.attention_entropy(torch.cat([even, single], dim=1)).tolist() == [0.5]


def test_spread_of_tokens_by_hand():
    spread = {"token_mean": 1, "token_variance": 1}
    of_positions = torch.tensor([[[0.0], [2.0]], [[0.0], [2.0]]])
    assert measures.token_spread(of_positions) == {**spread, "token_variance_within": 1, "token_content": 0}
    of_images = of_positions.transpose(0, 1)
    assert measures.token_spread(of_images) == {**spread, "token_variance_within": 0, "token_content": 1}


def test_a_network_that_never_moved_is_known_by_the_scales_of_its_norms():
    network = nn.Sequential(
        nn.LayerNorm(2), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2, elementwise_affine=False)
    )
    assert measures.norms_at_start(network) == [True, True]
    torch.nn.init.constant_(network[2].weight, 1 + 1e-6)
    assert measures.norms_at_start(network) == [True, False]
    assert measures.norms_at_start(nn.Linear(2, 2)) == []


def test_the_typical_weight_is_that_of_the_middle_matrix():
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    for layer, value in zip(network, (1.0, -3.0, 9.0), strict=True):
        torch.nn.init.constant_(layer.weight, value)
    assert measures.typical_weight(network) == 3
    assert measures.typical_weight(nn.LayerNorm(2)) is None


def test_spikes_stand_far_above_the_values_before_them():
    assert measures.spikes([9.0, 1.0, 1.0, 1.0, 4.9, 5.1, 1.0, math.inf, 1.0]) == [5, 7]
    assert measures.spikes([1.0, 9.0, 1.0, 9.0]) == []
    assert measures.spikes([math.nan]) == [0]
