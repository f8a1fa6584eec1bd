"""Images in a bucket of S3, read through s3fs: a run is that from disk, whatever single requests do.

The server is moto's, on this machine, behind a proxy that fails requests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from remote import NUM_IMAGES, assert_counted, counted, nothing_replaced, pictures, run, run_until_it_ends
from s3 import BUCKET, SECRET, bucket_of, credentials, failing, put
from web import FAULTS, Faults

from mim_framework.base.errors import BrokenImage, DataError, Unreachable
from mim_framework.checkpoints.checkpoint import find_latest
from mim_framework.commands.check import report
from mim_framework.data import stores
from mim_framework.data.file_systems import RemoteSection
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.stores import REMOTE, RemoteStore, store_of
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

pytest.importorskip("s3fs")
pytest.importorskip("moto")

pytestmark = pytest.mark.slow  # the server takes a second or two to start

ROOT = f"s3://{BUCKET}/images"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def from_disk(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tmp_path_factory.mktemp("disk"), str(images))


@pytest.fixture(scope="module")
def port(images: Path) -> Iterator[int]:
    with bucket_of(images) as port:
        yield port


@pytest.fixture(autouse=True)
def with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(monkeypatch)
    forkserver._forkserver._stop()  # one that an earlier test began knows no credentials, and neither do its workers
    monkeypatch.setattr(stores, "FIRST_WAIT", 1e-3)
    REMOTE.take()


def store(endpoint: str, root: str = ROOT, **patience: Any) -> RemoteStore:
    section = RemoteSection(storage_options={"endpoint_url": endpoint}, **patience)
    found = store_of(root, "data.source.root", section)
    assert isinstance(found, RemoteStore)
    return found


def run_on(endpoint: str, folder: Path, **options: Any) -> dict[str, str]:
    return run(folder, ROOT, storage_options={"endpoint_url": endpoint}, **options)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_bucket_is_that_on_the_folder(tmp_path, port, from_disk, monkeypatch, workers: int):
    """Workers are processes that were not forked; the endpoint comes from the recipe or the environment."""
    faults = Faults()
    with failing(port, faults) as endpoint:
        if workers:
            assert run_on(endpoint, tmp_path, workers=workers) == from_disk
        else:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            assert run(tmp_path, ROOT) == from_disk
    assert counted(tmp_path) == {}
    assert set(faults.asked) == {f"/{BUCKET}/images/{number:02d}.png" for number in range(NUM_IMAGES)}
    assert faults.heads == 0  # one request an image
    assert nothing_replaced(tmp_path)


def test_objects_that_fail_twice_are_read_at_the_third_try(tmp_path, port, from_disk):
    faults = Faults(0.3, times=2)
    with failing(port, faults) as endpoint:
        assert run_on(endpoint, tmp_path, timeout=0.3) == from_disk
    assert faults.failed.total() >= 10
    assert len(faults.failed) >= 3
    assert_counted(tmp_path, faults)
    assert nothing_replaced(tmp_path)


@pytest.mark.parametrize("retries", [1, 9])
def test_with_independent_faults_a_run_ends_with_the_same_bits_or_stops_saved(tmp_path, port, from_disk, retries: int):
    """With one further try, about one read in eleven is given up: every stop makes a checkpoint, and it goes on."""
    faults = Faults(0.3, independent=True, kinds=("500", "503", "reset", "short"))
    with failing(port, faults) as endpoint:
        options = {"storage_options": {"endpoint_url": endpoint}, "retries": retries}
        found, stops = run_until_it_ends(tmp_path, ROOT, faults, **options)
    assert found == from_disk
    assert stops == 0 if retries == 9 else stops > 0
    assert_counted(tmp_path, faults)
    assert counted(tmp_path).get("unreachable", 0) == stops


def test_a_server_that_stays_away_stops_the_run_after_a_checkpoint(tmp_path, port, from_disk):
    message = rf"'{ROOT}' does not answer: '\d\d.png' could not be read, tried 3 times"
    with failing(port, Faults(gone_after=30)) as endpoint, pytest.raises(Unreachable, match=message):
        run_on(endpoint, tmp_path, retries=2)
    assert find_latest(tmp_path / "tiny" / "checkpoints").step == 3
    assert counted(tmp_path) == {"retries": 2, "unreachable": 1}
    assert nothing_replaced(tmp_path)
    with failing(port) as endpoint:
        assert run_on(endpoint, tmp_path, retries=2) == from_disk


def test_credentials_that_end_stop_the_run_after_a_checkpoint_and_break_no_image(tmp_path, port, from_disk):
    message = rf"'{ROOT}' refuses every file, .*: PermissionError: said ExpiredToken"
    with failing(port, Faults(gone_after=43, gone="expired")) as endpoint, pytest.raises(Unreachable, match=message):
        run_on(endpoint, tmp_path)
    assert find_latest(tmp_path / "tiny" / "checkpoints").step == 5
    assert nothing_replaced(tmp_path)
    with failing(port) as endpoint:
        assert run_on(endpoint, tmp_path) == from_disk


def test_credentials_reach_no_file_of_a_run(tmp_path, port, capsys):
    with failing(port) as endpoint:
        run_on(endpoint, tmp_path)
        said = report(load_recipe(tmp_path / "tiny" / "recipe.yaml", (), Registry()), Registry())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes() or b"AKIATEST" in path.read_bytes()] == []
    captured = capsys.readouterr()
    assert SECRET not in said + captured.out + captured.err
    assert f"endpoint_url: {endpoint}" in (tmp_path / "tiny" / "recipe.yaml").read_text()


# --- the store -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cat/b c+d%20e#f.png", "Übung/写真.png"])
def test_names_are_those_of_the_objects_and_what_stands_for_a_folder_is_none(port, name: str):
    prefix = name[0]
    for key in (name, "", f"{name.partition('/')[0]}/", ".hidden/x.png", "a//nameless.png"):
        put(port, f"/{BUCKET}/{prefix}/{key}", b"content of an object" if key == name else b"")
    with failing(port) as endpoint:
        found = store(endpoint, f"s3://{BUCKET}/{prefix}")
        assert list(found.list()) == [name]
        assert found.num_hidden == 2
        assert found.read(name) == b"content of an object"
        assert found.read(name, 8, 5) == b"of an"
        assert found.read(name, 14) == b"object"
        assert found.read(name, 14, 99) == b"object"
        assert found.size(name) == 20
    assert REMOTE.take() == {}


@pytest.mark.parametrize("start", [20, 99])
def test_what_lies_behind_the_end_of_an_object_is_the_objects_fault(port, start: int):
    put(port, f"/{BUCKET}/range/x.png", b"content of an object")
    with failing(port) as endpoint, pytest.raises(BrokenImage, match=r"x.png: unreadable: .*range is not satisfiable"):
        store(endpoint, f"s3://{BUCKET}/range").read("x.png", start, 3)
    assert REMOTE.take() == {}


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("s3://no-such-bucket/images", "does not exist or is not a folder; check the URL and the credentials"),
        (f"s3://{BUCKET}/nothing", "does not exist or is not a folder; check the URL and the credentials"),
        (f"{ROOT}/00.png", "does not exist or is not a folder; check the URL"),
        ("s3://Bad_Bucket!/x", "cannot be listed: ParamValidationError: Parameter validation failed: Invalid bucket"),
    ],
)
def test_a_bucket_or_folder_that_is_not_there_is_one_sentence(port, root: str, message: str):
    with failing(port) as endpoint, pytest.raises(DataError) as info:
        FolderSource(FolderSource.Config(root=root, storage_options={"endpoint_url": endpoint}))
    assert not isinstance(info.value, Unreachable)
    assert str(info.value).startswith(f"data.source.root: '{root}' {message}")
    assert "\n" not in str(info.value)
    assert REMOTE.take() == {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [("403", "said AccessDenied"), ("expired", "said ExpiredToken"), ("wrong", "said InvalidAccessKeyId")],
)
def test_a_bucket_of_another_is_one_sentence(port, kind: str, message: str):
    text = f"^data.source.root: '{ROOT}' cannot be listed: PermissionError: {message}$"
    listings = Faults(1.0, times=1, kinds=(kind,))
    with failing(port, listings=listings) as endpoint, pytest.raises(DataError, match=text):
        list(store(endpoint).list())
    assert REMOTE.take() == {}


def test_without_credentials_nothing_is_asked(port, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with failing(port) as endpoint:
        with pytest.raises(DataError, match="cannot be listed: NoCredentialsError: Unable to locate credentials$"):
            list(store(endpoint).list())
        section = RemoteSection(storage_options={"endpoint_url": endpoint, "anon": True})
        assert len(list(store_of(ROOT, "data.source.root", section).list())) == NUM_IMAGES


@pytest.mark.parametrize("kind", FAULTS)
def test_a_listing_and_an_object_that_fail_twice_are_whole(port, images, kind: str):
    faults, listings = Faults(1.0, kinds=(kind,)), Faults(1.0, kinds=(kind,))
    with failing(port, faults, listings) as endpoint:
        found = store(endpoint, timeout=0.3)
        assert len(list(found.list())) == NUM_IMAGES
        assert found.read("07.png") == (images / "07.png").read_bytes()
    assert listings.failed == faults.failed == {kind: 2}
    retries = REMOTE.take()["retries"]
    assert retries == 4 or (kind == "reset" and retries >= 2)


def test_a_server_that_is_not_there_is_said_within_bounds(monkeypatch):
    monkeypatch.setattr(stores, "LISTING_SECONDS", 0.5)
    with pytest.raises(Unreachable, match=r"cannot be listed, the server does not answer: tried \d+ times in \d+ s"):
        list(store("http://127.0.0.1:9").list())
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
