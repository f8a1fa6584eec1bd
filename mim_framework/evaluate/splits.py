"""The images by which encoders are judged: what is learned from, what is tested on, and which labels there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.text import plain_logger
from mim_framework.contract.components import Source
from mim_framework.contract.evaluation import Evaluation, Split
from mim_framework.contract.records import Sample

logger = plain_logger(__name__)

NAMES_SHOWN = 5
"""So many classes are called by their names in a message."""
CURE = (
    "In a recipe, data.source.labels=true and data.eval_source={type: folder, root: FOLDER, labels: true} give them; "
    "`mim eval` takes them by --train SOURCE --test SOURCE too"
)


@dataclass(frozen=True)
class Splits:
    """The images by which encoders are judged, and the splits of which have labels."""

    sources: Mapping[Split, Source]
    labelled: frozenset[Split]

    @classmethod
    def of(cls, source: Source) -> Splits:
        """What a source keeps for evaluations; the images of one that keeps nothing aside are the split "train"."""
        pair = source.evaluation_sources()
        if pair is None:
            return cls({"train": source}, frozenset({"train"} if source.classes is not None else ()))
        return cls({"train": pair[0], "test": pair[1]}, frozenset({"train", "test"}))

    @classmethod
    def of_pair(cls, train: Source, test: Source) -> Splits:
        """Two sources, whose labels mean the same: those of the test images are numbered as the others are.

        Raises:
            DataError: if the test images have a class that is not learned from.
        """
        sources: dict[Split, Source] = {"train": train, "test": test}
        labelled = frozenset(split for split, source in sources.items() if source.classes is not None)
        if train.classes is not None and test.classes is not None and list(train.classes) != list(test.classes):
            sources["test"] = NumberedAs(train, test)
        return cls(sources, labelled)

    def lacks(self, evaluation: Evaluation) -> str:
        """What an evaluation needs and is not here, with the cure; empty if all is here."""
        for split in sorted(evaluation.needs, reverse=True):  # "train" is told first
            if split not in self.sources:
                kept = f"source '{self.sources['train'].name}' keeps none aside"
                return f"it needs labelled images to be tested on, {kept}. {CURE}"
            if split not in self.labelled:
                purpose = "to learn from" if split == "train" else "to be tested on"
                return f"it needs labelled images {purpose}, source '{self.sources[split].name}' has none. {CURE}"
            classes = self.sources[split].classes
            if split == "train" and classes is not None and len(classes) < 2:
                one = f"source '{self.sources[split].name}' has one, {_named(classes)}"
                return f"it needs images of two classes at least, {one}; add a folder of another class"
        return ""


class NumberedAs(Source):
    """A source whose labels count the classes of another one, which they are matched with by name."""

    def __init__(self, model: Source, source: Source) -> None:
        """
        Raises:
            DataError: if the source has a class that the model lacks.
        """
        super().__init__(source.config)
        assert model.classes is not None
        assert source.classes is not None
        self.inner, self.classes = source, model.classes
        self.blocks, self.remote = source.blocks, source.remote
        self.name = source.name
        numbers = {name: number for number, name in enumerate(model.classes)}
        if unknown := [name for name in source.classes if name not in numbers]:
            which = "class" if len(unknown) == 1 else f"{len(unknown)} classes"
            raise DataError(
                f"the images to be tested on have {which} {_named(unknown)}, which those to learn from lack; they have "
                f"{_named(model.classes)}: name the classes alike, or leave them out"
            )
        if unseen := [name for name in model.classes if name not in set(source.classes)]:
            logger.warning(f"evaluation: there are no test images of {len(unseen)} classes: {_named(unseen)}")
        self._number = [numbers[name] for name in source.classes]

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, index: int) -> Sample:
        return self._renumbered(self.inner.read(index))

    def read_many(self, indices: Sequence[int]) -> list[Sample | BrokenImage]:
        found = self.inner.read_many(indices)
        return [each if isinstance(each, BrokenImage) else self._renumbered(each) for each in found]

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def size(self, index: int) -> int | None:
        return self.inner.size(index)

    def left_out(self) -> Sequence[str]:
        return self.inner.left_out()

    def _renumbered(self, sample: Sample) -> Sample:
        return sample if sample.label is None else replace(sample, label=self._number[sample.label])


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:NAMES_SHOWN]) + more
