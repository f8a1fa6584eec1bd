"""What a scan finds is checked against files whose content is known, and does not depend on how it was made."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import yaml
from PIL import Image

from mim_framework.base.errors import DataError
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data import scan as scan_module
from mim_framework.data.decode import open_image
from mim_framework.data.scan import Found, same_rows, scan
from mim_framework.data.scan_summary import for_recipe, summary
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.views import ImageViews

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def encoded(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def folder_of(root, files, **options):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return FolderSource(FolderSource.Config(root=str(root), **options))


def pgm(values, largest):
    """A grey picture whose values are those of a file with so many levels."""
    height, width = values.shape
    return b"P5 %d %d %d\n" % (width, height, largest) + values.astype(">u2").tobytes()


def mixed():
    jpeg = encoded(NOISE, "JPEG", quality=90)
    return {
        "a/rgb.png": encoded(NOISE),
        "a/again.png": encoded(NOISE),
        "a/photo.jpg": jpeg,
        "a/cut.jpg": jpeg[: len(jpeg) // 2],
        "b/grey.png": encoded(NOISE[..., 0]),
        "b/cmyk.jpg": encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
        "b/alpha.png": encoded(Image.fromarray(np.dstack([NOISE, NOISE[..., :1]]))),
        "b/black.png": encoded(np.zeros((16, 8, 3), np.uint8)),
        "b/faint.png": encoded((np.arange(128) % 2 + 100).astype(np.uint8).reshape(16, 8)),
        "b/nothing.png": b"",
        "b/text.png": b"no picture at all",
        "b/phone.heic": b"?",
    }


@pytest.fixture
def source(tmp_path):
    return folder_of(tmp_path / "images", mixed(), labels=True)


def test_everything_is_found_in_a_mixed_folder(source, tmp_path):
    facts = summary(scan(source, tmp_path / "journal"), source)
    assert (facts["images"], facts["readable"], facts["pixels_read_of"]) == (11, 8, 8)
    causes = {each["name"]: each["cause"] for each in facts["broken"]["images"]}
    assert causes == {"a/cut.jpg": "truncated", "b/nothing.png": "empty", "b/text.png": "not_an_image"}
    assert facts["broken"]["causes"] == {"empty": 1, "not_an_image": 1, "truncated": 1}
    assert facts["duplicates"] == {"images_too_many": 1, "groups": [["a/again.png", "a/rgb.png"]]}
    assert facts["constant"] == ["b/black.png"]
    assert facts["near_empty"]["images"] == ["b/faint.png"]
    assert facts["left_out"] == ["1 .heic"]
    assert facts["formats"] == {"PNG": 6, "JPEG": 2}
    assert facts["modes"]["CMYK, 8 bit"] == facts["modes"]["RGB with alpha, 8 bit"] == 1
    assert facts["modes"]["RGB, 8 bit"] == 4
    assert facts["modes"]["grey, 8 bit"] == 2
    assert facts["sizes"]["most_common"] == {"30x20": 6, "8x16": 2}
    assert facts["sizes"]["short_side"] == {"< 16": 2, "16 to < 32": 6}
    assert facts["sizes"]["width_over_height"] == {"0.5 to < 0.67": 2, "0.67 to < 0.75": 0, "0.75 to < 0.9": 0,
        "0.9 to < 1.1": 0, "1.1 to < 1.34": 0, "1.34 to < 1.51": 6}  # fmt: skip
    assert facts["classes"] == {"a": 3, "b": 5}
    assert facts["bytes"] == sum(len(data) for name, data in mixed().items() if not name.endswith("heic"))


def test_the_recipe_gets_the_mean_and_std_of_what_views_show(source, tmp_path):
    found = scan(source, tmp_path / "journal").found
    shown = []
    for name, data in mixed().items():
        if not name.endswith(("cut.jpg", "nothing.png", "text.png", "heic")):
            image = open_image(data, name, decoder="pillow")
            shown.append(image.crop(0, 0, *image.size, image.size).reshape(3, -1).numpy() / 255)
    pixels = np.concatenate(shown, axis=1)
    recipe = for_recipe(found)
    assert recipe.views["mean"] == pytest.approx(pixels.mean(1).tolist(), abs=6e-5)
    assert recipe.views["std"] == pytest.approx(pixels.std(1).tolist(), abs=6e-5)
    assert recipe.lines()[1].startswith("  mean: [0.")
    assert recipe.num_images == 8
    assert any("2 grey images count with three equal channels" in note for note in recipe.notes)


def test_16_bits_get_the_range_that_clips_nothing(tmp_path):
    values = np.array([[0, 1000], [2000, 3000]], np.uint16)
    source = folder_of(tmp_path / "images", {"one.png": encoded(values), "two.png": encoded(values + 1000)})
    scanned = scan(source, tmp_path / "journal")
    recipe = for_recipe(scanned.found)
    all_values = np.stack([values, values + 1000]) / 4095
    assert recipe.views["value_range"] == [0, 4095]
    assert recipe.views["mean"] == [round(all_values.mean(), 4)]
    assert recipe.views["std"] == [round(all_values.std(), 4)]
    assert recipe.lines()[-1] == "  value_range: [0, 4095]"
    (told,) = summary(scanned, source)["values"]
    assert (told["dtype"], told["low"], told["high"], told["stated_range"]) == ("uint16", [0], [4000], None)
    assert summary(scanned, source)["modes"] == {"grey, 16 bit": 2}


def test_what_is_pasted_into_a_recipe_is_what_views_take(tmp_path):
    source = folder_of(tmp_path / "images", {"deep.png": encoded(NOISE[..., 0].astype(np.uint16) * 100)})
    recipe = for_recipe(scan(source, tmp_path / "journal").found)
    pasted = yaml.safe_load("\n".join(recipe.lines()))["views"]
    assert pasted == recipe.views
    views = ImageViews(ImageViews.Config(img_size=16, **pasted))
    shown = views.evaluation_view(source.read(0))
    assert shown.shape[0] == 1
    assert shown.max() > 150


def test_16_bit_colours_are_counted_as_such(tmp_path):
    """Of which Pillow decodes the high byte: 0x40 stands for 0x4040."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 2, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + struct.pack(">3H", *row) for row in [(0, 0x4040, 0x8080), (0, 0xC0C0, 0xFFFF)])
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    source = folder_of(tmp_path / "images", {"deep.png": b"\x89PNG\r\n\x1a\n" + png})
    scanned = scan(source, tmp_path / "journal")
    facts = summary(scanned, source)
    assert facts["modes"] == {"RGB, 16 bit": 1}
    assert (facts["values"][0]["low"], facts["values"][0]["high"]) == ([0, 0x4040, 0x8080], [0, 0xC0C0, 0xFFFF])
    assert for_recipe(scanned.found).views["value_range"] == [0, 65535]


def test_a_range_that_the_files_state_needs_none_in_the_recipe(tmp_path):
    values = np.array([[0, 1023]])
    source = folder_of(tmp_path / "images", {"ten.pgm": pgm(values, 1023), "bytes.png": encoded(NOISE[:1, :2, 0])})
    recipe = for_recipe(scan(source, tmp_path / "journal").found)
    shown = np.concatenate([values.reshape(-1) / 1023, NOISE[0, :2, 0] / 255])
    assert recipe.views == {"mean": [round(shown.mean(), 4)], "std": [round(shown.std(), 4)]}


def test_float_images_and_bands_are_measured_as_they_are(tmp_path):
    values = np.linspace(-1, 3, 6, dtype=np.float32).reshape(2, 3)
    wrong = values.copy()
    wrong[0, 0] = np.inf
    files = {
        "float.tif": encoded(Image.fromarray(values), "TIFF"),
        "wrong.tif": encoded(Image.fromarray(wrong), "TIFF"),
    }
    source = folder_of(tmp_path / "images", files)
    scanned = scan(source, tmp_path / "journal")
    assert [(each["name"], each["cause"]) for each in scanned.found.broken] == [("wrong.tif", "unsupported")]
    assert for_recipe(scanned.found).views["value_range"] == [-1, 3]
    assert for_recipe(scanned.found).views["mean"] == [0.5]


def test_a_band_called_alpha_is_measured_and_told(tmp_path):
    four = np.dstack([NOISE, NOISE[..., :1]])
    source = folder_of(tmp_path / "images", {"four.tif": encoded(Image.fromarray(four), "TIFF")})
    recipe = for_recipe(scan(source, tmp_path / "journal").found)
    assert recipe.views["mean"] == [round(value, 4) for value in four.mean((0, 1)) / 255]
    assert any("1 TIFFs call their last band alpha" in note for note in recipe.notes)


def test_other_numbers_of_channels_are_told_and_not_mixed_in(tmp_path):
    class Bands(Source):
        name = "bands"
        shapes = ((4, 4, 5), (4, 4, 5), (4, 4, 3))

        def __len__(self):
            return len(self.shapes)

        def read(self, index):
            return Sample(np.full(self.shapes[index], 51 * index, np.uint8), f"sample {index}")

    recipe = for_recipe(scan(Bands(Source.Config()), tmp_path / "journal").found)
    assert recipe.views["mean"] == [0.1] * 5
    assert "1 images of 3 channels are not among them; such views refuse them" in recipe.notes


def test_a_sample_reads_fewer_pixels_and_says_so(tmp_path):
    files = {f"{number}.png": encoded(np.full((4, 4), number, np.uint8)) for number in range(10)}
    scanned = scan(folder_of(tmp_path / "images", files), tmp_path / "journal", sample=5)
    assert scanned.found.num_decoded == 5
    assert sum(scanned.found.sizes.values()) == 10
    recipe = for_recipe(scanned.found)
    assert recipe.views["mean"] == [0.01569]
    assert recipe.notes[0] == "from the pixels of 5 of 10 images, evenly chosen"


def test_a_folder_without_a_picture_that_can_be_read_has_no_recipe(tmp_path):
    source = folder_of(tmp_path / "images", {"text.png": b"no picture"})
    facts = summary(scan(source, tmp_path / "journal"), source)
    assert facts["recipe"]["views"] == {}
    assert facts["sizes"] is None


def test_findings_survive_json_to_the_last_bit(source, tmp_path):
    found = scan(source, tmp_path / "journal").found
    found.names = ["x"]
    assert Found.from_json(found.to_json()).to_json() == found.to_json()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_that_was_stopped_goes_on_to_the_same_result(source, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(scan_module, "BLOCK", 2)
    whole = scan(source, tmp_path / "whole")
    assert whole.resumed_from == 0

    for stop in range(1, 6):
        calls = []

        def kill(done, found, stop=stop, calls=calls):
            calls.append(done)
            if len(calls) > stop:
                raise KeyboardInterrupt

        journal = tmp_path / f"stopped_{stop}"
        with pytest.raises(KeyboardInterrupt):
            scan(source, journal, progress=kill, workers=0)
        again = scan(source, journal, workers=workers)
        assert again.resumed_from == 2 * stop
        assert summary(again, source) == summary(whole, source)
        assert again.found.to_json() == whole.found.to_json()


def test_other_images_are_not_taken_for_those_of_the_journal(source, tmp_path, caplog):
    scan(source, tmp_path / "journal")
    (tmp_path / "images" / "a" / "more.png").write_bytes(encoded(NOISE))
    again = scan(FolderSource(source.config), tmp_path / "journal")
    assert again.resumed_from == 0
    assert "the work begins anew" in caplog.text


def test_the_same_images_with_labels_are_scanned_anew(source, tmp_path):
    scan(FolderSource(source.config.model_copy(update={"labels": False})), tmp_path / "journal")
    again = scan(source, tmp_path / "journal")
    assert again.resumed_from == 0
    assert again.found.classes.total() == 8


def test_a_server_asked_more_patiently_is_the_same_source(source, tmp_path):
    scan(source, tmp_path / "journal")
    patient = FolderSource(source.config.model_copy(update={"retries": source.config.retries + 1}))
    assert scan(patient, tmp_path / "journal").resumed_from == 11


def test_a_source_that_fails_ends_the_scan_and_not_its_findings(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "BLOCK", 1)

    class Failing(Source):
        name = "failing"
        fails = True

        def __len__(self):
            return 3

        def read(self, index):
            if index == 2 and self.fails:
                raise DataError("the server is away")
            return Sample(NOISE, f"sample {index}")

    source = Failing(Source.Config())
    with pytest.raises(DataError, match="the server is away"):
        scan(source, tmp_path / "journal")
    source.fails = False
    scanned = scan(source, tmp_path / "journal")
    assert scanned.resumed_from == 2
    assert scanned.duplicates == [["sample 0", "sample 1", "sample 2"]]


def test_same_rows_by_hand():
    a, b, c, none = b"a" * 16, b"a" * 15 + b"b", b"c" * 16, bytes(16)
    assert same_rows(b + none + c + a + b + none + c + b) == [[0, 4, 7], [2, 6]]
    assert same_rows(a) == []
    assert same_rows(none + none) == []
