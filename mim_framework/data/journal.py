"""Work that goes on where it was killed: a file of finished pieces, one JSON object in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mim_framework.base.errors import DataError, MimError
from mim_framework.base.text import plain_logger

logger = plain_logger(__name__)


class Journal:
    """Pieces of work in their order, behind a line that says what the work is about.

    Whoever opens it for the same work finds the pieces that are whole; a torn last line is cut off. For other work it
    begins anew, and says so.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """`about`: as JSON gives it back."""
        self.path, self.about = path, about

    def __enter__(self) -> Journal:
        """
        Raises:
            DataError: if another process works at it.
            MimError: if it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("a+b")
        except OSError as error:
            raise MimError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            lock(self._file, self.path)
            self._end = self._end_of_whole_lines()
            self._file.truncate(self._end)
            if not self._end:
                self.append(self.about)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, piece: dict[str, Any]) -> None:
        """Write down a piece that is done; whoever reads `lines` meanwhile comes to it too.

        Raises:
            MimError: if it cannot be written.
        """
        try:
            self._file.write(json.dumps(piece, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise MimError(
                f"{self.path} cannot be written: {error.strerror}; the same command goes on later"
            ) from error
        self._end = self._file.tell()

    def lines(self) -> Iterator[dict[str, Any]]:
        """The pieces so far, in order, read from the disk."""
        self._file.seek(0)
        place = len(self._file.readline())
        while place < self._end:
            self._file.seek(place)
            line = self._file.readline()
            place += len(line)
            yield json.loads(line)

    def _end_of_whole_lines(self) -> int:
        """Bytes of the lines that are whole, 0 if there are none of this work."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file):
            try:
                piece = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                piece = None
            if not isinstance(piece, dict):
                break
            if not number and piece != self.about:
                logger.warning(f"{self.path} is of other images or options; the work begins anew")
                return 0
            end += len(line)
        return end


def lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes from the same work until the file is closed, however the process ends.

    Raises:
        DataError: if another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise DataError(f"another process works at {path}; wait for it, or name another folder") from None
    except OSError as error:
        logger.warning(f"{path} cannot be locked ({error.strerror}): do not start the same command twice")
