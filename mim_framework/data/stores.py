"""Where the bytes of files are: a local folder, or one behind a URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from mim_framework.base.errors import DataError
from mim_framework.base.paths import is_url


class LocalFolder:
    num_hidden = 0
    """Hidden names that the last `list` left out; a hidden folder counts once."""

    def __init__(self, root: str, key: str) -> None:
        self._root = root
        if not os.path.isdir(root):
            problem = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            raise DataError(f"{key}: '{root}' {problem}; give a folder of images or a URL such as s3://bucket/images")

    def list(self) -> Iterator[str]:
        """Paths of all files relative to the root, in any order; links are followed, hidden names left out."""
        self.num_hidden = 0
        pending = [("", frozenset({_identity(os.stat(self._root))}))]
        while pending:
            folder, ancestors = pending.pop()
            with os.scandir(f"{self._root}/{folder}") as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        self.num_hidden += 1
                        continue
                    if not entry.is_dir():
                        yield folder + entry.name
                        continue
                    identity = _identity(entry.stat())
                    if identity not in ancestors:  # a link may lead back up
                        pending.append((f"{folder}{entry.name}/", ancestors | {identity}))

    def read(self, name: str) -> bytes:
        with open(self.path(name), "rb", buffering=0) as file:
            return file.read()

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"


class RemoteFolder:
    """A folder behind an fsspec URL. The file system is looked up where it is used, never sent to a worker."""

    num_hidden = 0
    """Files that the last `list` left out, as their name or that of a folder is hidden."""

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
        self.num_hidden = 0
        for found in file_system.find(path):
            name = found.removeprefix(path).lstrip("/")
            if any(part.startswith(".") for part in name.split("/")):
                self.num_hidden += 1
            else:
                yield name

    def read(self, name: str) -> bytes:
        file_system, path = self._file_system()
        return file_system.cat_file(f"{path.rstrip('/')}/{name}")

    def _file_system(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self._root)  # fsspec keeps one instance per process


def store_of(root: str, key: str) -> LocalFolder | RemoteFolder:
    """The folder at a local path or URL, as `base.paths` leaves them; `key` names the option in messages."""
    return RemoteFolder(root, key) if is_url(root) else LocalFolder(root, key)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
