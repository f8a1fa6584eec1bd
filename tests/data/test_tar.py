"""Tar shards: the same samples as of a folder, by every index; what hostile and damaged ones say."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image as pil

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.commands.cli import main
from mim_framework.data import shard_index, stores
from mim_framework.data.order import sample_order
from mim_framework.data.shard_index import ShardIndex, dali_members, energon_starts, make_index
from mim_framework.data.sources.folder import IMAGE_SUFFIXES, FolderSource
from mim_framework.data.sources.tar import TarSource
from mim_framework.data.stores import LocalStore


def png(value: int) -> bytes:
    file = io.BytesIO()
    pil.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def info(name: str, size: int = 0, **facts) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size = size
    for key, value in facts.items():
        setattr(found, key, value)
    return found


def pack(path: Path, content: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in content.items():
            tar.addfile(info(name, len(data)), io.BytesIO(data))
    return path


def tar_source(root, **options) -> TarSource:
    return TarSource(TarSource.Config(root=str(root), **options))


def samples(source) -> list[tuple[bytes, int | None]]:
    return [(sample.data, sample.label) for sample in map(source.read, range(len(source)))]


def fault(root, **options) -> str:
    with pytest.raises(DataError) as error:
        tar_source(root, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


IMAGES = {f"{'cat' if i < 4 else 'dog'}/{i}.png": png(i) for i in range(7)}
"""Seven images in two class folders."""


@pytest.fixture
def shards(tmp_path):
    """The images in a folder of two shards, with their classes."""
    parts = [dict(list(IMAGES.items())[:3]), dict(list(IMAGES.items())[3:])]
    for number, part in enumerate(parts):
        members = {}
        for name, data in part.items():
            key = name.removesuffix(".png")
            label = {"label": key[:3], "deep": {"id": int(key[-1]) % 2}}
            members |= {
                name: data,
                f"{key}.cls": str(int(key[-1]) // 4).encode(),
                f"{key}.json": json.dumps(label).encode(),
            }
        pack(tmp_path / "shards" / f"part-{number}.tar", members)
    return tmp_path / "shards"


# --- the same as a folder --------------------------------------------------------------------------------------------


def test_shards_hold_the_samples_of_the_folder_that_was_packed(shards, tmp_path):
    for name, data in IMAGES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    folder = FolderSource(FolderSource.Config(root=str(tmp_path / "folder"), labels=True))
    before = files(shards)
    source = tar_source(shards, labels="folder")
    assert samples(source) == samples(folder)
    assert (source.classes, source.remote, source.evaluation_sources()) == (folder.classes, False, None)
    assert [source.size(i) for i in range(7)] == [folder.size(i) for i in range(7)]
    assert source.read(3).name == "part-1.tar/cat/3.png"
    assert source.left_out() == []
    assert samples(pickle.loads(pickle.dumps(source))) == samples(folder)
    assert files(shards) == before  # nothing is extracted, and no index written unasked


def test_labels_are_those_of_cls_or_json_members_or_none(shards, tmp_path):
    assert [label for _, label in samples(tar_source(shards))] == [None] * 7
    source = tar_source(shards, labels="cls")
    assert ([label for _, label in samples(source)], source.classes) == ([0, 0, 0, 0, 1, 1, 1], ["0", "1"])
    source = tar_source(shards, labels="json")
    assert ([label for _, label in samples(source)], source.classes) == ([0, 0, 0, 0, 1, 1, 1], ["cat", "dog"])
    source = tar_source(shards, labels="json", label_key="deep.id")
    assert ([label for _, label in samples(source)], source.classes) == ([0, 1, 0, 1, 0, 1, 0], ["0", "1"])
    (tmp_path / "names").write_text("dog\ncat\nbird\n")
    source = tar_source(shards, labels="json", classes=str(tmp_path / "names"))
    assert ([label for _, label in samples(source)], source.classes) == ([1, 1, 1, 1, 0, 0, 0], ["dog", "cat", "bird"])
    assert "'part-0.tar/cat/0.png' has no 'none' in a member 'json'" in fault(shards, labels="json", label_key="none")
    (tmp_path / "names").write_text("one\n")
    assert "is of class 1, counted from 0, and" in fault(shards, labels="cls", classes=str(tmp_path / "names"))
    assert "has no line for class 'cat'" in fault(shards, labels="json", classes=str(tmp_path / "names"))


def test_labels_that_are_no_classes_are_named(tmp_path):
    pack(tmp_path / "a.tar", {"1.png": png(1), "1.cls": b"9" * 30, "2.png": png(2), "2.json": b"[" * 100_000})
    assert "'a.tar/2.png' has no member 'cls'" in fault(tmp_path, labels="cls")
    assert "'a.tar/1.png' has no 'label' in a member 'json'" in fault(tmp_path, labels="json")
    assert "'a.tar/1.png' has no folder" in fault(tmp_path, labels="folder")
    pack(tmp_path / "a.tar", {"1.png": png(1), "1.cls": b"9" * 30})
    assert "'a.tar/1.png' is of class 99999999999999999999, counted from 0, and there" in fault(tmp_path, labels="cls")


def test_one_shard_or_a_range_of_them_is_a_root_too(shards):
    assert len(tar_source(shards / "part-1.tar")) == 4
    assert samples(tar_source(f"{shards}/part-{{0..1}}.tar")) == samples(tar_source(shards))
    assert "shard part-2.tar: unreadable: FileNotFoundError" in fault(f"{shards}/part-{{0..2}}.tar")
    assert "one range that rises" in fault(f"{shards}/part-{{3..1}}.tar")


def test_the_suffix_chooses_among_several_images(tmp_path):
    pack(tmp_path / "a.tar", {"1.left.png": png(1), "1.right.png": png(2), "2.left.png": png(3), "2.txt": b"no"})
    text = fault(tmp_path)
    assert "'1.left.png' and '1.right.png'; say which one to take, for example data.source.image=left.png" in text
    assert [data for data, _ in samples(tar_source(tmp_path, image="right.png"))] == [png(2)]
    assert [data for data, _ in samples(tar_source(tmp_path, image="LEFT.png"))] == [png(1), png(3)]
    assert "has no suffix of images" in fault(tmp_path, image="txt")
    assert "no members 'up.png' in the 1 shards" in fault(tmp_path, image="up.png")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_those_of_the_archive(tmp_path, format):
    far = 120 if format == tarfile.USTAR_FORMAT else 400
    name = f"./{'d' * far}/{'f' * 90}.png"
    names = [name] if format == tarfile.USTAR_FORMAT else [name, "é" * 80 + ".png", os.fsdecode(b"\xff" * 120) + ".png"]
    pack(tmp_path / "a.tar", {name: png(i) for i, name in enumerate(names)}, format)
    source = tar_source(tmp_path)
    assert [source.read(i).data for i in range(len(source))] == [png(i) for i in range(len(names))]
    assert [source.read(i).name for i in range(len(source))] == [f"a.tar/{name.removeprefix('./')}" for name in names]


def test_what_is_no_sample_is_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info("folder", type=tarfile.DIRTYPE))
        tar.addfile(info("folder/1.png", 10, type=tarfile.SYMTYPE, linkname="/etc/passwd"))
        tar.addfile(info("folder/2.png", type=tarfile.LNKTYPE, linkname="../../x.png"))
        for name in ("../out.png", "/abs.png", "a/../../b.png", ".h.png", ".git/1.png", "no_suffix", "3.txt", "__m__"):
            tar.addfile(info(name, 3), io.BytesIO(b"abc"))
        tar.addfile(info("folder/3.png", len(png(3))), io.BytesIO(png(3)))
        sparse = info("holes.png", 3, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "9999"})
        tar.addfile(sparse, io.BytesIO(b"abc"))
    (tmp_path / "read me.md").touch()
    source = tar_source(tmp_path)
    assert samples(source) == [(png(3), None)]
    assert sorted(source.left_out()) == [
        "1 .md", "1 .txt", "1 samples without an image", "1 sparse files", "1 without a suffix", "2 hidden", "2 links",
        "3 with names that lead out of the shard",
    ]  # fmt: skip


def test_devices_have_no_data_and_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info("pipe.png", 99_999, type=tarfile.FIFOTYPE))
        tar.addfile(info("1.png", len(png(3))), io.BytesIO(png(3)))
    assert samples(source := tar_source(tmp_path)) == [(png(3), None)]
    assert source.left_out() == ["1 devices and other members"]


# --- indices ---------------------------------------------------------------------------------------------------------


def run(*args) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["data", "index", *map(str, args)])
    return result.exit_code, result.output


def test_an_index_spares_the_pass_and_says_the_same(shards, tmp_path, monkeypatch, caplog):
    passed, identity = tar_source(shards, labels="cls"), tar_source(shards).identity()
    assert "passed over the headers of 2 of 2 shards" in caplog.text
    code, output = run(shards)
    assert (code, output.splitlines()[0]) == (0, "part-0.tar: 3 images in 3 samples")
    monkeypatch.setattr(shard_index, "members", None)  # no pass any more
    indexed = tar_source(shards, labels="cls")
    assert (samples(indexed), indexed.identity()) == (samples(passed), identity)
    assert run(shards)[1].splitlines()[1] == "part-1.tar: has its index of 4 images"


def test_indices_lie_in_a_folder_of_their_own_where_one_is_named(shards, tmp_path):
    before = files(shards)
    assert run(shards, "--output", tmp_path / "index")[0] == 0
    assert files(shards) == before
    assert sorted(files(tmp_path / "index")) == [f"part-{i}.tar{end}" for i in (0, 1) for end in (".idx", ".mim_index")]
    assert samples(tar_source(shards, index=str(tmp_path / "index"))) == samples(tar_source(shards))


def test_the_index_of_another_or_changed_shard_is_not_used(shards, caplog):
    run(shards)
    expected = samples(tar_source(shards))
    path = shards / "part-0.tar.mim_index"
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"\xff" * 64):
        path.write_bytes(damaged)
        caplog.clear()
        assert samples(tar_source(shards)) == expected
        assert "since 'part-0.tar': its index is damaged; `mim data index" in caplog.text
    path.write_bytes((shards / "part-1.tar.mim_index").read_bytes())
    with open(shards / "part-0.tar", "ab") as file:
        file.write(bytes(512))
    caplog.clear()
    assert samples(tar_source(shards)) == expected
    assert "its index is of a shard of " in caplog.text
    assert run(shards)[1].startswith("part-0.tar: 3 images")


def test_a_shard_that_changes_under_its_index_gives_broken_images_and_no_other_ones(shards):
    source = tar_source(shards)
    content = {name.replace("cat", "cow"): data[::-1] for name, data in list(IMAGES.items())[:3]}
    pack(shards / "part-0.tar", content)
    with pytest.raises(BrokenImage, match=r"part-0.tar/cat/0.png: unreadable: the shard has changed since its index"):
        source.read(0)
    (shards / "part-1.tar").write_bytes((shards / "part-1.tar").read_bytes()[:540])
    with pytest.raises(BrokenImage, match=r"part-1.tar/cat/3.png: truncated: 28 bytes of "):
        source.read(3)
    (shards / "part-1.tar").unlink()
    with pytest.raises(BrokenImage, match=r"part-1.tar/cat/3.png: unreadable: FileNotFoundError"):
        source.read(3)


def test_energons_index_is_read_checked_and_written(shards, tmp_path, monkeypatch):
    store, name = LocalStore(str(shards), "root"), "part-1.tar"
    index = make_index(store, name, IMAGE_SUFFIXES)
    content = shard_index.energon_bytes(index)
    with tarfile.open(shards / name) as tar:
        starts = [member.offset for member in tar if member.name.endswith(".png")]
        end = tar.offset
    assert np.frombuffer(content, "<u8").tolist() == [*starts, end]
    monkeypatch.setattr(shard_index, "SEGMENT", 2)
    assert energon_starts(content, index.size) == [*starts, end]
    assert make_index(store, name, IMAGE_SUFFIXES, starts=[*starts, end]).to_bytes() == index.to_bytes()
    for wrong in ([*starts[:-1], end], [*starts, end - 512], [starts[1], end], [512, 1024, end]):
        assert make_index(store, name, IMAGE_SUFFIXES, starts=wrong).to_bytes() == index.to_bytes()
    assert energon_starts(content[:-3], index.size) is None
    assert energon_starts(content, end - 1) is None


def test_dalis_index_is_read_where_it_fits(shards, monkeypatch):
    expected, identity = samples(tar_source(shards)), tar_source(shards).identity()
    for shard in ("part-0", "part-1"):
        with tarfile.open(shards / f"{shard}.tar") as tar:
            keys: dict[str, list[str]] = {}
            for each in tar:
                key, _, suffix = each.name.partition(".")
                keys.setdefault(key, []).append(f"{suffix} {each.offset_data} {each.size} {each.name}")
        lines = [f"v1.2 {len(keys)}", *(" ".join(parts) for parts in keys.values())]
        (shards / f"{shard}.idx").write_text("\n".join(lines) + "\n")
    with monkeypatch.context() as patched:
        patched.setattr(shard_index, "members", None)
        source = tar_source(shards)
    assert (samples(source), source.identity()) == (expected, identity)
    assert [label for _, label in samples(tar_source(shards, labels="cls"))] == [0, 0, 0, 0, 1, 1, 1]
    text = (shards / "part-0.idx").read_text()
    (shards / "part-0.idx").write_text(text.replace("png 512", "png 1024"))  # not where it is
    with pytest.raises(BrokenImage, match="the shard has changed"):
        tar_source(shards).read(0)


@pytest.mark.parametrize(
    "text",
    ["", "v1.1 1\npng 512 3", "v1.2 2\npng 512 3 a.png", "v1.2 1\npng 512 3 a b.png", "v1.2 1\npng 512 -3 a.png",
     "v1.2 1\npng 512 9999 a.png", "v1.2 1\npng 100 3 a.png", "v1.2 1\npng x 3 a.png", "v1.2 1\npng 512 3 \\303.png"],
)  # fmt: skip
def test_an_idx_that_is_not_dalis_is_not_used(text):
    assert dali_members(text.encode(), 4096) is None


# --- attacks and damage ----------------------------------------------------------------------------------------------


def with_size(data: bytes, field: bytes, at: int = 0) -> bytes:
    """A tar whose header at a byte says another size, with a checksum that fits."""
    header = bytearray(data[at : at + 512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


HUGE = b"\x80" + (1 << 80).to_bytes(11, "big")
NEGATIVE = b"\xff" * 11 + b"\xf6"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: with_size(data, HUGE), "is cut off: '1.png' should have 1,208,925,819,614,629,174,706,176 bytes"),
        (lambda data: with_size(data, NEGATIVE), "the header at byte 0 says a size of -10"),
        (lambda data: with_size(data, b"-0000000012\0"), "the header at byte 0 says a size of -10"),
        (lambda data: data[:1060], "is cut off: it ends inside the header at byte 1024"),
        (lambda data: data[:1600], "is cut off: '2.png' should have 73 bytes, of which 64 are there"),
        (lambda data: data[:1024] + b"\x01" + data[1025:], "is damaged at byte 1024"),
        (lambda data: data + data, "goes on after its end mark at byte 2048"),
        (lambda data: b"\x1f\x8b" + data[2:], "is no tar file; compressed ones must be unpacked first"),
        (lambda data: b"abc", "is cut off: it ends inside the header at byte 0"),
    ],
)
def test_a_damaged_or_hostile_shard_is_refused_in_one_sentence(tmp_path, change, words):
    data = pack(tmp_path / "whole.tar", {"1.png": png(1), "2.png": png(2)}).read_bytes()[:3072]
    (tmp_path / "whole.tar").unlink()
    (tmp_path / "bad.tar").write_bytes(change(data))
    assert words in fault(tmp_path)
    code, output = run(tmp_path)
    assert (code, output.count("\n")) == (1, 1)
    assert words in output
    assert sorted(os.listdir(tmp_path)) == ["bad.tar"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["1.png", "1.png"], "holds '1.png' twice in one sample"),
        (["1.png", "1.PNG"], "holds '1.PNG' twice in one sample"),
        (["1.png", "2.png", "1.png"], "has two samples with the same name, at bytes 0 and 2,048"),
        ([f"1.{i}.png" for i in range(1001)], "has a sample '1' of more than 1,000 members"),
    ],
)
def test_names_that_stand_twice_are_refused(tmp_path, names, words):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.addfile(info(name, 3), io.BytesIO(b"abc"))
    assert words in fault(tmp_path)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    body = records + bytes(-len(records) % 512)
    return info("pax", len(records), type=kind).tobuf(tarfile.USTAR_FORMAT) + body


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (pax(b"11 size=-5\n"), "the pax record at byte 512 says a size of '-5'"),
        (pax(b"29 size=99999999999999999999\n"), "is cut off: '1.png' should have 99,999,999,999,999,999,999 bytes"),
        (pax(b"99 path=x.png\n"), "is damaged in the pax record at byte 512"),
        (pax(b"0 a=b\n"), "is damaged in the pax record at byte 512"),
        (pax(b"16 path=all.png\n", tarfile.XGLTYPE), "the record at byte 512 gives all members one name or size"),
        (
            info("L", 1 << 40, type=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT),
            "before byte 512 stands a name or record of",
        ),
    ],
)
def test_hostile_records_before_a_member_are_refused(tmp_path, before, words):
    whole = pack(tmp_path / "a.tar", {"1.png": png(1)}, tarfile.USTAR_FORMAT).read_bytes()
    (tmp_path / "a.tar").write_bytes(before + whole)
    assert words in fault(tmp_path)


def test_a_shard_without_an_end_mark_is_read_and_told(tmp_path):
    path = pack(tmp_path / "a.tar", {"1.png": png(1), "2.png": png(2)})
    path.write_bytes(path.read_bytes()[:1024])
    source = tar_source(tmp_path)
    assert samples(source) == [(png(1), None)]
    assert source.left_out() == ["1 shards without an end mark (cut off?)"]


def test_a_place_without_shards_says_what_is_there(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    assert "no .tar files below" in (text := fault(tmp_path))
    assert "there are 1 .gz (compressed ones cannot be read by offset" in text
    pack(tmp_path / "a.tar", {"1.txt": b"a"})
    assert "no images in the 1 shards of" in (text := fault(tmp_path))
    assert "1 .txt" in text


def many(path: Path, count: int) -> None:
    """A shard of empty images, whose headers differ in their names alone."""
    header = np.frombuffer(info("00000000.png").tobuf(tarfile.USTAR_FORMAT), np.uint8)
    empty = int(header[:148].sum()) + 256 + int(header[156:].sum()) - 8 * ord("0")
    with path.open("wb") as file:
        for first in range(0, count, 10_000):
            digits = (np.arange(first, first + 10_000)[:, None] // 10 ** np.arange(7, -1, -1)) % 10 + ord("0")
            block = np.tile(header, (10_000, 1))
            block[:, :8] = digits
            sums = empty + digits.sum(1)
            block[:, 148:154] = (sums[:, None] // 8 ** np.arange(5, -1, -1)) % 8 + ord("0")
            file.write(block.tobytes())
        file.write(bytes(1024))


@pytest.mark.slow
def test_the_members_of_a_large_shard_take_few_bytes_each(tmp_path):
    many(tmp_path / "a.tar", 30_000)
    tracemalloc.start()
    index = make_index(LocalStore(str(tmp_path), "root"), "a.tar", IMAGE_SUFFIXES)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(index.names), index.names[29_999]) == (30_000, "00029999.png")
    assert most < 8 * 2**20 + 300 * 30_000
    assert len(ShardIndex.from_bytes(index.to_bytes()).names) == 30_000


# --- behind a URL ----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(shards):
    file_system = fsspec.filesystem("memory")
    for name, content in files(shards).items():
        file_system.pipe_file(f"/tar/{name}", content)
    yield file_system
    file_system.store.clear()


def test_remote_shards_are_read_by_offset(memory, shards, tmp_path, monkeypatch):
    expected = tar_source(shards, labels="cls")
    source = tar_source("memory://tar", labels="cls")
    assert (samples(source), source.identity(), source.remote) == (samples(expected), expected.identity(), True)
    assert "is a URL; name a local folder for the indices: --output" in run("memory://tar")[1]
    assert run("memory://tar", "--output", tmp_path / "index")[0] == 0
    asked: list[tuple[int, int]] = []
    cat_file = type(memory).cat_file

    def counting(self, path, start=None, end=None, **kwargs):
        asked.append((start, end))
        return cat_file(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", counting)
    indexed = tar_source("memory://tar/part-{0..1}.tar", labels="cls", index=str(tmp_path / "index"))
    assert asked == []
    assert samples(indexed) == samples(expected)
    assert [end - start - 512 for start, end in asked] == [len(png(i)) for i in range(7)]


def test_a_server_without_ranges_gives_the_right_bytes_and_is_named(memory, shards, monkeypatch, caplog):
    expected = samples(tar_source(shards))
    with open(shards / "part-0.tar", "ab") as file:  # larger than a window
        file.write(bytes(9 << 20))
    memory.pipe_file("/tar/part-0.tar", (shards / "part-0.tar").read_bytes())
    cat_file = type(memory).cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start=None, end=None: cat_file(self, path))
    monkeypatch.setattr(stores, "_SENDS_WHOLE_FILES", set())
    assert samples(tar_source("memory://tar")) == expected
    assert caplog.text.count("sends whole files where parts are asked for") == 1


def test_a_server_that_sends_other_lengths_is_asked_again(memory, monkeypatch):
    cat_file, lengths = type(memory).cat_file, [8, 7]

    def longer(self, path, start=None, end=None):
        return cat_file(self, path, start=start, end=end + (lengths.pop() if lengths else 0))

    monkeypatch.setattr(type(memory), "cat_file", longer)
    monkeypatch.setattr(stores, "FIRST_WAIT", 1e-3)
    stores.REMOTE.take()
    whole = memory.store["/tar/part-0.tar"].getvalue()
    assert stores.RemoteStore("memory://tar", "root").read("part-0.tar", 10, 5) == whole[10:15]
    assert lengths == []
    assert stores.REMOTE.take() == {"retries": 2}


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_are_neighbours_within_some_megabytes_of_one_shard(tmp_path):
    sizes = [400_000, 400_000, 400_000, 3_000_000, 100]
    pack(tmp_path / "a.tar", {f"{i}.png": bytes(size) for i, size in enumerate(sizes)})
    pack(tmp_path / "b.tar", {"0.png": b"abc"})
    pack(tmp_path / "c.tar", {"0.txt": b"abc"})
    assert tar_source(tmp_path, block_mb=1).blocks == [2, 1, 1, 1, 1]
    assert tar_source(tmp_path, block_mb=2).blocks == [3, 1, 1, 1]
    assert tar_source(tmp_path).blocks == [5, 1]


def test_a_block_is_one_request_and_gives_what_single_reads_give(memory, shards, tmp_path, monkeypatch):
    run("memory://tar", "--output", tmp_path / "index")
    source = tar_source("memory://tar", index=str(tmp_path / "index"))
    expected = [source.read(i) for i in range(7)]
    asked: list[str] = []
    cat_file = type(memory).cat_file

    def counting(self, path, **kwargs):
        asked.append(path)
        return cat_file(self, path, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", counting)
    assert source.read_many([0, 6]) == [expected[0], expected[6]]
    assert len(asked) == 2  # one for each image, as long as nobody says that there are blocks
    source.expect_blocks(2)
    asked.clear()
    drawn = [5, 0, 3, 1, 6, 2, 4]
    assert source.read_many(drawn[:4]) + source.read_many(drawn[4:]) == [expected[i] for i in drawn]
    assert sorted(asked) == ["/tar/part-0.tar", "/tar/part-1.tar"]
    source.expect_blocks(1)
    source.read_many([0, 6, 0])
    assert len(asked) == 2 + 3  # of one that is kept, the one before is read anew
    assert pickle.loads(pickle.dumps(source))._kept == {}


def test_an_epoch_of_blocks_is_one_request_for_each(memory, tmp_path, monkeypatch):
    for number in range(9):
        pack(tmp_path / "a.tar", {f"{i}.png": png(10 * number + i) for i in range(7)})
        memory.pipe_file(f"/nine/{number}.tar", (tmp_path / "a.tar").read_bytes())
    source = tar_source("memory://nine")
    source.expect_blocks(4)
    order = sample_order("blocks", source, seed=0, window=4)
    asked: list[str] = []
    cat_file = type(memory).cat_file

    def counting(self, path, **kwargs):
        asked.append(path)
        return cat_file(self, path, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", counting)
    read = [source.read_many(order.indices(range(first, min(first + 4, 63)))) for first in range(0, 63, 4)]
    assert sorted(asked) == [f"/nine/{number}.tar" for number in range(9)]
    assert len({sample.data for batch in read for sample in batch}) == 63


def test_a_broken_place_in_a_block_is_that_image_alone(shards):
    source = tar_source(shards)
    data = bytearray((shards / "part-1.tar").read_bytes())
    offset = int(source._parts[1].index.offsets[1])
    data[offset - 500] ^= 1
    (shards / "part-1.tar").write_bytes(data[: int(source._parts[1].index.offsets[3]) + 10])
    source.expect_blocks(2)
    found = source.read_many(range(7))
    assert [getattr(each, "cause", None) for each in found] == [None, None, None, None, "unreadable", None, "truncated"]
    assert found[4].name == "part-1.tar/dog/4.png"
    (shards / "part-0.tar").unlink()
    source.expect_blocks(1)
    assert [each.cause for each in source.read_many([0, 1])] == ["unreadable"] * 2
