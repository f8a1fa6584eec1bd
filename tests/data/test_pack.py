"""Shards hold the images of their source, each once, whoever packed them and however often it was killed."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from mim_framework.base.errors import DataError, MimError
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data import pack as pack_module
from mim_framework.data.pack import Packing, key_of, pack, shard_name
from mim_framework.data.sources.folder import FolderSource

WEBDATASET = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encoded(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """Ten images of two classes, and two that cannot be read."""
    root = tmp_path / "images"
    for number in range(10):
        folder = root / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"v1.{number}.png").write_bytes(encoded(np.full((4, 4), number, np.uint8)))
    (root / "cat" / "empty.jpg").write_bytes(b"")
    (root / "dog" / "cut.jpg").write_bytes(encoded(NOISE, "JPEG")[:900])
    return FolderSource(FolderSource.Config(root=str(root), labels=True))


def members(folder):
    """Name and bytes of everything in all shards, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            found += [(each.name, file.extractfile(each).read()) for each in file]
    return found


def images(folder):
    return [data for name, data in members(folder) if not name.endswith(".cls")]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_image_is_in_the_shards_with_its_bytes_and_its_class(source, tmp_path):
    found = pack(source, tmp_path / "out", Packing(per_shard=5))
    assert (found["images"], list(found["shards"])) == (
        10,
        ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"],
    )
    assert [(each["name"], each["cause"]) for each in found["unreadable"]] == [
        ("cat/empty.jpg", "empty"), ("dog/cut.jpg", "truncated")
    ]  # fmt: skip
    samples = {}
    for name, data in members(tmp_path / "out"):
        key, suffix = WEBDATASET.match(name).groups()
        samples.setdefault(key, {})[suffix] = data
    assert len(samples) == 10
    want = [(source.read(index).data, source.read(index).label) for index in range(12) if index not in (0, 6)]
    assert [(each["png"], int(each["cls"])) for each in samples.values()] == want
    assert next(iter(samples)) == "cat/v1_1_000000001"
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    for name, facts in found["shards"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == facts["sha256"]
    assert json.loads((tmp_path / "out" / "pack.json").read_text()) == found


def test_a_shuffled_order_is_that_of_its_seed(source, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        pack(source, tmp_path / name, Packing(per_shard=5, shuffled=True, seed=seed))
    pack(source, tmp_path / "kept")
    one, two, kept = (images(tmp_path / name) for name in ("one", "two", "kept"))
    assert files(tmp_path / "one") == files(tmp_path / "again")
    assert sorted(one) == sorted(two) == sorted(kept)
    assert len({tuple(one), tuple(two), tuple(kept)}) == 3


def test_parts_of_several_machines_make_what_one_makes(source, tmp_path):
    whole = pack(source, tmp_path / "whole", Packing(per_shard=2), workers=2)
    parts = [pack(source, tmp_path / "parts", Packing(per_shard=2), part=(number, 3)) for number in (2, 0, 1)]
    assert parts == [None, None, whole]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_packing_that_was_stopped_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "TOGETHER", 1)
    packing = Packing(per_shard=3)
    pack(source, tmp_path / "whole", packing)
    original = pack_module._Reader.__getitem__

    for stop in range(12):
        calls = []

        def stopped(self, indices, stop=stop, calls=calls):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(indices)
            return original(self, indices)

        output = tmp_path / f"stopped_{stop}"
        monkeypatch.setattr(pack_module._Reader, "__getitem__", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(source, output, packing)
        assert len(list(output.glob("*.tar"))) == stop // 3
        monkeypatch.setattr(pack_module._Reader, "__getitem__", original)
        told = []
        pack(source, output, packing, progress=lambda done, total, text, told=told: told.append((done, total)))
        assert told[0] == (stop // 3 * 3, 12)
        assert files(output) == files(tmp_path / "whole")


def test_a_shard_that_is_gone_or_cut_off_is_made_again(source, tmp_path):
    pack(source, tmp_path / "out", Packing(per_shard=4))
    before = files(tmp_path / "out")
    (tmp_path / "out" / shard_name(0)).unlink()
    (tmp_path / "out" / shard_name(1)).write_bytes(before[shard_name(1)][:1000])
    pack(source, tmp_path / "out", Packing(per_shard=4))
    assert files(tmp_path / "out") == before


def test_bytes_that_the_disk_gives_back_otherwise_end_the_packing(source, tmp_path, monkeypatch):
    compare = pack_module._compare

    def damaged(file, hashes, path):
        content = bytearray(file.read_bytes())
        content[540] ^= 1
        file.write_bytes(content)
        compare(file, hashes, path)

    monkeypatch.setattr(pack_module, "_compare", damaged)
    with pytest.raises(MimError, match="shard-000000.tar does not hold what was written to it"):
        pack(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_folder_of_other_shards_or_files_is_left_alone(source, tmp_path):
    pack(source, tmp_path / "out")
    with pytest.raises(MimError, match=r"holds shards of other images or options \(quality\); name another folder"):
        pack(source, tmp_path / "out", Packing(quality=50))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(MimError, match="is not empty; name a new folder"):
        pack(source, tmp_path / "mine")


def test_large_images_are_shrunk_and_others_keep_their_bytes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    contents = {
        "a_large.png": encoded(NOISE),
        "b_turned.jpg": encoded(NOISE, "JPEG", exif=exif),
        "c_small.png": encoded(NOISE[:20]),
        "d_alpha.png": encoded(np.dstack([NOISE, NOISE[..., :1]])),
        "e_deep.png": encoded(NOISE[..., 0].astype(np.uint16) * 200),
        "f_grey.png": encoded(NOISE[..., 0]),
    }
    (tmp_path / "images").mkdir()
    for name, data in contents.items():
        (tmp_path / "images" / name).write_bytes(data)
    source = FolderSource(FolderSource.Config(root=str(tmp_path / "images")))
    found = pack(source, tmp_path / "out", Packing(short_side=20, quality=95))
    packed = dict(members(tmp_path / "out"))
    assert [name.partition(".")[2] for name in packed] == ["jpg", "jpg", "png", "png", "png", "jpg"]
    data = list(packed.values())
    assert [Image.open(io.BytesIO(each)).size for each in data] == [
        (30, 20), (20, 30), (60, 20), (60, 40), (60, 40), (30, 20)
    ]  # fmt: skip
    assert (data[2], data[3], data[4]) == tuple(contents[name] for name in ("c_small.png", "d_alpha.png", "e_deep.png"))
    assert Image.open(io.BytesIO(data[5])).mode == "L"
    assert found["kept_larger"] == 2
    smooth = np.asarray(Image.fromarray(NOISE[..., 0]).resize((30, 20), Image.Resampling.BICUBIC), np.int64)
    assert np.abs(np.asarray(Image.open(io.BytesIO(data[5])), np.int64) - smooth).mean() < 4


class Arrays(Source):
    name = "arrays"
    samples = (
        NOISE,
        NOISE[..., 0].astype(np.uint16) * 7,
        NOISE[..., 0] / np.float32(3),
        Image.fromarray(NOISE[..., 1]),
    )

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        return Sample(self.samples[index], f"sample.{index}")


def test_what_a_source_decodes_itself_is_packed_without_loss(tmp_path):
    pack(Arrays(Source.Config()), tmp_path / "out")
    back = [np.asarray(Image.open(io.BytesIO(data))) for data in images(tmp_path / "out")]
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(back, Arrays.samples, strict=True))


def test_what_no_shard_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Arrays, "samples", (np.zeros((4, 4, 7), np.uint8),))
    with pytest.raises(DataError, match=r"'sample.0': no file for an array \(4, 4, 7\) of uint8 is written"):
        pack(Arrays(Source.Config()), tmp_path / "out")
    (tmp_path / "images").mkdir()
    pages = [Image.new("L", (4, 4), 60 * number) for number in range(3)]
    pages[0].save(tmp_path / "images" / "volume.tif", save_all=True, append_images=pages[1:])
    source = FolderSource(FolderSource.Config(root=str(tmp_path / "images"), pages="each"))
    with pytest.raises(DataError, match="later page of its file, and a shard holds whole files"):
        pack(source, tmp_path / "pages")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dog/1.JPG", "dog/1_000000007"),
        ("v1.2/a.b.jpeg", "v1_2/a_b_000000007"),
        ("../../etc/passwd", "etc/passwd_000000007"),
        ("/.hidden/.png", "_hidden_000000007"),
        ("Ä/日本.png", "Ä/日本_000000007"),
        ("a\x00\n*b", "a___b_000000007"),
        ("", "image_000000007"),
        ("x" * 300 + ".png", "x" * 80 + "_000000007"),
    ],
)
def test_keys_are_names_that_nobody_misreads(name, key):
    assert key_of(name, 7) == key
    assert WEBDATASET.match(f"{key}.png").groups() == (key, "png")
