"""What an evaluation is: numbers that say what frozen features are worth, and the subject that it is given.

Start here to write one, for example a linear probe: a class, its options, and a call from a subject to numbers. A
subject is an encoder with the images to judge it by; it extracts features once, for all evaluations that ask for them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder, Objective, Source, ViewBuilder
from mim_framework.contract.records import Ask, Views
from mim_framework.contract.specs import EncoderSpec
from mim_framework.contract.step import Step
from mim_framework.contract.world import World

Split = Literal["train", "test"]
"""Images to learn from, or to be judged by."""
Pool = Literal["mean", "cls", "tokens"]
"""An image's feature: the mean of its patch tokens, its class token, or all patch tokens in the order of the grid."""


@dataclass(frozen=True, eq=False)
class Features:
    """Of the images of a split, in order, on the subject's device; the same on every rank.

    `x`: float32 (n, D), or (n, N, D) where every patch token is kept. `y`: labels (n,) int64, -1 where there is none.
    """

    x: Tensor
    y: Tensor


class Estimate(float):
    """A number with its 95 % interval `low` to `high`, such as an accuracy on images that are a sample of many more."""

    low: float
    high: float

    def __new__(cls, value: float, low: float, high: float) -> Estimate:
        estimate = super().__new__(cls, value)
        estimate.low, estimate.high = low, high
        return estimate

    @classmethod
    def of_share(cls, right: int, of: int) -> Estimate:
        """A share with the interval of Wilson 1927, which also holds near 0 and 1 and of few images."""
        z, share = 1.959964, right / of
        centre, width = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
        low, high = (centre - width) / (1 + z * z / of), (centre + width) / (1 + z * z / of)
        return cls(share, min(max(low, 0.0), share), max(min(high, 1.0), share))

    def __getnewargs__(self) -> tuple[float, float, float]:
        return float(self), self.low, self.high


@dataclass(frozen=True, eq=False)
class Method:
    """The method by which a subject's encoder is trained, for what is measured with more than its features.

    `teachers`: networks that training does not change by gradients, by name. `beside`: what travels beside the images
    of training and is in no other batch, such as labels. `history`: the lines of the run's metrics so far.
    """

    objective: Objective
    step: Callable[[Tensor], Step]
    """Positions (B,) -> a step where the run stands; what is drawn follows from the positions."""
    begin: Callable[[Step, dict[str, Tensor]], Views]
    """A batch on the device, before `prepare` -> what the components see, which are told that a step begins."""
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    history: Callable[[], list[dict[str, Any]]] = list


class Subject(Protocol):
    """An encoder that is judged, with images: what an evaluation is given.

    `workers`: processes that read images. `method`: None where only the encoder is there.
    """

    encoder: Encoder
    views: ViewBuilder
    world: World
    device: torch.device
    workers: int
    method: Method | None

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's spec."""

    def source(self, split: Split) -> Source:
        """Where the images of a split come from; without labels there is one split only, "train"."""

    def features(
        self,
        split: Split,
        *,
        pool: Pool = "mean",
        layers: Sequence[int] = (),
        limit: int | None = None,
        labelled: bool = True,
    ) -> Features:
        """Features of images of which nothing is hidden. Every rank must ask, as they share the work.

        Args:
            layers: blocks whose outputs stand side by side in D, from 0, or from the end if negative; each normalised
                as the encoder's end is, where it has its width. Of none, the encoder's own output.
            limit: of more images than this, a random choice that is the same each time.
            labelled: leave out images without a label.

        Raises:
            DataError: if there are no such images.
        """

    def raw_pixels(self, split: Split, *, limit: int | None = None, labelled: bool = True) -> Features:
        """The pixels of the same images in [0, 1], averaged down if they are many: what any encoder should beat."""

    def logits(self, split: Split) -> Features:
        """Scores (n, num_classes) of the labelled images of a split, by the classifier that was trained.

        Of several classifiers (n, num_heads, num_classes), in the order of the recipe.

        Raises:
            DataError: if no classifier was trained, or there are no such images.
        """

    def frozen(self) -> AbstractContextManager[None]:
        """For passes of one's own through `encoder`: evaluation mode, no gradients, the precision of the run."""


class Evaluation:
    """A measure of what frozen features are worth, taken during a run or after it.

    Every rank calls it and must return the same numbers, so it draws from seeds of its own and never from a global
    generator. The encoder is as it was afterwards.
    """

    kind: ClassVar[str] = "evaluation"
    name: ClassVar[str]
    """The name by which a recipe selects it, and with which the names of its numbers begin in the metrics."""
    needs: ClassVar[frozenset[Split]] = frozenset({"train", "test"})
    """The splits whose labels it reads; empty if it does without labels."""
    of_pixels: ClassVar[bool] = True
    """Whether it can judge raw pixels in the place of features; False if it calls the encoder itself."""
    of_classifier: ClassVar[bool] = False
    """Whether it judges the classifier that a run has trained (`Subject.logits`) rather than its encoder."""
    reserved: ClassVar[frozenset[str]] = frozenset({"every_epochs", "forward_batch_size"})
    """Keys that every evaluation has in a recipe, so that no option may be called so.

    `layers` is one too. An evaluation that reads features need not know of it: what it asks for without layers then
    comes from those of the recipe. One with an option of that name, numbers of blocks, is given them there.
    """

    class Config(Section):
        """No options."""

    def __init__(self, config: Section) -> None:
        self.config = config

    def check(self, encoder: EncoderSpec) -> None:
        """Called when a recipe is checked, before any data is read; see `check_features`.

        Raises:
            ValueError: if this encoder cannot be judged so; the core adds the place in the recipe.
        """
        return

    @abstractmethod
    def __call__(self, subject: Subject) -> dict[str, float]:
        """The numbers by name, such as {"top1": 0.75}; an `Estimate` where its uncertainty is known."""


def check_features(encoder: EncoderSpec, pool: Pool, layers: Sequence[int] = ()) -> None:
    """For `Evaluation.check`: whether an encoder has such features.

    Raises:
        ValueError: naming what it lacks, and what would work.
    """
    if pool == "cls" and not encoder.num_prefix_tokens:
        raise ValueError("pool is 'cls', but the encoder has no class token; use pool=mean")
    if outside := [layer for layer in layers if not -encoder.depth <= layer < encoder.depth]:
        raise ValueError(f"layers {outside} are none of the encoder's {encoder.depth} blocks, which begin at 0")
    if lacking := encoder.lacks(Ask(layers=frozenset(layer % encoder.depth for layer in layers))):
        raise ValueError(f"the encoder does not hand out {lacking}; it has layers {sorted(encoder.offers.layers)}")
