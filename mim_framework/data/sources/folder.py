"""Every image below a folder, local or remote."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence

from pydantic import Field, model_validator

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.section import Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data.stores import RemoteFolder, store_of

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
        self._folder = store_of(self.config.root, key)
        self.remote = isinstance(self._folder, RemoteFolder)
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


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _first_folder(name: str) -> str:
    return name.split("/", 1)[0]
