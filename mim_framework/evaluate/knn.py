"""Weighted k-nearest-neighbour classification on frozen features. Start at `nearest` and `votes_of`."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.base.text import plain_logger
from mim_framework.contract.evaluation import Evaluation, Subject, check_features
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.labelled import labelled_features, top_shares

logger = plain_logger(__name__)

_SIMILARITIES_AT_ONCE = 2**24

Neighbours = Annotated[int, Field(gt=0)]


class KNN(Evaluation):
    """k-nearest-neighbour classification: the share of test images that their neighbours classify rightly, `top1`.

    DINO's vote. `top5`, of more than five classes, counts classes that have votes. Of several k `top1_k20` and so on.
    """

    name = "knn"

    class Config(Section):
        k: Neighbours | Annotated[tuple[Neighbours, ...], Field(min_length=1)] = 20
        """Neighbours that vote: a number, or several at once, such as [10, 20, 100, 200]. Of fewer train images than
        the default all vote, and that is said; a number that was asked for must be there."""
        temperature: float = Field(0.07, ge=0.0125)
        """A neighbour votes with the weight exp(cosine similarity / temperature), a float32 down to 0.0125."""
        pool: Literal["mean", "cls"] = "mean"
        """Feature of an image: the mean of its patch tokens, or the class token."""
        max_train: int = Field(50_000, gt=0)
        """Labelled images that can be neighbours; of a larger set, a fixed random choice."""
        max_test: int = Field(10_000, gt=0)
        """Images that are classified; of a larger set, a fixed random choice."""

    config: Config

    def check(self, encoder: EncoderSpec) -> None:
        check_features(encoder, self.config.pool)

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        c = self.config
        data = labelled_features(subject, pool=c.pool, max_train=c.max_train, max_test=c.max_test)
        ks = self._neighbours(len(data.train.y), say=subject.world.is_main)
        similarity, neighbours = nearest(data.train.x, data.test.x, max(ks))
        numbers = {}
        for k in ks:
            votes = votes_of(similarity[:, :k], data.train.y[neighbours[:, :k]], c.temperature, data.num_classes)
            shares = top_shares(votes.masked_fill(votes == 0, -float("inf")), data.test.y)
            numbers |= {name if isinstance(c.k, int) else f"{name}_k{k}": share for name, share in shares.items()}
        return numbers

    def _neighbours(self, num_train: int, *, say: bool) -> tuple[int, ...]:
        c = self.config
        if "k" not in c.model_fields_set and isinstance(c.k, int) and c.k > num_train:
            if say:
                logger.warning(f"knn: k is {c.k} by default, but there are {num_train} labelled train images; all vote")
            return (num_train,)
        ks = (c.k,) if isinstance(c.k, int) else tuple(dict.fromkeys(c.k))
        check_enough(max(ks), num_train)
        return ks


def check_enough(k: int, num_train: int) -> None:
    """
    Raises:
        DataError: if there are fewer images than neighbours.
    """
    if k > num_train:
        raise DataError(f"k is {k}, but there are {num_train:,} labelled train images; use k={num_train} or less")


def nearest(train_x: Tensor, test_x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """train_x (n, D), test_x (m, D) -> cosine similarities (m, k) and indices (m, k) of the k nearest, nearest first.

    In float32 whatever the features are: lower precision would blur which ones are nearest.
    """
    chunk = max(1, _SIMILARITIES_AT_ONCE // len(train_x))
    with torch.autocast(train_x.device.type, enabled=False):
        bank = normalize(train_x.float()).t()
        found = [(part @ bank).topk(k) for part in normalize(test_x.float()).split(chunk)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def votes_of(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """similarity (m, k) and labels (m, k) of neighbours -> votes (m, num_classes), 0 where a class has none.

    Neighbours vote for their class with weight exp(similarity / temperature), as in Wu et al. 2018, "Unsupervised
    feature learning via non-parametric instance discrimination", section 3.4, and in DINO's `eval_knn.py`.
    """
    votes = similarity.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp())


def knn_predict(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """train_x (n, D), train_y (n,), test_x (m, D) -> classes (m,) int64; see `nearest` and `votes_of`."""
    similarity, neighbours = nearest(train_x, test_x, k)
    return votes_of(similarity, train_y[neighbours], temperature, num_classes).argmax(1)
