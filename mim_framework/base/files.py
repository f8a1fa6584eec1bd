"""Writing files so that a crash loses nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mim_framework.base.text import plain_logger

logger = plain_logger(__name__)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once: a kill at any moment leaves the old one or the new, whole and on the disk."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, *, in_folder: bool = False) -> Iterator[Path]:
    """A name to write a file under, which then takes the place of `path`: whole and on the disk, or not at all.

    A kill leaves `.NAME.tmp` beside it, which the next call for the same path takes away.

    Args:
        in_folder: give a name in a folder of its own, for libraries such as safetensors that write to files with names
            of their choice, which a kill would leave too.
    """
    aside = _aside(path)
    temporary = aside / path.name if in_folder else aside
    try:
        if in_folder:
            aside.mkdir()
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        _remove(aside)


def _aside(path: Path) -> Path:
    """The hidden name beside `path` under which it is made; what a kill has left there is taken away."""
    aside = path.with_name(f".{path.name}.tmp")
    _remove(aside)
    return aside


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write files to, which then appears as `path`: whole and on the disk, or not at all."""
    temporary = _aside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for each in temporary.iterdir():
            flush(each)
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_of(path: Path) -> bytes:
    """What a regular file holds; nothing of what is none, such as a device or a pipe, which need not have an end.

    Raises:
        OSError: if it cannot be read.
    """
    return path.read_bytes() if path.is_file() else b""


class SideFile:
    """A list beside a run, one line at a time. It is not worth a run: what cannot be written is warned about once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failed = False

    def append(self, lines: Iterable[str]) -> None:
        """Add lines, which bear no line feed."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # on a machine that does not share the folder
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as error:
            if not self._failed:
                logger.warning(f"cannot write {self.path}: {error.strerror}. The run goes on without it")
            self._failed = True
