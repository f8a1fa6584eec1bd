"""The small data sets of torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.section import LocalPath, Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample

# data set -> our split -> the arguments by which its class selects it
_TRAIN_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": _TRAIN_FLAG,
    "CIFAR100": _TRAIN_FLAG,
    "MNIST": _TRAIN_FLAG,
    "FashionMNIST": _TRAIN_FLAG,
    "STL10": {split: {"split": split} for split in ("train", "test", "unlabeled")},
    "Imagenette": {"train": {"split": "train"}, "test": {"split": "val"}},
    "Food101": {split: {"split": split} for split in ("train", "test")},
}
_KEPT_AS_FILES = {"Imagenette", "Food101"}


class TorchvisionSource(Source):
    """A labelled data set of torchvision, in the folder layout that torchvision gives it.

    CIFAR is distributed as pickle files. torchvision loads them after comparing their MD5 sums with its own list, which
    guards against damage but not against a forger: point `root` only at folders that nobody else can write.
    """

    name = "torchvision"

    class Config(Section):
        dataset: Literal["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "STL10", "Imagenette", "Food101"]
        """Name of the data set."""
        root: LocalPath = Field(min_length=1)
        """Folder that holds the data sets."""
        split: Literal["train", "test", "unlabeled"] = "train"
        """Which part; only STL10 has an unlabeled one. The validation part of Imagenette counts as test."""
        download: bool = False
        """Download the data set into `root` if it is not there. With several processes, do it in a single one first."""

        @model_validator(mode="after")
        def _split_exists(self) -> TorchvisionSource.Config:
            if self.split not in _TORCHVISION[self.dataset]:
                raise ValueError(
                    f"{self.dataset} has no split '{self.split}', it has {', '.join(_TORCHVISION[self.dataset])}"
                )
            return self

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        from torchvision import datasets

        c = self.config
        options = dict(_TORCHVISION[c.dataset][c.split])
        if c.dataset in _KEPT_AS_FILES:
            options["loader"] = _read_bytes
        try:
            self._dataset = getattr(datasets, c.dataset)(c.root, download=c.download, **options)
        except (RuntimeError, OSError) as error:
            cure = "check the network" if c.download else "set data.source.download=true"
            raise DataError(
                f"data.source.root: {c.dataset} ({c.split}) cannot be loaded from '{c.root}': {error}; {cure} or put "
                f"the files there"
            ) from None
        # Imagenette has several names for one class
        self.classes = [name if isinstance(name, str) else ", ".join(name) for name in self._dataset.classes]

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> Sample:
        name = f"{self.config.dataset}/{self.config.split}/{index}"
        try:
            data, label = self._dataset[index]
        except OSError as error:
            raise BrokenImage(name, "unreadable", str(error)) from error
        return Sample(data, name, None if label is None or label < 0 else int(label))  # STL10: -1 is no label

    def evaluation_sources(self) -> tuple[Source, Source]:
        train, test = (
            TorchvisionSource(self.config.model_copy(update={"split": split, "download": False}))
            for split in ("train", "test")
        )
        return train, test


def _read_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()
