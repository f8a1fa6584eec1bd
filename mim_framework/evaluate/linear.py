"""Linear classifiers of frozen features: DINOv2's sweep, or logistic regression. Start at `Linear`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.base.text import plain_logger
from mim_framework.contract.evaluation import Estimate, Evaluation, Features, Pool, Subject, check_features
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.labelled import check_class_names, check_labels, tenth_of, top_shares
from mim_framework.evaluate.logistic import choose_and_fit
from mim_framework.evaluate.sweep import Sweep, batches, half_cosine

logger = plain_logger(__name__)

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""DINOv2's, for 256 images a step."""
PASSES, FEWEST_STEPS, MOST_STEPS = 100, 1_000, 12_500
"""Passes over the train images, and the steps that they make at least and at most: DINOv2 has 12,500 for ImageNet."""

Kind = Literal["mean", "cls", "cls+mean"]


class Linear(Evaluation):
    """Accuracy `top1` and `top5` of linear classifiers of frozen features, without any augmentation.

    `sweep`: one classifier for every learning rate, kind of feature and number of blocks, trained at once (DINOv2). The
    one that is right most often on a part of the train images, which no classifier learns from, is judged on the test
    images; `lr` is its rate and `blocks` its number of blocks. With `choose_on: test` it is the best one on the test
    images themselves, as DINOv2 reports it: an upper bound, whose names are `top1_best_on_test` and so on.
    `logistic`: logistic regression, whose penalty `c` is chosen on the same part, and which then learns from all.
    """

    name = "linear"

    class Config(Section):
        solver: Literal["sweep", "logistic"] = "sweep"
        """`sweep`: classifiers of all `rates`, `features` and `blocks`, by momentum SGD; the best of them counts.
        `logistic`: L2 logistic regression on the last block, in float64."""
        features: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("mean",)
        """`mean`: the mean of patch tokens of each of the last blocks; `cls`: their class tokens; `cls+mean`: these and
        the mean of the last block's patch tokens. DINOv2 has [cls, cls+mean]. `logistic` takes one of them."""
        blocks: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (1,)
        """How many of the last blocks stand side by side; each number makes classifiers of its own. DINOv2 has [1, 4].
        `logistic` takes one number."""
        layers: tuple[int, ...] = ()
        """Blocks whose outputs stand side by side, in the place of `blocks`."""
        rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None
        """Learning rates for 256 images a step; those of another `batch_size` follow from them. By default DINOv2's 13
        from 1e-5 to 0.1, and of fewer than its 12,500 steps as much higher, so that classifiers come as far."""
        batch_size: int = Field(128, gt=0)
        """Images of a step. DINOv2 has 128 on each of 8 GPUs."""
        steps: int | None = Field(None, gt=0)
        """Steps of the sweep, over which the rates fall to 0 as half a cosine. By default 100 passes over the train
        images, but 1,000 steps at least, and DINOv2's 12,500 at most, which 16,000 images reach."""
        choose_on: Literal["train", "test"] = "train"
        """Where the best classifier or penalty is found: `train` keeps a tenth of these images aside for it; `test`
        makes the number an upper bound, and its name says so. `logistic` takes `train` only."""
        max_train: int = Field(50_000, gt=0)
        """Labelled images to learn from; of a larger set, a fixed random choice."""
        max_test: int = Field(10_000, gt=0)
        """Images that are classified; of a larger set, a fixed random choice."""

        @model_validator(mode="after")
        def _consistent(self) -> Linear.Config:
            if self.solver == "logistic":
                if len(self.features) > 1 or len(self.blocks) > 1:
                    raise ValueError("solver logistic takes one kind of 'features' and one number of 'blocks'")
                if self.choose_on == "test":
                    raise ValueError("solver logistic takes choose_on: train only; its penalty is never chosen on test")
            return self

    config: Config

    def check(self, encoder: EncoderSpec) -> None:
        c = self.config
        if c.layers and "blocks" in c.model_fields_set:
            raise ValueError("'layers' and 'blocks' exclude each other: both say which blocks are read")
        if not c.layers and max(c.blocks) > encoder.depth:
            raise ValueError(f"blocks is {list(c.blocks)}, but the encoder has {encoder.depth}")
        for kind in c.features:
            for pool, layers in _columns(kind, max(c.blocks), c.layers):
                check_features(encoder, pool, layers)

    def __call__(self, subject: Subject) -> dict[str, float]:
        c = self.config
        check_class_names(subject)
        kinds = {
            (kind, count): _features(subject, kind, count, c)
            for count in (dict.fromkeys(c.blocks) if not c.layers else (len(c.layers),))
            for kind in dict.fromkeys(c.features)
        }
        train, test = next(iter(kinds.values()))
        check_labels(subject, train.y, test.y, c.max_train)
        held_out = tenth_of(train.y)
        with torch.autocast(subject.device.type, enabled=False):
            if c.solver == "logistic":
                return _logistic(train, test, held_out)
            return self._sweep(subject, kinds, held_out)

    def _sweep(
        self, subject: Subject, kinds: dict[tuple[Kind, int], tuple[Features, Features]], held_out: Tensor
    ) -> dict[str, float]:
        c, on_test = self.config, self.config.choose_on == "test"
        aside = torch.zeros_like(held_out) if on_test else held_out
        steps = self._steps(int((~aside).sum()))
        rates = c.rates or tuple(rate * max(1.0, MOST_STEPS / steps) for rate in RATES)
        best: _Best | None = None
        num_diverged = 0
        for (_, count), (train, test) in kinds.items():
            sweep = self._trained(train.x[~aside], train.y[~aside], int(train.y.max()) + 1, rates, steps)
            x, y = (test.x, test.y) if on_test else (train.x[held_out], train.y[held_out])
            right, finite = rightly_classified(sweep, x, y)
            num_diverged += int((~finite).sum())
            found = int(right.argmax())
            if bool(finite[found]) and (best is None or int(right[found]) > best.right):
                best = _Best(int(right[found]), rates[found], count, linear_scores(sweep, found, test.x), test.y)
        if best is None:
            raise DataError(f"linear: all classifiers diverged, from a rate of {min(rates):g} on; give lower rates")
        if num_diverged and subject.world.is_main:
            total = len(kinds) * len(rates)
            logger.warning(f"linear: {num_diverged} of {total} classifiers diverged; they are left out of the choice")
        if best.rate == max(rates) and len(rates) > 1 and subject.world.is_main:
            more = "higher ones may be better: linear.rates=[...], or take linear.solver=logistic"
            logger.warning(f"linear: the highest of the rates, {best.rate:g}, was the best; {more}")
        name = "_best_on_test" if on_test else ""
        shares: dict[str, float] = {f"{each}{name}": share for each, share in top_shares(best.scores, best.y).items()}
        return {**shares, "lr": best.rate, "blocks": float(best.blocks)}

    def _steps(self, num_images: int) -> int:
        """How many steps classifiers learn from that many images."""
        passes = math.ceil(PASSES * num_images / self.config.batch_size)
        return self.config.steps or min(max(passes, FEWEST_STEPS), MOST_STEPS)

    def _trained(self, x: Tensor, y: Tensor, num_classes: int, rates: Sequence[float], steps: int) -> Sweep:
        """x (n, D), y (n,) -> classifiers, one for each rate."""
        batch_size = self.config.batch_size
        generator = torch.Generator().manual_seed(0)
        of_batch = [rate * batch_size / 256 for rate in rates]
        sweep = Sweep.begin(x.shape[1], num_classes, of_batch, generator=generator, device=x.device)
        for done, rows in enumerate(batches(len(x), batch_size, steps, generator)):
            sweep.step(x[rows.to(x.device)], y[rows.to(y.device)], half_cosine(done, steps))
        return sweep


@dataclass(frozen=True, eq=False)
class _Best:
    """The best classifier so far: right on `right` images, with scores (m, C) of the test images."""

    right: int
    rate: float
    blocks: int
    scores: Tensor
    y: Tensor


def rightly_classified(sweep: Sweep, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x (m, D), y (m,) -> rows that each classifier has right, (H,), and whether its scores are finite; if not, -1."""
    right = torch.zeros(len(sweep.rates), dtype=torch.long, device=x.device)
    finite = torch.ones(len(sweep.rates), dtype=torch.bool, device=x.device)
    for x_part, y_part in zip(x.split(4096), y.split(4096), strict=True):
        scores = sweep(x_part)
        finite &= scores.isfinite().flatten(1).all(1)
        right += (scores.argmax(2) == y_part).sum(1)
    return right.masked_fill(~finite, -1), finite


def linear_scores(sweep: Sweep, index: int, x: Tensor) -> Tensor:
    """x (m, D) -> scores (m, C) of one classifier of a sweep."""
    return torch.nn.functional.linear(x, sweep.weight[index], sweep.bias[index])


def _logistic(train: Features, test: Features, held_out: Tensor) -> dict[str, float]:
    num_classes = int(train.y.max()) + 1
    classifier, c = choose_and_fit(train.x, train.y, held_out=held_out, num_classes=num_classes)
    shares: dict[str, Estimate] = top_shares(classifier(test.x), test.y)
    return {**shares, "c": c}


def _columns(kind: Kind, count: int, layers: tuple[int, ...]) -> list[tuple[Pool, tuple[int, ...]]]:
    """What stands side by side in a feature, in order: (pool, blocks), with no blocks for the encoder's own output."""
    before = layers or tuple(range(-count, -1))
    pool: Pool = "mean" if kind == "mean" else "cls"
    columns: list[tuple[Pool, tuple[int, ...]]] = [(pool, before)] if before else []
    if not layers:
        columns.append((pool, ()))
    if kind == "cls+mean":
        columns.append(("mean", layers[-1:]))
    return columns


def _features(subject: Subject, kind: Kind, count: int, c: Linear.Config) -> tuple[Features, Features]:
    """Of train and test images."""

    def of(split: Literal["train", "test"], limit: int) -> Features:
        found = [
            subject.features(split, pool=pool, layers=layers, limit=limit)
            for pool, layers in _columns(kind, count, c.layers)
        ]
        return found[0] if len(found) == 1 else Features(torch.cat([each.x for each in found], dim=1), found[0].y)

    return of("train", c.max_train), of("test", c.max_test)
