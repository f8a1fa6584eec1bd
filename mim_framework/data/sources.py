"""Where images come from: a folder (local or remote), the bundled digits, and the small sets of torchvision."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data.decode import BrokenImage

# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2",
])
# fmt: on
"""A file with another suffix is not listed; what a listed file really holds is decided when it is read."""


class FolderSource(Source):
    """Every image below a folder or URL, in the order of their paths. Class folders are allowed and not needed."""

    name = "folder"

    class Config(Section):
        root: str = Field(min_length=1)
        """Folder that is searched recursively: a local path or any fsspec URL, such as s3://bucket/images."""
        labels: bool = False
        """Take the first folder below `root` as the class of an image. Pre-training does not need it, kNN does."""
        eval_root: str | None = None
        """Folder of test images for kNN, in the same class folders; needs `labels: true`."""

        @model_validator(mode="after")
        def _labels_for_evaluation(self) -> FolderSource.Config:
            if self.eval_root is not None and not self.labels:
                raise ValueError("eval_root needs labels: true")
            return self

    config: Config

    def __init__(self, config: Section, key: str = "data.source.root") -> None:
        """`key` names the folder in messages."""
        super().__init__(config)
        self._folder = _folder(self.config.root, key)
        self.remote = isinstance(self._folder, _RemoteFolder)
        try:
            names = sorted(name for name in self._folder.list() if _is_image(name))
        except Exception as error:  # file systems raise the errors of their network libraries too
            raise DataError(f"{key}: '{self.config.root}' cannot be listed: {type(error).__name__}: {error}") from error
        if not names:
            raise DataError(
                f"{key}: no images below '{self.config.root}'; files are taken by their suffix, "
                f"one of {' '.join(sorted(IMAGE_SUFFIXES))}"
            )
        if self.config.labels:
            loose = next((name for name in names if "/" not in name), None)
            if loose is not None:
                raise DataError(
                    f"data.source.labels: '{loose}' lies directly in '{self.config.root}', not in a class folder; "
                    f"move it into one or set data.source.labels=false"
                )
            self.classes = sorted({_first_folder(name) for name in names})
            self._label_of = {name: label for label, name in enumerate(self.classes)}
        self._names = _PackedNames(names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Sample:
        name = self._names[index]
        try:
            data = self._folder.read(name)
        except Exception as error:  # as above
            raise BrokenImage(name, "unreadable", f"{type(error).__name__}: {error}") from error
        return Sample(data, name, self._label_of[_first_folder(name)] if self.config.labels else None)

    def evaluation_sources(self) -> tuple[Source, Source] | None:
        if self.config.eval_root is None:
            return None
        test = FolderSource(self.Config(root=self.config.eval_root, labels=True), key="data.source.eval_root")
        unknown = sorted(set(test.classes) - set(self.classes))
        if unknown:
            raise DataError(
                f"data.source.eval_root: class folder '{unknown[0]}' of '{self.config.eval_root}' does not exist in "
                f"'{self.config.root}'"
            )
        test.classes, test._label_of = self.classes, self._label_of
        return self, test


class DigitsSource(Source):
    """scikit-learn's bundled set of 1797 real handwritten digits, 8x8 pixels, with labels; needs no download.

    Every fifth image is a test image. The values 0 to 16 are scaled to 0 to 255.
    """

    name = "digits"

    class Config(Section):
        split: Literal["train", "test", "all"] = "train"
        """Every fifth image is in `test`, the others are in `train`."""

    config: Config
    classes = tuple("0123456789")

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError("data.source digits needs scikit-learn: pip install 'mim-framework[demo]'") from None
        digits = load_digits()
        self._images = (digits.images * 255 / 16).round().astype("uint8")
        self._labels = digits.target.tolist()
        split = self.config.split
        self._ids = [i for i in range(len(self._images)) if split == "all" or (i % 5 == 4) == (split == "test")]

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Sample:
        i = self._ids[index]
        return Sample(self._images[i], f"digits/{i}", self._labels[i])

    def evaluation_sources(self) -> tuple[Source, Source]:
        return DigitsSource(self.Config(split="train")), DigitsSource(self.Config(split="test"))


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
        root: str = Field(min_length=1)
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


class _LocalFolder:
    def __init__(self, root: str, key: str) -> None:
        self._root = root
        if not os.path.isdir(root):
            problem = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            raise DataError(f"{key}: '{root}' {problem}; give a folder of images or a URL such as s3://bucket/images")

    def list(self) -> Iterator[str]:
        """Paths of all files relative to the root, in any order; links are followed, hidden names left out."""
        pending = [("", frozenset({_identity(os.stat(self._root))}))]
        while pending:
            folder, ancestors = pending.pop()
            with os.scandir(f"{self._root}/{folder}") as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir():
                        yield folder + entry.name
                        continue
                    identity = _identity(entry.stat())
                    if identity not in ancestors:  # a link may lead back up
                        pending.append((f"{folder}{entry.name}/", ancestors | {identity}))

    def read(self, name: str) -> bytes:
        with open(f"{self._root}/{name}", "rb", buffering=0) as file:
            return file.read()


class _RemoteFolder:
    """A folder behind an fsspec URL. The file system is looked up where it is used, never sent to a worker."""

    def __init__(self, root: str, key: str) -> None:
        self._root = root
        try:
            file_system, path = self._file_system()
            exists = file_system.isdir(path)
        except ImportError as error:
            raise DataError(f"{key}: '{root}' needs another package: {error}") from None
        except Exception as error:
            raise DataError(f"{key}: '{root}' cannot be opened: {type(error).__name__}: {error}") from error
        if not exists:
            raise DataError(f"{key}: '{root}' does not exist or is not a folder; check the URL and the credentials")

    def list(self) -> Iterator[str]:
        file_system, path = self._file_system()
        for found in file_system.find(path):
            name = found.removeprefix(path).lstrip("/")
            if not any(part.startswith(".") for part in name.split("/")):
                yield name

    def read(self, name: str) -> bytes:
        file_system, path = self._file_system()
        return file_system.cat_file(f"{path.rstrip('/')}/{name}")

    def _file_system(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self._root)  # fsspec keeps one instance per process


def _folder(root: str, key: str) -> _LocalFolder | _RemoteFolder:
    local = root.removeprefix("file://")
    if "://" in local or "::" in local:
        return _RemoteFolder(root, key)
    return _LocalFolder(os.path.expanduser(local), key)


class _PackedNames(Sequence[str]):
    """Strings in one block of memory: millions of them cost a worker neither a copy nor, under fork, its pages."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = array("q", [0])
        for name in encoded:
            self._ends.append(self._ends[-1] + len(name))
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _first_folder(name: str) -> str:
    return name.split("/", 1)[0]


def _read_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()
