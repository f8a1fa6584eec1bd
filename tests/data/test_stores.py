"""Stores: what a server answers is told apart, asked again where that may help, and never taken for a broken image."""

from __future__ import annotations

import errno
import pickle
import random
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from mim_framework.base.errors import BrokenImage, DataError, Unreachable
from mim_framework.data import stores
from mim_framework.data.answers import Answer
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.stores import REMOTE, LocalStore, RemoteSection, RemoteStore, store_of, wait_before


class FlakyFileSystem(MemoryFileSystem):
    """Raises what `errors` holds for a path, one after the other, before it answers."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    errors: ClassVar[dict[str, list[Exception | float]]] = {}
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.fail(path)
        return super().cat_file(path, start=start, end=end, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self.fail(path)
        return super().ls(path, detail=detail, **kwargs)

    def fail(self, path: str) -> None:
        self.asked.append(path)
        if self.errors.get(path):
            error = self.errors[path].pop(0)
            if isinstance(error, Exception):
                raise error
            time.sleep(error)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


class AnswerError(Exception):
    """As the libraries of network file systems raise them: the status is an attribute."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answer {status}")
        self.status = status


class BotoError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__("boto")
        self.response = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyFileSystem]:
    monkeypatch.setattr(stores, "FIRST_WAIT", 1e-4)
    monkeypatch.setattr(stores, "LONGEST_WAIT", 1e-3)
    files = fsspec.filesystem("flaky")
    files.pipe("/bucket/cat/1.png", b"one of ten")
    files.pipe("/bucket/dog/2.png", b"two")
    FlakyFileSystem.errors.clear()
    FlakyFileSystem.asked.clear()
    REMOTE.take()
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    REMOTE.take()


def store(retries: int = 5, timeout: float = 10.0) -> RemoteStore:
    return RemoteStore("flaky://bucket", "data.source.root", RemoteSection(retries=retries, timeout=timeout))


# --- causes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (AnswerError(500), None), (AnswerError(503), None), (AnswerError(429), None), (AnswerError(408), None),
        (BotoError(503), None), (ConnectionResetError(errno.ECONNRESET, "reset"), None), (TimeoutError(), None),
        (OSError(errno.EIO, "input/output"), None), (EOFError("short"), None), (Exception("of a library"), None),
        (AnswerError(404), "missing"), (AnswerError(410), "missing"), (FileNotFoundError("x"), "missing"),
        (BotoError(404), "missing"), (AnswerError(403), "forbidden"), (AnswerError(401), "forbidden"),
        (PermissionError("x"), "forbidden"), (BotoError(403), "forbidden"), (AnswerError(416), "unreadable"),
        (IsADirectoryError("x"), "unreadable"), (ValueError("no such name"), "unreadable"),
    ],
)  # fmt: skip
def test_only_what_is_known_to_be_the_files_fault_is(error: Exception, cause: str | None):
    assert Answer.of(error) == Answer(cause)


@pytest.mark.parametrize(("status", "cause"), [(404, "missing"), (403, "forbidden")])
def test_a_missing_or_forbidden_file_is_asked_for_once(flaky: FlakyFileSystem, status: int, cause: str):
    flaky.errors["/bucket/cat/1.png"] = [AnswerError(status)]
    with pytest.raises(BrokenImage, match=rf"cat/1\.png: {cause}: AnswerError: answer {status}") as info:
        store().read("cat/1.png")
    assert info.value.cause == cause
    assert flaky.asked == ["/bucket/cat/1.png"]
    assert REMOTE.take() == {}


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [AnswerError(503), ConnectionResetError(errno.ECONNRESET, "reset")])
def test_what_may_pass_is_asked_for_again_and_counted(flaky: FlakyFileSystem, error: Exception):
    flaky.errors["/bucket/dog/2.png"] = [error] * 3
    assert store().read("dog/2.png") == b"two"
    assert len(flaky.asked) == 4
    assert REMOTE.take() == {"retries": 3}


@pytest.mark.parametrize("retries", [0, 2])
def test_after_the_last_try_the_store_is_unreachable_and_the_image_is_not_broken(flaky: FlakyFileSystem, retries: int):
    flaky.errors["/bucket/dog/2.png"] = [AnswerError(500)] * 9
    with pytest.raises(Unreachable) as info:
        store(retries).read("dog/2.png")
    assert not isinstance(info.value, BrokenImage)
    for part in (
        f"data.source.root: 'flaky://bucket' does not answer: 'dog/2.png' could not be read, tried {retries + 1} times",
        "at last AnswerError: answer 500",
        "The image is not at fault",
        "data.source.retries or data.source.timeout",
    ):
        assert part in str(info.value)
    assert len(flaky.asked) == retries + 1
    assert REMOTE.take() == {**({"retries": retries} if retries else {}), "unreachable": 1}
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


@pytest.mark.parametrize("path", ["cat/1.png", "dog/2.png"])
def test_silence_is_given_up_and_asked_again(flaky: FlakyFileSystem, path: str):
    flaky.errors[f"/bucket/{path}"] = [0.5]
    began = time.monotonic()
    assert store(timeout=0.05).read(path) in (b"two", b"one of ten")
    assert time.monotonic() - began < 0.4
    assert REMOTE.take() == {"retries": 1}


def test_waits_double_up_to_a_bound_and_are_drawn_below_it():
    for retry, bound in [(1, 0.1), (2, 0.2), (5, 1.6), (9, 15.0), (30, 15.0)]:
        waits = [wait_before(retry) for _ in range(200)]
        assert 0 <= min(waits) < 0.2 * bound
        assert 0.8 * bound < max(waits) <= bound


def test_retries_draw_from_no_generator_of_the_run(flaky: FlakyFileSystem):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()  # noqa: NPY002
    flaky.errors["/bucket/dog/2.png"] = [AnswerError(500)] * 4
    store().read("dog/2.png")
    assert (random.getstate(), np.random.get_state()[2]) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_error_of_code_is_raised_as_it_is(flaky: FlakyFileSystem):
    flaky.errors["/bucket/dog/2.png"] = [TypeError("wrong argument")]
    with pytest.raises(TypeError, match="wrong argument"):
        store().read("dog/2.png")


# --- listings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/bucket", "/bucket/dog"])
def test_a_folder_that_fails_is_listed_again_and_never_left_out(flaky: FlakyFileSystem, folder: str):
    flaky.errors[folder] = [AnswerError(500), TimeoutError()]
    assert sorted(store().list()) == ["cat/1.png", "dog/2.png"]
    flaky.errors[folder] = [AnswerError(500)] * 9
    with pytest.raises(Unreachable, match=r"'flaky://bucket(/dog)?' cannot be listed, the server does not answer"):
        list(store(retries=1).list())


def test_who_waits_for_a_listing_is_told_once(flaky: FlakyFileSystem, caplog: pytest.LogCaptureFixture):
    flaky.errors["/bucket"] = [AnswerError(500)] * 3
    assert len(list(store().list())) == 2
    assert caplog.messages == [
        "data.source.root: 'flaky://bucket' cannot be listed yet: AnswerError: answer 500; asking again for up to 18 s"
    ]


@pytest.mark.parametrize(("status", "text"), [(404, "does not exist or is not a folder"), (403, "cannot be listed")])
def test_a_folder_of_another_is_named(flaky: FlakyFileSystem, status: int, text: str):
    flaky.errors["/bucket"] = [AnswerError(status)]
    with pytest.raises(DataError, match=f"data.source.root: 'flaky://bucket' {text}"):
        FolderSource(FolderSource.Config(root="flaky://bucket"))


# --- ranges and sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 3, b"one"), (4, 2, b"of"), (7, None, b"ten"), (7, 99, b"ten"), (0, None, b"one of ten")],
)
def test_a_range_is_the_same_here_and_there(flaky: FlakyFileSystem, tmp_path, start, length, expected):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"one of ten")
    for each in (store(), LocalStore(str(tmp_path), "key")):
        assert each.read("cat/1.png", start, length) == expected
        assert each.size("cat/1.png") == 10
        assert each.remote == isinstance(each, RemoteStore)


def test_a_short_answer_is_no_answer(flaky: FlakyFileSystem, monkeypatch: pytest.MonkeyPatch):
    whole = FlakyFileSystem.cat_file
    answers = iter([2, 3, 4])
    monkeypatch.setattr(FlakyFileSystem, "cat_file", lambda *a, **k: whole(*a, **k)[: next(answers)])
    assert store().read("cat/1.png", 0, 4) == b"one "
    assert REMOTE.take() == {"retries": 2}


@pytest.mark.parametrize("name", ["gone.png", "cat/gone.png"])
def test_a_file_that_is_not_there_is_broken_in_every_store(flaky: FlakyFileSystem, tmp_path, name: str):
    with pytest.raises(BrokenImage, match=f"{name}: missing"):
        store().read(name)
    with pytest.raises(BrokenImage, match=f"{name}: unreadable: FileNotFoundError"):
        store_of(str(tmp_path), "key").read(name)
