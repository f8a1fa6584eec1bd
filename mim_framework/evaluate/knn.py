"""Weighted k-nearest-neighbour classification on frozen features. Start at `knn_predict`."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mim_framework.base.section import Section
from mim_framework.contract.evaluation import Estimate, Evaluation, Subject, check_features
from mim_framework.contract.specs import EncoderSpec

_SIMILARITIES_AT_ONCE = 2**24


class KNN(Evaluation):
    """k-nearest-neighbour classification: the share of test images that their neighbours classify rightly, `top1`."""

    name = "knn"

    class Config(Section):
        k: int = Field(20, gt=0)
        """Neighbours that vote."""
        temperature: float = Field(0.07, gt=0)
        """A neighbour votes with the weight exp(cosine similarity / temperature)."""
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
        section = self.config
        train = subject.features("train", pool=section.pool, limit=section.max_train)
        test = subject.features("test", pool=section.pool, limit=section.max_test)
        predicted = knn_predict(
            train.x, train.y, test.x,
            k=section.k, temperature=section.temperature, num_classes=int(train.y.max()) + 1,
        )  # fmt: skip
        return {"top1": Estimate.of_share(int((predicted == test.y).sum()), len(test.y))}


def knn_predict(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """train_x (n, D), train_y (n,), test_x (m, D) -> classes (m,) int64.

    The k training features of highest cosine similarity vote for their class with weight exp(similarity / temperature),
    as in Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4.
    """
    k = min(k, len(train_x))
    chunk = max(1, _SIMILARITIES_AT_ONCE // len(train_x))
    with torch.autocast(train_x.device.type, enabled=False):  # bfloat16 would blur which neighbours are nearest
        train_x = normalize(train_x.float()).t()
        predicted = []
        for part in normalize(test_x.float()).split(chunk):
            similarity, neighbours = (part @ train_x).topk(k)
            votes = torch.zeros(len(part), num_classes, device=part.device)
            votes.scatter_add_(1, train_y[neighbours], (similarity / temperature).exp())
            predicted.append(votes.argmax(1))
    return torch.cat(predicted)
