"""Measures of features without labels: rank, spectrum, redundancy, spread. Pure functions, each with its source.

Letters for shapes: n images, d channels, m objects of which q views each were taken, B images, T tokens. Spectra are
computed in float64 on the CPU whatever is given, as eigenvalues below 1e-6 of the largest are noise in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mim_framework.runtime.sharding import local

RANKME_EPS = 1e-7
LIDAR_DELTA, LIDAR_EPS = 1e-4, 1e-8
VICREG_EPS = 1e-4
_PAIRS_AT_ONCE = 2**24


@dataclass(frozen=True)
class PowerLaw:
    """eigenvalue ~ rank^-alpha, fitted over the ranks `first` to `last`, counted from 1 and both included."""

    alpha: float
    r2: float
    first: int
    last: int


# --- rank and spectrum -----------------------------------------------------------------------------------------------


def singular_values(x: Tensor) -> Tensor:
    """x (n, d) -> (min(n, d),) float64, descending."""
    return torch.linalg.svdvals(x.detach().double().cpu())


def covariance_eigenvalues(x: Tensor) -> Tensor:
    """Of the covariance of x (n, d) with the divisor n - 1 -> (min(n, d),) float64, descending."""
    return singular_values(centred(x)).square() / (len(x) - 1)


def centred(x: Tensor) -> Tensor:
    """x (n, d) without the mean of every channel, float64 on the CPU."""
    x = x.detach().cpu().double()
    return x - x.mean(0)


def rankme(singular: Tensor, eps: float = RANKME_EPS) -> float:
    """RankMe (Garrido et al. 2023, equation 1): how many directions carry the features, at most min(n, d).

    exp of the entropy of the singular values, which are made to sum to 1 before `eps` is added. Of features that are
    not centred, one common direction can dominate: `singular_values(centred(x))` tells without it.
    """
    return _exp_entropy(_shares(singular) + eps)


def effective_rank(eigenvalues: Tensor) -> float:
    """exp of the entropy of the eigenvalues of a covariance (Roy and Vetterli 2007)."""
    return _exp_entropy(_shares(eigenvalues))


def participation_ratio(eigenvalues: Tensor) -> float:
    """(sum of eigenvalues)^2 / (sum of their squares): smaller than the effective rank."""
    return (_shares(eigenvalues).square().sum().clamp(min=_TINY).reciprocal()).item()


def stable_rank(eigenvalues: Tensor) -> float:
    """Sum of the eigenvalues over the largest one."""
    return (eigenvalues.sum() / eigenvalues.max().clamp(min=_TINY)).item()


def power_law(eigenvalues: Tensor, first: int, last: int) -> PowerLaw:
    """alpha-ReQ (Agrawal et al. 2022): minus the slope of ln eigenvalue over ln rank, by least squares, and its R2.

    The ranks that are fitted decide the value, so it is told only with them.

    Args:
        first: rank that is fitted first, from 1.
        last: the last one.

    Raises:
        ValueError: if there are fewer than two ranks, or one of them has no eigenvalue above 0.
    """
    if not 1 <= first < last <= len(eigenvalues) or not bool((eigenvalues[first - 1 : last] > 0).all()):
        positive = int((eigenvalues > 0).sum())
        raise ValueError(
            f"cannot fit ranks {first} to {last}: {positive} of {len(eigenvalues)} eigenvalues are above 0"
        )
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = eigenvalues[first - 1 : last].double().log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    explained = 1 - (y - slope * x).square().sum() / y.square().sum().clamp(min=_TINY)
    return PowerLaw(-slope.item(), explained.item(), first, last)


def lidar_eigenvalues(views: Tensor, *, delta: float = LIDAR_DELTA) -> Tensor:
    """Views (m, q, d), q of each of m objects -> (d,) float64: eigenvalues of W^-1/2 B W^-1/2, ascending.

    B is the covariance of the m object means (divisor m - 1), W the mean covariance within an object (divisor
    m (q - 1)) plus `delta` on the diagonal (Thilak et al. 2023, section 3).

    Raises:
        ValueError: of fewer than two objects or views.
    """
    m, q = views.shape[:2]
    if m < 2 or q < 2:
        raise ValueError(f"LiDAR needs two objects with two views each, there are {m} with {q}")
    views = views.detach().double().cpu()
    means = views.mean(1)
    between = covariance(means)
    within = (views - means[:, None]).flatten(0, 1)
    within = within.T @ within / (m * (q - 1)) + delta * torch.eye(views.shape[2], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * values.rsqrt() @ vectors.T
    return torch.linalg.eigvalsh(whiten @ between @ whiten).clamp(min=0)


def lidar(eigenvalues: Tensor, eps: float = LIDAR_EPS, *, inside: bool = False) -> float:
    """LiDAR (Thilak et al. 2023): in how many directions objects differ by more than their own views do.

    exp of the entropy of `lidar_eigenvalues`, which are made to sum to 1 before `eps` is added, as in the paper.

    Args:
        inside: add `eps` to the eigenvalues, before that.
    """
    return _exp_entropy(_shares(eigenvalues + eps) if inside else _shares(eigenvalues) + eps)


# --- redundancy and spread of channels -------------------------------------------------------------------------------


def covariance(x: Tensor) -> Tensor:
    """x (n, d) -> (d, d) in its precision, divisor n - 1."""
    x = x - x.mean(0)
    return x.T @ x / (len(x) - 1)


def correlation(cov: Tensor) -> Tensor:
    """Covariance (d, d) -> correlation (d, d); 0 beside channels that are constant."""
    inverse = torch.where(cov.diagonal() > 0, cov.diagonal().rsqrt(), 0)
    return cov * inverse[:, None] * inverse


def off_diagonal(matrix: Tensor) -> Tensor:
    """(d, d) -> (d * (d - 1),), all entries i != j."""
    d = len(matrix)
    return matrix.flatten()[1:].view(d - 1, d + 1)[:, :-1].flatten() if d > 1 else matrix.new_zeros(0)


def vicreg_covariance(cov: Tensor) -> float:
    """Sum of the squared covariances of different channels, over d (Bardes et al. 2022, equation 4)."""
    return (off_diagonal(cov).square().sum() / len(cov)).item()


def vicreg_variance(cov: Tensor) -> float:
    """Mean over channels of how far sqrt(variance + 1e-4) falls short of 1 (Bardes et al. 2022, equation 1)."""
    return (1 - (cov.diagonal() + VICREG_EPS).sqrt()).clamp(min=0).mean().item()


def mean_channel_std(x: Tensor) -> float:
    """Mean over channels of the standard deviation of x (n, d), divisor n - 1."""
    return x.std(0).mean().item()


def relative_std(x: Tensor) -> float:
    """The same of rows of length 1, times sqrt(d): near 1 where features fill the sphere, 0 where all are one."""
    return mean_channel_std(normalize(x, dim=1)) * x.shape[1] ** 0.5


# --- angles ----------------------------------------------------------------------------------------------------------


def mean_cosine(x: Tensor) -> float:
    """Mean cosine between the rows of x (n, d), over all pairs of different ones: 1 where all point one way."""
    unit, n = normalize(x, dim=1), len(x)
    return ((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))).item()


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """ln of the mean over pairs of exp(-t |u_i - u_j|^2), of rows of length 1 (Wang and Isola 2020); 0 on collapse."""
    unit, n = normalize(x, dim=1), len(x)
    total = unit.new_zeros((), dtype=torch.float64)
    for part in unit.split(max(1, _PAIRS_AT_ONCE // n)):
        total += (2 * t * (part @ unit.T - 1)).exp().sum(dtype=torch.float64)  # |u - v|^2 = 2 - 2 u.v
    own = (2 * t * (unit.square().sum(1) - 1)).exp().sum(dtype=torch.float64)
    return ((total - own) / (n * (n - 1))).log().item()


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of x (n, d) and y (n, d), views of the same images, as vectors of length 1."""
    return (normalize(x, dim=1) - normalize(y, dim=1)).square().sum(1).mean().item()


# --- tokens and attention --------------------------------------------------------------------------------------------


def attention_entropy(weights: Tensor) -> Tensor:
    """Attention (B, heads, T, T) -> (B,): entropy over keys, mean over queries and heads, as a share of ln T.

    1 where every token looks at all alike, 0 where each looks at a single one.
    """
    entropy = torch.special.entr(weights.float()).sum(-1)
    return entropy.mean((1, 2)) / max(math.log(weights.shape[-1]), _TINY)


def token_spread(tokens: Tensor) -> dict[str, float]:
    """tokens (B, N, d) -> mean of all values, variance over all tokens, and two shares of that variance.

    `token_variance_within`: what lies within images. `token_content`: what tokens at one position differ by from image
    to image; 0 of tokens that know their position and nothing else.
    """
    tokens = tokens.double()
    total = tokens.flatten(0, 1).var(0, unbiased=False).mean()
    shares = {"token_variance_within": tokens.var(1, unbiased=False), "token_content": tokens.var(0, unbiased=False)}
    return {
        "token_mean": tokens.mean().item(),
        "token_variance": total.item(),
        **{name: (variance.mean() / total.clamp(min=_TINY)).item() for name, variance in shares.items()},
    }


# --- weights and curves ----------------------------------------------------------------------------------------------


def norms_at_start(module: nn.Module) -> list[bool]:
    """Of every normalisation layer, whether its scales are all 1, as where training begins.

    One step of training moves every one of them, so that a network in which all are 1 has learned nothing. Of a sharded
    layer this is said of the part on this rank.
    """
    scales = [each.weight for each in module.modules() if isinstance(each, NORMS) and each.weight is not None]
    return [bool((local(scale) == 1).all()) for scale in scales]


def typical_weight(module: nn.Module) -> float | None:
    """Median over the matrices of a network of the root mean square of their entries; None if it has none.

    Of a sharded matrix this is said of the part on this rank.
    """
    parts = [local(weight).detach().float() for weight in module.parameters() if weight.ndim > 1]
    sizes = [part.square().mean().sqrt().item() for part in parts if part.numel()]
    return median(sizes) if sizes else None


def spikes(values: Sequence[float]) -> list[int]:
    """Where a curve stands above `SPIKE_FACTOR` times the median of the (at most) `SPIKE_WINDOW` values before it.

    The first `SPIKE_LEAST` are never spikes; what is not finite always is.
    """
    found = []
    for place, value in enumerate(values):
        before = [each for each in values[max(0, place - SPIKE_WINDOW) : place] if math.isfinite(each)]
        high = len(before) >= SPIKE_LEAST and value > SPIKE_FACTOR * median(before)
        found += [place] * (high or not math.isfinite(value))
    return found


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
SPIKE_FACTOR, SPIKE_WINDOW, SPIKE_LEAST = 5.0, 20, 4

_TINY = torch.finfo(torch.float64).tiny


def _shares(values: Tensor) -> Tensor:
    """Values that sum to 1; all 0 where they are."""
    values = values.double()
    return values / values.sum().clamp(min=_TINY)


def _exp_entropy(shares: Tensor) -> float:
    return torch.special.entr(shares).sum().exp().item()
