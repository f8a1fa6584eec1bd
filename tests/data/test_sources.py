from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys

import fsspec
import numpy as np
import pytest
from PIL import Image as pil
from pydantic import ValidationError
from torchvision import datasets

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.contract.components import Source
from mim_framework.data.sources import digits, folder
from mim_framework.data.sources.digits import DigitsSource
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.sources.torchvision import TorchvisionSource
from mim_framework.data.views import ImageViews


def png(value: int) -> bytes:
    file = io.BytesIO()
    pil.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def folder_source(root, **options) -> FolderSource:
    return FolderSource(FolderSource.Config(root=str(root), **options))


def write(root, names: list[str]) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))


# --- folder ------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_recursively_in_the_order_of_its_paths(tmp_path):
    write(
        tmp_path, ["b/2.JPEG", "a/deep/er/3.webp", "z.png", "B.png", "a.png", "notes.txt", ".cache/1.png", "a/._1.jpg"]
    )
    source = folder_source(tmp_path)
    names = [source.read(i).name for i in range(len(source))]
    assert names == ["B.png", "a.png", "a/deep/er/3.webp", "b/2.JPEG", "z.png"]
    assert source.read(1) == source.read(1)
    assert source.read(1).data == png(4)
    assert source.read(1).label is None
    assert source.classes is None
    assert source.evaluation_sources() is None


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "real", ["1.png"])
    write(tmp_path / "data", ["2.png"])
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data")
    source = folder_source(tmp_path / "data")
    assert [source.read(i).name for i in range(len(source))] == ["2.png", "linked/1.png"]


def test_names_that_are_not_unicode_are_read(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(png(3))
    assert folder_source(tmp_path).read(0).data == png(3)


def test_labels_are_the_first_folder(tmp_path):
    write(tmp_path, ["cat/1.png", "cat/more/2.png", "dog/1.png"])
    source = folder_source(tmp_path, labels=True)
    assert source.classes == ["cat", "dog"]
    assert [source.read(i).label for i in range(3)] == [0, 0, 1]


def test_an_image_outside_of_the_class_folders_is_named(tmp_path):
    write(tmp_path, ["cat/1.png", "loose.png"])
    with pytest.raises(DataError, match=r"'loose.png' lies directly in .* set data.source.labels=false"):
        folder_source(tmp_path, labels=True)


def test_a_missing_folder_is_named_with_what_would_work(tmp_path):
    with pytest.raises(
        DataError, match=r"data.source.root: '.*nowhere' does not exist; give a folder of images or a URL"
    ):
        folder_source(tmp_path / "nowhere")
    write(tmp_path, ["1.png"])
    with pytest.raises(DataError, match="is a file, not a folder"):
        folder_source(tmp_path / "1.png")


def test_a_folder_without_images_is_named_with_the_suffixes(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no images below '.*'; files are taken by their suffix, one of .*\.jpg"):
        folder_source(tmp_path)


def test_a_file_that_vanished_is_a_broken_image(tmp_path):
    write(tmp_path, ["1.png"])
    source = folder_source(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(BrokenImage, match=r"1.png: unreadable: FileNotFoundError") as info:
        source.read(0)
    assert info.value.cause == "unreadable"


# --- what is left out, and pages ---------------------------------------------------------------------------------


def test_files_that_are_not_listed_are_counted_by_their_suffix(tmp_path):
    write(tmp_path, ["1.png", "a.HEIC", "b/c.heic", "2.cr2", "no_suffix", "b/neither", ".hidden.png", ".git/3.png"])
    assert folder_source(tmp_path).left_out() == ["2 .heic", "2 without a suffix", "1 .cr2", "2 hidden"]
    write(tmp_path / "only", ["1.png", "2.png"])
    assert folder_source(tmp_path / "only").left_out() == []


def test_many_suffixes_are_told_together_and_never_reach_the_terminal_raw(tmp_path):
    write(tmp_path, ["1.png", *(f"{i}.{chr(97 + i)}{i}" for i in range(12)), "x.\x1b[31m", "y.\x1b[31m"])
    left_out = folder_source(tmp_path).left_out()
    assert left_out[0] == "2 .?[31m"
    assert left_out[-1] == "5 of other suffixes"
    assert len(left_out) == 9


def test_a_folder_without_images_says_what_is_there(tmp_path):
    write(tmp_path, ["1.dcm", "2.dcm", ".3.png"])
    with pytest.raises(DataError, match=r"no images below .*; there are 2 \.dcm, 1 hidden"):
        folder_source(tmp_path)


def volume(pages: int, format: str) -> bytes:
    file = io.BytesIO()
    greys = [pil.new("L", (4, 4), 10 * i) for i in range(1, pages + 1)]
    greys[0].save(file, format, save_all=True, append_images=greys[1:])
    return file.getvalue()


@pytest.fixture
def volumes(tmp_path):
    write(tmp_path / "v", ["a/1.png", "c/3.tif"])
    (tmp_path / "v" / "b.tiff").write_bytes(volume(4, "TIFF"))
    (tmp_path / "v" / "c" / "2.gif").write_bytes(volume(3, "GIF"))
    return tmp_path / "v"


def test_further_pages_are_counted_where_only_the_first_is_read(volumes):
    source = folder_source(volumes)
    assert len(source) == 4
    assert source.left_out() == ["5 later pages of 2 files (data.source.pages=each makes samples of them)"]
    assert [source.read(i).page for i in range(4)] == [0, 0, 0, 0]


def test_of_many_files_a_part_is_looked_into(volumes, monkeypatch):
    monkeypatch.setattr(folder, "FILES_LOOKED_INTO", 2)
    [said] = folder_source(volumes).left_out()
    assert said == "3 later pages of 1 files among 2 of 3 looked into (data.source.pages=each makes samples of them)"


def test_every_page_may_be_a_sample_with_a_name_of_its_own(volumes):
    source = folder_source(volumes, pages="each")
    samples = [source.read(i) for i in range(len(source))]
    pages = [*(f"b.tiff#{i}" for i in range(1, 5)), *(f"c/2.gif#{i}" for i in range(1, 4))]
    assert [sample.name for sample in samples] == ["a/1.png", *pages, "c/3.tif"]
    assert [sample.page for sample in samples] == [0, 0, 1, 2, 3, 0, 1, 2, 0]
    assert samples[3].data == samples[1].data == volume(4, "TIFF")
    assert source.left_out() == []
    pixels = [ImageViews(ImageViews.Config(img_size=4)).evaluation_view(sample).max().item() for sample in samples[1:5]]
    assert pixels == [10, 20, 30, 40]


def test_pages_of_remote_files_are_read_too(memory):
    memory.pipe("/bucket/a.tif", volume(3, "TIFF"))
    memory.pipe("/bucket/b.png", png(1))
    memory.pipe("/bucket/c.txt", b"")
    assert len(folder_source("memory://bucket", pages="each")) == 4
    said = folder_source("memory://bucket").left_out()
    assert said[0] == "1 .txt"
    assert said[1].startswith("pages after the first of 1 files, if they have any")


# --- identity ----------------------------------------------------------------------------------------------------


def differing(then: dict, now: dict) -> list[str]:
    return [key for key in now if then[key] != now[key]]


def test_the_identity_of_a_folder_is_its_names_and_sizes_wherever_it_lies(tmp_path):
    for place in ("here", "there"):
        write(tmp_path / place, ["a/1.png", "b/2.png"])
    here, there = (folder_source(tmp_path / place).identity() for place in ("here", "there"))
    assert here == there
    assert here["num_images"] == 2
    (tmp_path / "there" / "b" / "2.png").rename(tmp_path / "there" / "b" / "3.png")
    assert differing(here, folder_source(tmp_path / "there").identity()) == ["names"]
    (tmp_path / "here" / "a" / "1.png").write_bytes(png(1) + b"more")
    assert differing(here, folder_source(tmp_path / "here").identity()) == ["sizes"]


def test_names_are_told_apart_by_their_ends(tmp_path):
    write(tmp_path / "x", ["ab/c.png"])
    write(tmp_path / "y", ["a/bc.png"])
    write(tmp_path / "z", ["a/b.png", "c.png"])
    assert len({folder_source(tmp_path / each).identity()["names"] for each in "xyz"}) == 3


def test_the_lengths_of_blocks_belong_to_the_identity():
    class Shards(Source):
        def __len__(self) -> int:
            return 10

    source = Shards(None)
    assert source.identity() == {"num_images": 10}
    source.blocks = [4, 6]
    other = Shards(None)
    other.blocks = [6, 4]
    assert differing(source.identity(), other.identity()) == ["blocks"]


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def test_a_remote_folder_is_read_like_a_local_one(memory):
    for i, name in enumerate(["cat/1.png", "dog/a/2.png", "dog/.hidden/3.png", "dog/notes.txt"]):
        memory.pipe(f"/bucket/images/{name}", png(i))
    source = folder_source("memory://bucket/images", labels=True)
    assert source.remote
    samples = [source.read(i) for i in range(len(source))]
    assert [(s.name, s.label, s.data) for s in samples] == [("cat/1.png", 0, png(0)), ("dog/a/2.png", 1, png(1))]
    memory.rm("/bucket/images/cat/1.png")
    with pytest.raises(BrokenImage, match=r"cat/1\.png: missing"):
        source.read(0)


def test_a_remote_source_carries_no_connection_to_a_worker(memory):
    memory.pipe("/bucket/1.png", png(7))
    source = pickle.loads(pickle.dumps(folder_source("memory://bucket")))
    assert b"fsspec" not in pickle.dumps(source)
    assert source.read(0).data == png(7)


def test_remote_folders_that_cannot_be_opened_are_named(memory):
    with pytest.raises(DataError, match="'memory://nowhere' does not exist or is not a folder; check the URL"):
        folder_source("memory://nowhere")
    with pytest.raises(DataError, match="'nosuch://x' cannot be opened: ValueError"):
        folder_source("nosuch://x")


def test_a_file_system_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # no test loads it, which fsspec would remember
    with pytest.raises(DataError, match="'gs://bucket/x' needs another package: .*gcsfs"):
        folder_source("gs://bucket/x")


# --- digits ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_are_split_labelled_and_scaled():
    pytest.importorskip("sklearn")
    train, test = DigitsSource(DigitsSource.Config()).evaluation_sources()
    everything = DigitsSource(DigitsSource.Config(split="all"))
    assert (len(train), len(test), len(everything)) == (1438, 359, 1797)
    names = {test.read(i).name for i in range(len(test))}
    assert names == {f"digits/{i}" for i in range(4, 1797, 5)}
    assert names.isdisjoint(train.read(i).name for i in range(len(train)))
    first = train.read(0)
    assert (first.data.shape, first.data.dtype, first.label) == ((8, 8), np.uint8, 0)
    assert first.data[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    assert {everything.read(i).label for i in range(20)} == set(range(10))


@pytest.mark.slow
def test_a_moved_digit_is_the_digit_at_another_place():
    pytest.importorskip("sklearn")
    plain, moved = DigitsSource(DigitsSource.Config()), DigitsSource(DigitsSource.Config(shift=2))
    assert moved.evaluation_sources()[1].config.shift == 2
    again, offsets = DigitsSource(DigitsSource.Config(shift=2)), set()
    for index in range(100):
        before, after = plain.read(index).data, moved.read(index).data
        assert (after == again.read(index).data).all()
        framed = np.pad(before, 2)
        places = [(y, x) for y in range(5) for x in range(5) if (framed[y : y + 8, x : x + 8] == after).all()]
        assert places
        offsets.add(places[0])
    assert len(offsets) > 15


def test_missing_scikit_learn_is_named_with_the_cure(monkeypatch):
    digits._images_and_labels.cache_clear()  # of an earlier test in this process
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'mim-framework\[demo\]'"):
        DigitsSource(DigitsSource.Config())


# --- torchvision -------------------------------------------------------------------------------------------------


def torchvision_source(**options) -> TorchvisionSource:
    return TorchvisionSource(TorchvisionSource.Config(**options))


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_is_read_in_its_own_layout(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")})

    source = torchvision_source(dataset="CIFAR10", root=str(tmp_path))
    assert (len(source), list(source.classes)) == (2, list("abcdefghij"))
    sample = source.read(1)
    assert (sample.name, sample.label) == ("CIFAR10/train/1", 9)
    assert np.array_equal(np.asarray(sample.data), data[1].reshape(3, 32, 32).transpose(1, 2, 0))
    train, test = source.evaluation_sources()
    assert (train.config.split, test.config.split, len(test)) == ("train", "test", 2)

    (folder / "test_batch").write_bytes(b"forged")  # torchvision compares the sums before it unpickles
    with pytest.raises(DataError, match=r"CIFAR10 \(train\) cannot be loaded from"):
        source.evaluation_sources()


def test_stl10_is_read_in_its_own_layout_and_its_unlabeled_part_has_no_labels(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = (np.arange(2 * 3 * 96 * 96) % 251).astype(np.uint8)
    for name in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"):
        (folder / name).write_bytes(images.tobytes())
    for name in ("train_y.bin", "test_y.bin"):
        (folder / name).write_bytes(bytes([1, 10]))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("")
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.STL10, attribute)]
        monkeypatch.setattr(datasets.STL10, attribute, [[name, md5(folder / name)] for name in names])
    source = torchvision_source(dataset="STL10", root=str(tmp_path), split="unlabeled")
    assert source.read(0).label is None
    # the files are stored column by column
    assert np.array_equal(np.asarray(source.read(1).data), images.reshape(2, 3, 96, 96)[1].transpose(2, 1, 0))
    train, _ = source.evaluation_sources()
    assert [train.read(i).label for i in range(2)] == [0, 9]


def test_imagenette_keeps_its_files_encoded(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "imagenette2" / split, ["n01440764/1.JPEG", "n02102040/2.JPEG"])
    source = torchvision_source(dataset="Imagenette", root=str(tmp_path), split="test")
    assert list(source.classes) == ["tench, Tinca tinca", "English springer, English springer spaniel"]
    assert (source.read(1).data, source.read(1).label) == (png(1), 1)
    (tmp_path / "imagenette2/val/n02102040/2.JPEG").unlink()
    with pytest.raises(BrokenImage, match="Imagenette/test/1: unreadable"):
        source.read(1)


def test_missing_files_are_named_with_the_download_switch(tmp_path):
    with pytest.raises(DataError, match=r"CIFAR10 \(train\) cannot be loaded from '.*set data.source.download=true"):
        torchvision_source(dataset="CIFAR10", root=str(tmp_path))


def test_a_failed_download_points_at_the_network(tmp_path, monkeypatch):
    def offline(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(DataError, match="no route to host; check the network or put the files there"):
        torchvision_source(dataset="CIFAR10", root=str(tmp_path), download=True)


def test_unknown_data_sets_and_splits_are_refused():
    with pytest.raises(ValidationError, match="CIFAR10 has no split 'unlabeled', it has train, test"):
        TorchvisionSource.Config(dataset="CIFAR10", root="x", split="unlabeled")
    with pytest.raises(ValidationError, match="dataset"):
        TorchvisionSource.Config(dataset="FakeData", root="x")


def test_a_list_chooses_images_by_path_or_by_a_name_that_occurs_once(tmp_path):
    root = tmp_path / "images"
    write(root, ["cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png", "cow/4.png"])
    (tmp_path / "list.txt").write_text("dog/1.png\n\n3.png\n./cat/2.png\n")
    source = folder_source(root, labels=True, list=str(tmp_path / "list.txt"))
    assert [source.read(index).name for index in range(len(source))] == ["cat/2.png", "dog/1.png", "dog/3.png"]
    assert source.classes == ["cat", "cow", "dog"]  # those of the whole folder
    assert [source.read(index).label for index in range(3)] == [0, 2, 2]
    assert source.identity() != folder_source(root, labels=True).identity()


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("1.png", "is not one image of .*: 2 files below it have that name; give the path"),
        ("cat/9.png", "is not one image of .*: it has no such image"),
        ("cat/2.png\n2.png", "lists '2.png' twice"),
        ("\n", "lists no image"),
        (None, "cannot be read"),
    ],
)
def test_a_list_that_fits_nothing_is_told(tmp_path, lines, text):
    root = tmp_path / "images"
    write(root, ["cat/1.png", "cat/2.png", "dog/1.png"])
    if lines is not None:
        (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(DataError, match=f"data.source.list: .*{text}"):
        folder_source(root, list=str(tmp_path / "list.txt"))
