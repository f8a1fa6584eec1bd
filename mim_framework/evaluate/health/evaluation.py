"""The evaluation `health`: whether a run goes well, without labels. Start at `Health.__call__`.

Its numbers are curves of one run and never a ranking of methods: docs/health.md says what each means, and
`verdicts` what follows from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.base.text import plain_logger
from mim_framework.contract.evaluation import Evaluation, Method, Subject, check_features
from mim_framework.contract.records import Ask
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.base import evaluation_mode
from mim_framework.evaluate.health import loss, measures
from mim_framework.evaluate.health.passes import a_choice, chunks, encoded, gathered, kept_aside, summed

logger = plain_logger(__name__)

AT_ONCE = 64
"""Views of a forward pass; where attention is handed out, a quarter of it."""
LEAST_RANKS = 5
"""So many eigenvalues a power law is fitted to at least."""
SMALLEST_EIGENVALUE = 1e-9
"""Share of the largest eigenvalue below which others are rounding."""


def _ranks(ranks: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= ranks[0] <= ranks[1] - LEAST_RANKS + 1:
        raise ValueError(f"must be [first, last] with {LEAST_RANKS} ranks at least, counted from 1, got {list(ranks)}")
    return ranks


class Health(Evaluation):
    """Whether a run goes well, without labels: rank and spectrum of features, attention, loss on images kept aside.

    Curves of one run. Between methods these numbers say nothing: SimMIM's features fill few directions and fine-tune
    as well as others.
    """

    name = "health"
    needs = frozenset()
    of_pixels = False

    class Config(Section):
        pool: Literal["mean", "cls"] = "mean"
        """Feature of an image: the mean of its patch tokens, or the class token."""
        max_images: int = Field(4096, ge=2)
        """Images whose features are looked at; of a larger set, a fixed random choice. RankMe is at most this number
        and at most the width, and settles only with several times as many images as the width."""
        alpha_ranks: Annotated[tuple[int, int], AfterValidator(_ranks)] = (11, 100)
        """First and last eigenvalue that alpha is fitted to, counted from 1; the last is lowered where there are fewer.
        The range decides the value, so that it is logged with it."""
        lidar_images: int = Field(100, ge=0)
        """Images whose views are compared for LiDAR; 0 leaves it out. The paper takes 1,000."""
        lidar_views: int = Field(10, ge=2)
        """Views of each of these, with the crops and colours of training. The paper takes 50."""
        token_images: int = Field(64, gt=0)
        """Images whose tokens and attention are looked at."""
        loss_images: int = Field(512, ge=0)
        """Images kept aside on which the loss is measured under fixed masks; 0 leaves it out."""

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        self._told: set[str] = set()

    def check(self, encoder: EncoderSpec) -> None:
        check_features(encoder, self.config.pool)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        numbers: dict[str, float] = {}
        with _settled(subject.method):
            for part in (self._features, self._lidar, self._tokens, self._attention, self._loss, self._weights):
                numbers |= part(subject)
        return numbers

    def _features(self, subject: Subject) -> dict[str, float]:
        c, split = self.config, kept_aside(subject)
        x = subject.features(split, pool=c.pool, limit=c.max_images, labelled=False).x.float().cpu()
        if len(x) < 2:
            raise DataError(f"evaluation 'health' needs two images, split '{split}' has {len(x)} that can be read")
        law = fitted(measures.covariance_eigenvalues(x), c.alpha_ranks)
        if law is None:
            self._leave_out(subject, "alpha", f"fewer than {LEAST_RANKS} eigenvalues from rank {c.alpha_ranks[0]} on")
        return {"images": float(len(x)), **of_features(x), **of_law(law)}

    def _lidar(self, subject: Subject) -> dict[str, float]:
        """Views of an image follow from its place and their number, so that they are the same at every step."""
        count, num_views, split = self.config.lidar_images, self.config.lidar_views, kept_aside(subject)
        if not count:
            return {}
        places, found = a_choice(subject.source(split), count), []
        at_once = max(1, AT_ONCE // num_views)
        for chunk in chunks(subject, split, places, views=num_views, at_once=at_once):
            with subject.frozen():
                features = self._pooled(subject, chunk.batch).unflatten(0, (-1, num_views))
            found.append(features[: chunk.images])
        views = gathered(found, at_once + subject.views.batch_multiple, subject)
        if len(views) < 2:
            self._leave_out(subject, "lidar", "fewer than two images can be read")
            return {}
        eigenvalues = measures.lidar_eigenvalues(views)
        return {
            "lidar": measures.lidar(eigenvalues),
            "lidar_eps_inside": measures.lidar(eigenvalues, inside=True),
            "alignment": measures.alignment(views[:, 0], views[:, 1]),
        }

    def _pooled(self, subject: Subject, batch: dict[str, Tensor]) -> Tensor:
        latent = encoded(subject, batch)
        return (latent.prefix[:, 0] if self.config.pool == "cls" else latent.tokens.mean(1)).float()

    def _tokens(self, subject: Subject) -> dict[str, float]:
        split, limit = kept_aside(subject), self.config.token_images
        return measures.token_spread(subject.features(split, pool="tokens", limit=limit, labelled=False).x.cpu())

    def _attention(self, subject: Subject) -> dict[str, float]:
        blocks, split = sorted(subject.spec.offers.attn), kept_aside(subject)
        if not blocks:
            self._leave_out(subject, "attention_entropy", "the encoder does not hand out its attention")
            return {}
        total = torch.zeros(len(blocks) + 1, dtype=torch.float64)
        places = a_choice(subject.source(split), self.config.token_images)
        for chunk in chunks(subject, split, places, views=0, at_once=AT_ONCE // 4):
            with subject.frozen():
                attention = encoded(subject, chunk.batch, Ask(attn=frozenset(blocks))).attn
            own = [measures.attention_entropy(attention[block])[: chunk.images].sum().item() for block in blocks]
            total += torch.tensor([*own, chunk.images], dtype=torch.float64)
        *entropies, images = summed(total, subject).tolist()
        return {f"attention_entropy/{i}": each / images for i, each in zip(blocks, entropies, strict=True) if images}

    def _loss(self, subject: Subject) -> dict[str, float]:
        method, count = subject.method, self.config.loss_images
        if not count:
            return {}
        if method is None or method.beside:
            why = (
                f"the method reads {', '.join(sorted(method.beside))} beside images of training"
                if method
                else NO_METHOD
            )
            self._leave_out(subject, "loss", why)
            return {}
        with subject.frozen():
            found = loss.of(subject, method, count)
        for what, why in found.left_out.items():
            self._leave_out(subject, what, why)
        return found.numbers

    def _weights(self, subject: Subject) -> dict[str, float]:
        """What has not moved since training began, and how the gradient went."""
        method, numbers = subject.method, {}
        if method is None:
            return {}
        teachers = {f"teacher/{name}": network for name, network in method.teachers.items()}
        for name, network in {"encoder": subject.encoder, **teachers}.items():
            moved = torch.tensor([not at_start for at_start in measures.norms_at_start(network)])
            if len(moved):
                moved = summed(moved.double(), subject) > 0
                numbers[f"norms_at_start/{name}"] = 1 - moved.double().mean().item()
            else:
                self._leave_out(subject, f"norms_at_start/{name}", "it has no normalisation layer with scales")
        if (size := subject.world.share(measures.typical_weight(subject.encoder))) is not None:
            numbers["typical_weight"] = size
        curves = subject.world.on_main(lambda: gradient_norms(method.history())) or []
        return {**numbers, "grad_norm_spikes": float(subject.world.share(sum(map(len, map(measures.spikes, curves)))))}

    def _leave_out(self, subject: Subject, what: str, why: str) -> None:
        """Said once."""
        if what not in self._told and subject.world.is_main:
            logger.warning(f"evaluation 'health' leaves out {what}: {why}")
        self._told.add(what)


NO_METHOD = "only the encoder is here; `mim eval health RUN --report` opens the method that trained it too"


@contextmanager
def _settled(method: Method | None) -> Iterator[None]:
    """The whole method in evaluation mode, and its buffers as they were afterwards: running statistics, codebooks."""
    if method is None:
        yield
        return
    buffers = {name: buffer.clone() for name, buffer in method.objective.named_buffers()}
    try:
        with evaluation_mode(method.objective):
            yield
    finally:
        for name, buffer in method.objective.named_buffers():
            buffer.copy_(buffers[name])


def of_features(x: Tensor) -> dict[str, float]:
    """The numbers of pooled features (n, D), n >= 2, that need nothing but them; names as in docs/health.md."""
    eigenvalues, cov = measures.covariance_eigenvalues(x), measures.covariance(x.double().cpu())
    return {
        "rankme": measures.rankme(measures.singular_values(x)),
        "rankme_centred": measures.rankme(measures.singular_values(measures.centred(x))),
        "effective_rank": measures.effective_rank(eigenvalues),
        "participation_ratio": measures.participation_ratio(eigenvalues),
        "stable_rank": measures.stable_rank(eigenvalues),
        "mean_cosine": measures.mean_cosine(x),
        "relative_std": measures.relative_std(x),
        "uniformity": measures.uniformity(x),
        "channel_std": measures.mean_channel_std(x),
        "covariance_abs": _mean(measures.off_diagonal(cov).abs()),
        "covariance_squared": _mean(measures.off_diagonal(cov).square()),
        "correlation_abs": _mean(measures.off_diagonal(measures.correlation(cov)).abs()),
        "vicreg_covariance": measures.vicreg_covariance(cov),
        "vicreg_variance": measures.vicreg_variance(cov),
    }


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0


def fitted(eigenvalues: Tensor, ranks: tuple[int, int]) -> measures.PowerLaw | None:
    """The power law over the ranks from first to last, without those that are rounding; None if too few are left."""
    first, last = ranks
    last = min(last, int((eigenvalues > SMALLEST_EIGENVALUE * eigenvalues.max()).sum()))
    return measures.power_law(eigenvalues, first, last) if last - first + 1 >= LEAST_RANKS else None


def of_law(law: measures.PowerLaw | None) -> dict[str, float]:
    """A fitted alpha with its quality, and the ranks without which it says nothing."""
    if law is None:
        return {}
    return {"alpha": law.alpha, "alpha_r2": law.r2, "alpha_first": float(law.first), "alpha_last": float(law.last)}


def gradient_norms(lines: Sequence[dict[str, float]]) -> list[list[float]]:
    """From the lines of metrics, the curve of every optimizer's gradient norm."""
    names = dict.fromkeys(name for line in lines for name in line if "grad_norm" in name.split("/"))
    return [[line[name] for line in lines if name in line] for name in names]
