"""Where the bytes of files are: a local folder, or one behind a URL. Start at `Store`; `store_of` makes one.

What a remote store answers is told apart: a file that is not there (`missing`) or not ours to read (`forbidden`) is
the file's fault and asked for once; a server that fails, stays silent or breaks off is asked again, and when it stays
away `Unreachable` is raised, never taken for a broken image.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mim_framework.base.errors import BrokenImage, Cause, DataError, Unreachable
from mim_framework.base.paths import is_url
from mim_framework.base.text import masked, plain_logger, unmasked
from mim_framework.data.answers import FAULTS_OF_THE_CALL, Answer, told
from mim_framework.data.file_systems import (
    HTTP,
    NOTICES_SILENCE,
    RemoteSection,
    check_address,
    open_file_system,
    protocol_of,
)

logger = plain_logger(__name__)

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.1, 15.0
"""Seconds: a wait is drawn between 0 and a bound that doubles from the first to the longest ("full jitter")."""
READING_SECONDS = 60.0
"""No further try of a read begins later than this, after the first one (obstore and cloud clients: 1 to 3 minutes)."""
LISTING_SECONDS = 18.0
"""The same for a folder's listing, on which a person waits."""
LONGEST_CALL = 600.0
"""One read or listing may take so long where silence is noticed by itself, or only its end can be waited for."""


class Store(Protocol):
    """The files below a folder. Names are relative to it, with `/` between parts."""

    remote: bool
    """True if it opens network connections."""
    num_hidden: int
    """Hidden names that the last `list` left out; a hidden folder counts once."""

    def list(self) -> Iterator[str]:
        """Names of all files, in any order; hidden ones (`.name`, also of folders) are left out.

        Raises:
            Unreachable: if a remote store does not answer.
            OSError: if a folder cannot be listed.
        """

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A file, or `length` bytes from `start`; fewer only where the file ends.

        Raises:
            BrokenImage: if this file cannot be read.
            Unreachable: if a remote store does not answer, after the last try.
        """

    def size(self, name: str) -> int:
        """Bytes of a file, without reading it; raises as `read` does."""


class Tally:
    """Counts of this process by name, also of reads in several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)


REMOTE = Tally()
"""`retries`: tries that were made again. `unreachable`: reads and listings that were given up.

A reset of a kept connection that an HTTP library repeats by itself is not seen.
"""


class LocalStore:
    """A folder of this machine."""

    remote = False
    num_hidden = 0

    def __init__(self, root: str, key: str) -> None:
        self._root = root
        if not os.path.isdir(root):
            problem = "is a file, not a folder" if os.path.exists(root) else "does not exist"
            raise DataError(f"{key}: '{root}' {problem}; give a folder of images or a URL such as s3://bucket/images")

    def list(self) -> Iterator[str]:
        """As `Store.list`; links are followed."""
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

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with open(self.path(name), "rb", buffering=0) as file:
                if start:
                    file.seek(start)
                return file.read() if length is None else _read_exactly(file, length)
        except OSError as error:
            raise BrokenImage(name, "unreadable", f"{type(error).__name__}: {error}") from error

    def size(self, name: str) -> int:
        try:
            return os.stat(self.path(name)).st_size
        except OSError as error:
            raise BrokenImage(name, "unreadable", f"{type(error).__name__}: {error}") from error

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _read_exactly(file: Any, length: int) -> bytes:
    """A raw file may give less than was asked for before its end."""
    parts: list[bytes] = []
    while length > 0 and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


_SENDS_WHOLE_FILES: set[str] = set()
"""Roots of which this was said."""


class RemoteStore:
    """A folder behind an fsspec URL. The file system is looked up where it is used, never sent to a worker."""

    remote = True
    num_hidden = 0

    def __init__(self, root: str, key: str, patience: RemoteSection | None = None) -> None:
        """Opens nothing; `list` does.

        Raises:
            DataError: if no installed file system takes the URL.
        """
        self._root, self._key, self._patience = root, key, patience or RemoteSection()
        self._protocol = protocol_of(root)
        check_address(root, key)
        try:
            self._file_system()
        except ImportError as error:
            raise DataError(f"{key}: '{root}' needs another package: {error}") from None
        except Exception as error:
            raise DataError(f"{key}: '{root}' cannot be opened: {type(error).__name__}: {error}") from error

    def list(self) -> Iterator[str]:
        """As `Store.list`. Folder by folder, since what walks for us leaves out folders that fail."""
        file_system, top = self._file_system()
        top = top.rstrip("/")
        self.num_hidden = 0
        pending, seen = [top], {top}
        while pending:
            folder = pending.pop()
            for name, is_folder in self._entries(file_system, folder, top):
                if not name.startswith(top + "/"):
                    continue
                below = name.removeprefix(top).strip("/")
                nameless = is_folder and name == folder + "/" and self._protocol not in HTTP  # of `folder//file`
                if nameless or below.rpartition("/")[2].startswith("."):
                    self.num_hidden += 1
                elif not is_folder:
                    if not name.endswith("/"):  # else the object that stands for an empty folder
                        yield below
                elif name.rstrip("/") not in seen:
                    seen.add(name.rstrip("/"))
                    pending.append(name.rstrip("/"))

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        file_system, top = self._file_system()
        path = f"{top.rstrip('/')}/{name}"
        end = None if length is None else start + length

        def once() -> bytes:
            if start == 0 and end is None:
                return _call(file_system, "cat_file", path, seconds=self._limit())
            limit = self._limit()
            data: bytes = _call(file_system, "cat_file", path, start=start, end=end, seconds=limit)
            if end is not None and len(data) < end - start:
                size = _call(file_system, "info", path, seconds=limit).get("size")
                if size is None or min(end, size) - start != len(data):
                    raise ConnectionError(f"{len(data)} bytes of {end - start}, from byte {start}")
            if end is None or len(data) <= end - start:
                return data
            size = _call(file_system, "info", path, seconds=limit).get("size")
            if len(data) not in (size, None if size is None else size - start):
                raise ConnectionError(f"{len(data)} bytes of {end - start}, from byte {start}, of a file of {size}")
            if len(data) == size:
                self._say_whole_files()
                return data[start:end]
            return data[:length]  # what follows, too

        return self._of_file(name, once)

    def _say_whole_files(self) -> None:
        """Once a process."""
        if self._root not in _SENDS_WHOLE_FILES:
            _SENDS_WHOLE_FILES.add(self._root)
            logger.warning(
                f"{self._key}: '{self._root}' sends whole files where parts are asked for, so that a part costs all of "
                "its file; use a server that knows ranges"
            )

    def size(self, name: str) -> int:
        file_system, top = self._file_system()

        def once() -> int:
            found = _call(file_system, "info", f"{top.rstrip('/')}/{name}", seconds=self._limit())
            if found.get("size") is None:
                raise OSError("the server does not say how long the file is")
            return int(found["size"])

        return self._of_file(name, once)

    def _of_file(self, name: str, once: Callable[[], T]) -> T:
        try:
            return self._patiently(once, READING_SECONDS)
        except _Refused as refused:
            if refused.of_the_store:
                raise Unreachable(
                    f"{self._key}: '{self._root}' refuses every file, not only '{name}': {refused}. The image is "
                    "not at fault and none is taken in its place; see to the credentials, the bucket and the options"
                ) from refused
            raise BrokenImage(name, refused.cause, f"{refused}") from refused
        except _GivenUp as given_up:
            raise Unreachable(
                f"{self._key}: '{self._root}' does not answer: '{name}' could not be read, {given_up}. "
                "The image is not at fault and none is taken in its place; see to the server or the network, or raise "
                f"{self._sibling('retries')} or {self._sibling('timeout')}"
            ) from given_up

    def _entries(self, file_system: Any, folder: str, top: str) -> list[tuple[str, bool]]:
        """(path, whether it is a folder) of what a folder holds."""

        def once() -> list[tuple[str, bool]]:
            listed = _call(file_system, "ls", folder, detail=True, seconds=LONGEST_CALL)
            return [(entry["name"], entry["type"] == "directory") for entry in listed]

        shown = self._root.rstrip("/") + folder.removeprefix(top)
        try:
            entries = self._patiently(once, LISTING_SECONDS, waiting=f"{self._key}: '{shown}' cannot be listed yet")
        except _Refused as refused:
            if refused.cause == "missing":
                text = f"{self._key}: '{shown}' does not exist or is not a folder; check the URL and the credentials"
                raise DataError(text) from refused
            raise DataError(f"{self._key}: '{shown}' cannot be listed: {refused}") from refused
        except _GivenUp as given_up:
            raise Unreachable(
                f"{self._key}: '{shown}' cannot be listed, the server does not answer: {given_up}; see to the server "
                f"or the network, or raise {self._sibling('timeout')}"
            ) from given_up
        if len(entries) == 1 and entries[0][0].rstrip("/") == folder and not entries[0][1]:
            raise DataError(f"{self._key}: '{shown}' does not exist or is not a folder; check the URL")
        return entries

    def _sibling(self, option: str) -> str:
        """The key of an option beside that of the root."""
        return f"{self._key.rpartition('.')[0] or 'data.source'}.{option}"

    def _limit(self) -> float:
        """Seconds for a whole read: few where nothing else notices a server that is silent."""
        return LONGEST_CALL if self._protocol in NOTICES_SILENCE else self._patience.timeout

    def _patiently(self, once: Callable[[], T], seconds: float, *, waiting: str = "") -> T:
        """What `once` gives, asked again while it fails for a reason that may pass.

        Args:
            waiting: told at the first failure, where somebody waits.

        Raises:
            _Refused: if there is no point in asking again.
            _GivenUp: after the last try.
        """
        began = time.monotonic()
        for number in range(1 + self._patience.retries):
            if number:
                REMOTE.add("retries")
            try:
                return once()
            except FAULTS_OF_THE_CALL:
                raise
            except Exception as error:  # file systems raise the errors of their network libraries too
                answer = Answer.of(error)
                if answer.cause is not None:
                    raise _Refused(answer.cause, told(error), of_the_store=answer.of_the_store) from error
                last = error
            if waiting and not number and self._patience.retries:
                logger.warning(f"{waiting}: {told(last)}; asking again for up to {seconds:.0f} s")
            wait = wait_before(number + 1)
            if number == self._patience.retries or time.monotonic() - began + wait > seconds:
                break
            time.sleep(wait)
        REMOTE.add("unreachable")
        tried = f"tried {number + 1} times in {time.monotonic() - began:.0f} s"
        raise _GivenUp(f"{tried}, at last {told(last)}") from last

    def _file_system(self) -> tuple[Any, str]:
        return open_file_system(self._root, self._patience)


def store_of(root: str, key: str, patience: RemoteSection | None = None) -> LocalStore | RemoteStore:
    """The store at a local path or URL, as `base.paths` leaves them; `key` names the option in messages."""
    if masked(root):
        return _without_its_secret(root, key, patience)
    return RemoteStore(root, key, patience) if is_url(root) else LocalStore(root, key)


class _Refused(Exception):
    """An answer that will not change."""

    def __init__(self, cause: Cause, text: str, *, of_the_store: bool) -> None:
        super().__init__(text)
        self.cause, self.of_the_store = cause, of_the_store


class _GivenUp(Exception):
    """No answer, after the last try."""


_JITTER = random.SystemRandom()
"""Without a seed, and apart from every generator that a run draws from."""


def wait_before(retry: int) -> float:
    """Seconds to wait before the first, second, ... further try: "full jitter", so that many clients spread."""
    return _JITTER.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (retry - 1)))


def _call(file_system: Any, method: str, *args: Any, seconds: float, **kwargs: Any) -> Any:
    """A method of a file system that is given up after so many seconds.

    Raises:
        TimeoutError: then.
    """
    if getattr(file_system, "async_impl", False):
        from fsspec.asyn import sync

        function = getattr(file_system, f"_{method}")
        return sync(file_system.loop, lambda: asyncio.wait_for(function(*args, **kwargs), seconds))
    call = _Call(lambda: getattr(file_system, method)(*args, **kwargs))
    threading.Thread(target=call.run, daemon=True).start()
    return call.result(seconds)


@dataclass
class _Call:
    """One call in a thread that can be left behind."""

    function: Callable[[], Any]

    def __post_init__(self) -> None:
        self._done = threading.Event()

    def run(self) -> None:
        try:
            self._value, self._error = self.function(), None
        except BaseException as error:
            self._value, self._error = None, error
        self._done.set()

    def result(self, seconds: float) -> Any:
        if not self._done.wait(seconds):
            raise TimeoutError(f"no answer within {seconds:g} s")
        if self._error is not None:
            raise self._error
        return self._value


def _without_its_secret(root: str, key: str, patience: RemoteSection | None) -> RemoteStore:
    """A folder whose password a run did not write down, with the credentials of the environment.

    Raises:
        DataError: saying how to give the password again.
    """
    try:
        return RemoteStore(unmasked(root), key, patience)
    except DataError as error:
        cure = f"give the whole URL again, {key}=URL, or credentials in the environment"
        raise DataError(f"{error}. Its password or signature was not written down: {cure}") from error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
