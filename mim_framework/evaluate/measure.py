"""One evaluation of one subject: by the end of its encoder, by other layers, or layer by layer. Start at `measure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mim_framework.contract.evaluation import Evaluation, Features, Pool, Split, check_features
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.base import Asked, EncoderSubject, PixelSubject

Layers = Literal["last", "each"] | tuple[int, ...]
"""Which layers an evaluation reads: the encoder's own output, each layer by itself, or some side by side."""
JudgedSubject = EncoderSubject | PixelSubject


@dataclass(frozen=True)
class Reading:
    """The numbers of an evaluation by name, and the features that it read for them."""

    numbers: dict[str, float]
    asked: tuple[Asked, ...]


def measure(evaluation: Evaluation, subject: JudgedSubject, layers: Layers = "last") -> Reading:
    """The numbers of an evaluation; layer by layer they are called `layer3_top1`.

    The layers are extracted in one pass, but for `each` of patch tokens, which are too many to be held for all layers.

    Raises:
        DataError: if its images are not there.
        ValueError: if the encoder has no such layers.
    """
    subject.asked.clear()
    if layers == "last" or isinstance(subject, PixelSubject):
        return Reading(dict(evaluation(subject)), tuple(subject.asked))
    numbers: dict[str, float] = {}
    wanted = _groups(layers, subject.spec)
    with subject.extracting([layer for group in wanted.values() for layer in group]):
        for prefix, group in wanted.items():
            restricted = restrict(evaluation, group)
            seen = subject if restricted is not evaluation else LayersOf(subject, group)
            numbers |= {f"{prefix}{name}": value for name, value in restricted(seen).items()}
    return Reading(numbers, tuple(subject.asked))


def check(evaluation: Evaluation, encoder: EncoderSpec, layers: Layers = "last") -> None:
    """Whether an encoder can be judged so.

    Raises:
        ValueError: as of `Evaluation.check`, or if it has no such layers.
    """
    if layers == "last":
        evaluation.check(encoder)
        return
    if not evaluation.of_pixels and not _has_layers(evaluation):
        raise ValueError("it reads the encoder and no features of layers; leave 'layers' out")
    for group in _groups(layers, encoder).values():
        restrict(evaluation, group).check(encoder)
        check_features(encoder, "mean", group)


def restrict(evaluation: Evaluation, layers: tuple[int, ...]) -> Evaluation:
    """The evaluation with these layers for its option `layers`; itself if it has none."""
    if not _has_layers(evaluation):
        return evaluation
    return type(evaluation)(evaluation.config.model_copy(update={"layers": layers}))


class LayersOf:
    """A subject whose features are those of some layers, for evaluations that ask for none."""

    def __init__(self, subject: EncoderSubject, layers: Sequence[int]) -> None:
        self._subject, self._layers = subject, tuple(layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def features(
        self,
        split: Split,
        *,
        pool: Pool = "mean",
        layers: Sequence[int] = (),
        limit: int | None = None,
        labelled: bool = True,
    ) -> Features:
        """
        Raises:
            ValueError: if layers are asked for.
        """
        if layers:
            raise ValueError(f"the evaluation asks for layers {list(layers)} itself; leave 'layers' out")
        return self._subject.features(split, pool=pool, layers=self._layers, limit=limit, labelled=labelled)


def _has_layers(evaluation: Evaluation) -> bool:
    return "layers" in type(evaluation).Config.model_fields


def _groups(layers: Layers, encoder: EncoderSpec) -> dict[str, tuple[int, ...]]:
    """Layers that are read together, by the prefix of the names of their numbers."""
    if layers != "each":
        assert layers != "last"
        return {"": layers}
    if not encoder.offers.layers:
        raise ValueError("layers is 'each', but the encoder hands out none of them; leave 'layers' out for its end")
    return {f"layer{layer}_": (layer,) for layer in sorted(encoder.offers.layers)}
