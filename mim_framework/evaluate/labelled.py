"""Labelled features of both splits, checked: what the evaluations that classify images begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.contract.evaluation import Estimate, Features, Pool, Subject, check_features
from mim_framework.contract.specs import EncoderSpec


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features to learn from and to be judged by; labels are below `num_classes`, those of `test` are in `train`."""

    train: Features
    test: Features
    num_classes: int


def labelled_features(
    subject: Subject, *, pool: Pool, layers: Sequence[int] = (), max_train: int, max_test: int
) -> Labelled:
    """The features of both splits.

    Raises:
        DataError: if there are no labels, one class only, or classes that one split has and the other has not.
    """
    check_class_names(subject)
    train = subject.features("train", pool=pool, layers=layers, limit=max_train)
    test = subject.features("test", pool=pool, layers=layers, limit=max_test)
    check_labels(subject, train.y, test.y, max_train)
    return Labelled(train, test, int(train.y.max()) + 1)


def check_class_names(subject: Subject) -> None:
    """Whether label 3 means the same class in both splits.

    Raises:
        DataError: naming the first class that differs.
    """
    train, test = (subject.source(split).classes for split in ("train", "test"))
    if train is None or test is None or list(train) == list(test):
        return
    pairs = enumerate(zip([*train, *[None] * len(test)], [*test, *[None] * len(train)], strict=False))
    label, (of_train, of_test) = next((label, names) for label, names in pairs if names[0] != names[1])
    raise DataError(
        f"the classes of train and test images differ: class {label} is {_named(of_train)} in train and "
        f"{_named(of_test)} in test; both need the same classes in the same order"
    )


def check_labels(subject: Subject, train_y: Tensor, test_y: Tensor, max_train: int) -> None:
    """Whether there is something to tell apart, and to learn every class of `test_y` (m,) from `train_y` (n,).

    Raises:
        DataError: saying what is missing.
    """
    found = train_y.unique().tolist()
    few = f" of {len(train_y):,} (max_train is {max_train:,}; raise it)" if len(train_y) == max_train else ""
    if len(found) < 2:
        name = class_name(subject, found[0])
        raise DataError(f"all labelled train images{few} are of one class, {name}; at least two are needed")
    if missing := sorted(set(test_y.unique().tolist()) - set(found)):
        count = int((test_y == missing[0]).sum())
        raise DataError(
            f"class {class_name(subject, missing[0])} has test images ({count:,}) and no labelled train image{few}; "
            "both splits need the same classes"
        )


def tenth_of(y: Tensor) -> Tensor:
    """y (n,) -> (n,) bool: a random tenth of the rows, the same each time, that never holds all rows of a class.

    Raises:
        DataError: if no row can be spared.
    """
    order = rng.permutation(0, "held out", len(y)).to(y.device)
    found = torch.zeros_like(y, dtype=torch.bool)
    found[order[: max(1, len(y) // 10)]] = True
    for label in y.unique():
        of_class = (y == label).nonzero()[:, 0]
        if bool(found[of_class].all()):
            found[of_class[0]] = False
    if not bool(found.any()):
        raise DataError(f"{len(y):,} labelled train images, one of each class, leave none to choose a classifier by")
    return found


def top_shares(scores: Tensor, y: Tensor) -> dict[str, Estimate]:
    """scores (m, C), y (m,) -> the share whose class has the highest score, `top1`; `top5` if there are more classes.

    A score of -inf is none: such a class is not among the five.
    """
    numbers = {"top1": Estimate.of_share(int((scores.argmax(1) == y).sum()), len(y))}
    if scores.shape[1] > 5:
        best = scores.topk(5, dim=1)
        among = (best.indices == y[:, None]) & (best.values > -float("inf"))
        numbers["top5"] = Estimate.of_share(int(among.any(1).sum()), len(y))
    return numbers


def token_width(encoder: EncoderSpec, layers: Sequence[int]) -> int:
    """The width of patch tokens of which those of `layers` stand side by side; of none, of the encoder's own output.

    Raises:
        ValueError: if the encoder has no such tokens, or they lie on different grids.
    """
    check_features(encoder, "tokens", layers)
    own = encoder.dim, encoder.grid
    found = [encoder.layers.get(layer % encoder.depth, own) for layer in layers] or [own]
    if any(grid != found[0][1] for _, grid in found):
        raise ValueError(f"layers {list(layers)} have tokens on different grids, which cannot stand side by side")
    return sum(width for width, _ in found)


def _named(name: str | None) -> str:
    return "missing" if name is None else f"'{name}'"


def class_name(subject: Subject, label: int) -> str:
    """'name' of a class, or its number where the source has no names."""
    names = subject.source("train").classes
    return f"'{names[label]}'" if names is not None and label < len(names) else str(label)
