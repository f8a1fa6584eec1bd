"""Whether the very images that are tested on were seen in training or by a classifier. Start at `find_overlap`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from mim_framework.base.errors import BrokenImage
from mim_framework.contract.components import Source, sample_or_broken
from mim_framework.contract.records import Sample

READ_AT_MOST = 60_000
"""So many images of pre-training are read at most, to compare their content."""
NAMES_SHOWN = 5


class NotComparable(TypeError):
    """Samples of a kind whose content cannot be told apart."""


@dataclass(frozen=True)
class Overlap:
    """The test images that are also among those of pre-training, or among others, by name, in order.

    `not_compared`: why the two could not be compared; then there are no names. `among`: which others, in words.
    """

    num_test: int
    num_trained_on: int
    names: tuple[str, ...] = ()
    not_compared: str = ""
    among: str = "those of pre-training"

    def __str__(self) -> str:
        if self.not_compared:
            what = f"whether the {self.num_test:,} test images are among {self.among}"
            return f"{what} is not known: {self.not_compared}"
        if not self.names:
            others = self.among.replace("those", f"the {self.num_trained_on:,}")
            return f"none of the {self.num_test:,} test images is among {others}"
        more = f" and {len(self.names) - NAMES_SHOWN:,} more" if len(self.names) > NAMES_SHOWN else ""
        named = f"{', '.join(self.names[:NAMES_SHOWN])}{more}"
        return f"{len(self.names):,} of the {self.num_test:,} test images are also among {self.among}: {named}"


def find_overlap(test: Source, trained_on: Source) -> Overlap:
    """The test images of which pre-training had a copy, byte for byte as it is stored.

    An image that was stored anew, in another format or size, is not found. Of sources that know how large their images
    are, such as local folders, only those are read of which the other has one of the same size.
    """
    counts = len(test), len(trained_on)
    sizes, others = _sizes(test), _sizes(trained_on)
    if sizes is not None and others is not None:
        in_both = set(sizes) & set(others)
        ours = [index for index, size in enumerate(sizes) if size in in_both]
        theirs = [index for index, size in enumerate(others) if size in in_both]
    elif test.remote or trained_on.remote:
        return Overlap(*counts, not_compared="one of the sources is behind a network")
    else:
        ours, theirs = list(range(len(test))), list(range(len(trained_on)))
    if max(len(ours), len(theirs)) > READ_AT_MOST:
        few = f"{len(theirs):,} would have to be read, which is done up to {READ_AT_MOST:,}"
        return Overlap(*counts, not_compared=few)
    try:
        known = {content for _, content in _contents(trained_on, theirs)}
        names = tuple(name for name, content in _contents(test, ours) if content in known)
    except NotComparable as error:
        return Overlap(*counts, not_compared=str(error))
    return Overlap(*counts, names)


def _sizes(source: Source) -> list[int] | None:
    sizes = []
    for index in range(len(source)):
        if (size := source.size(index)) is None:
            return None
        sizes.append(size)
    return sizes


def _contents(source: Source, indices: Iterable[int]) -> Iterable[tuple[str, bytes]]:
    for index in indices:
        sample = sample_or_broken(source, index)
        if not isinstance(sample, BrokenImage):
            yield sample.name, content_of(sample)


def content_of(sample: Sample) -> bytes:
    """A hash of what a source holds of a sample.

    Raises:
        NotComparable: if it is of a kind that cannot be compared.
    """
    data = sample.data
    if isinstance(data, Image.Image):
        kind, content = f"{data.mode} {data.size}", data.tobytes()
    elif isinstance(data, np.ndarray | Tensor):
        array = np.ascontiguousarray(data)
        kind, content = f"{array.dtype} {array.shape}", array.tobytes()
    elif isinstance(data, bytes):
        kind, content = "", data
    else:
        raise NotComparable(f"samples that hold {type(data).__name__} cannot be compared")
    return hashlib.sha256(f"{kind} {sample.page}\n".encode() + content).digest()
