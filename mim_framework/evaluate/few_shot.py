"""Classification from a few labels of each class, drawn several times. Start at `draw_rows`."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.contract.evaluation import Estimate, Evaluation, Subject, check_features
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.knn import knn_predict
from mim_framework.evaluate.labelled import Labelled, class_name, labelled_features
from mim_framework.evaluate.logistic import fit

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % points of Student's t, of 1, 2, ... degrees of freedom."""


class FewShot(Evaluation):
    """Accuracy from n labelled images of each class, by neighbours and by logistic regression.

    `knn_top1_n5`, `logistic_top1_n5`: the mean over draws of the labelled images, with the interval that follows from
    their spread; `knn_std_n5`, `logistic_std_n5`: that spread, a standard deviation. All test images are classified.
    """

    name = "few_shot"

    class Config(Section):
        n: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (1, 5, 10)
        """Labelled images of each class, one measurement for each number."""
        draws: int = Field(5, ge=2)
        """How often they are drawn, by the seeds 0, 1, ..., the same rows as DINOv2's."""
        k: int = Field(20, gt=0)
        """Neighbours that vote, or all labelled images if they are fewer."""
        temperature: float = Field(0.07, ge=0.0125)
        """A neighbour votes with the weight exp(cosine similarity / temperature), a float32 down to 0.0125."""
        c: float = Field(1.0, gt=0)
        """Inverse strength of the L2 penalty of the logistic regression, which is not chosen, as no labels are left for
        it. Features are centred, and scaled by one number to variance 1, before."""
        pool: Literal["mean", "cls"] = "mean"
        """Feature of an image: the mean of its patch tokens, or the class token."""
        max_train: int = Field(50_000, gt=0)
        """Labelled images that are drawn from; of a larger set, a fixed random choice."""
        max_test: int = Field(10_000, gt=0)
        """Images that are classified; of a larger set, a fixed random choice."""

    config: Config

    def check(self, encoder: EncoderSpec) -> None:
        check_features(encoder, self.config.pool)

    def __call__(self, subject: Subject) -> dict[str, float]:
        c = self.config
        data = labelled_features(subject, pool=c.pool, max_train=c.max_train, max_test=c.max_test)
        check_counts(subject, data.train.y, max(c.n))
        numbers: dict[str, float] = {}
        for n in dict.fromkeys(c.n):
            rows = [draw_rows(data.train.y, n, seed) for seed in range(c.draws)]
            for kind, right in {"knn": self._by_neighbours, "logistic": self._by_regression}.items():
                mean, std = over_draws([right(data, each) for each in rows])
                numbers |= {f"{kind}_top1_n{n}": mean, f"{kind}_std_n{n}": std}
        return numbers

    def _by_neighbours(self, data: Labelled, rows: Tensor) -> float:
        predicted = knn_predict(
            data.train.x[rows], data.train.y[rows], data.test.x,
            k=min(self.config.k, len(rows)), temperature=self.config.temperature, num_classes=data.num_classes,
        )  # fmt: skip
        return _share(predicted, data.test.y)

    def _by_regression(self, data: Labelled, rows: Tensor) -> float:
        x = data.train.x[rows]
        mean = x.mean(0)
        scale = (x - mean).std().clamp_min(1e-12)
        classifier = fit((x - mean) / scale, data.train.y[rows], c=self.config.c, num_classes=data.num_classes)
        return _share(classifier((data.test.x - mean) / scale).argmax(1), data.test.y)


def check_counts(subject: Subject, y: Tensor, n: int) -> None:
    """Whether each class of the labels y (N,) has n images to be drawn.

    Raises:
        DataError: naming the class with the fewest.
    """
    labels, counts = y.unique(return_counts=True)
    fewest = int(counts.argmin())
    if (count := int(counts[fewest])) < n:
        name = class_name(subject, int(labels[fewest]))
        raise DataError(
            f"few_shot.n asks for {n} images of each class, and class {name} has {count:,} labelled train images; "
            f"use {count} or fewer"
        )


def draw_rows(y: Tensor, n: int, seed: int) -> Tensor:
    """y (N,) -> rows of n images of each class that is there, (n * classes,), class by class in ascending order.

    The rows of DINOv2's `eval/knn.py` for the try of that number: a permutation of each class's rows in turn.

    Raises:
        DataError: if a class has fewer images.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in y.unique().tolist():  # sorted
        of_class = (y == label).nonzero()[:, 0]
        if len(of_class) < n:
            raise DataError(f"n is {n}, but class {label} has {len(of_class):,} labelled train images; use a smaller n")
        drawn.append(of_class[torch.randperm(len(of_class), generator=generator)[:n].to(y.device)])
    return torch.cat(drawn)


def over_draws(shares: list[float]) -> tuple[Estimate, float]:
    """The mean with the 95 % interval of Student's t, and the standard deviation, of two or more numbers."""
    values = torch.tensor(shares, dtype=torch.float64)
    mean, std, freedom = values.mean().item(), values.std().item(), len(shares) - 1
    z = 1.959964
    beyond = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    width = (_STUDENT[freedom - 1] if freedom <= len(_STUDENT) else beyond) * std / math.sqrt(len(shares))
    return Estimate(mean, max(0.0, mean - width), min(1.0, mean + width)), std


def _share(predicted: Tensor, y: Tensor) -> float:
    return int((predicted == y).sum()) / len(y)
