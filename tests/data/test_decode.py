"""Every kind of odd image, and the policy for it. All files are made here."""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as pil
from PIL import ImageFile, ImageOps
from torch import Tensor

from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.data import decode
from mim_framework.data.decode import open_image


def encode(image: pil.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def whole(data, name: str = "a.jpg", **options) -> Tensor:
    """All pixels (3, H, W), unscaled."""
    image = open_image(data, name, **options)
    return image.crop(0, 0, *image.size, image.size)


def photo(width: int, height: int) -> pil.Image:
    """Smooth noise at several scales and an edge, like a photograph for a codec."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, contrast in ((4, 50), (16, 25), (64, 12)):
        noise = rng.integers(0, 255, (cells, cells, 3), np.uint8)
        smooth = pil.fromarray(noise).resize((width, height), pil.Resampling.BICUBIC)
        pixels += contrast * (np.asarray(smooth, np.float32) / 127.5 - 1)
    pixels[:, : width // 3] *= 0.5
    return pil.fromarray(pixels.clip(0, 255).astype(np.uint8))


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand, for headers and depths that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


RGB = pil.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)
PIXELS = torch.from_numpy(np.array(RGB)).permute(2, 0, 1)


# --- images that are read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(format):
    assert torch.equal(whole(encode(RGB, format)), PIXELS)


def test_a_crop_is_the_region_and_a_flip_mirrors_it():
    image = open_image(encode(RGB), "a.png")
    assert image.size == (4, 6)
    assert torch.equal(image.crop(1, 2, 2, 3, (2, 3)), PIXELS[:, 1:3, 2:5])
    assert torch.equal(image.crop(1, 2, 2, 3, (2, 3), flip=True), PIXELS[:, 1:3, 2:5].flip(2))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_a_resize_is_within_two_levels_of_pillow(interpolation):
    big = photo(80, 60)
    got = open_image(encode(big), "a.png").crop(5, 10, 40, 50, (16, 24), interpolation=interpolation)
    expected = big.crop((10, 5, 60, 45)).resize((24, 16), decode._RESAMPLING[interpolation])
    difference = got.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
    assert difference.abs().max() <= 2


def test_arrays_and_pillow_images_are_taken_as_they_are():
    assert torch.equal(whole(np.array(RGB)), PIXELS)
    assert torch.equal(whole(RGB), PIXELS)
    assert torch.equal(whole(np.array([[0, 255]], np.uint8)), torch.tensor([[[0, 255]]] * 3, dtype=torch.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_to_size_and_box(format, orientation):
    exif = pil.Exif()
    exif[0x0112] = orientation
    data = encode(photo(24, 16), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    upright = ImageOps.exif_transpose(pil.open(io.BytesIO(data))).convert("RGB")
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)

    image = open_image(data, "a.jpg")
    assert image.size == tuple(expected.shape[1:])
    assert torch.equal(image.crop(1, 3, 6, 10, (6, 10)), expected[:, 1:7, 3:13])
    assert torch.equal(image.crop(1, 3, 6, 10, (6, 10), flip=True), expected[:, 1:7, 3:13].flip(2))


def test_a_rotated_jpeg_is_scaled_and_cropped_in_upright_coordinates():
    exif = pil.Exif()
    exif[0x0112] = 6
    data = encode(photo(640, 480), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(pil.open(io.BytesIO(data)))
    got = open_image(data, "a.jpg").crop(100, 40, 500, 300, (50, 30))
    expected = upright.crop((40, 100, 340, 600)).resize((30, 50), pil.Resampling.BICUBIC)
    assert (got.permute(1, 2, 0).float() - torch.from_numpy(np.array(expected)).float()).abs().mean() < 1.5


def test_a_damaged_exif_block_counts_as_none():
    data = encode(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x20 far too short")
    assert whole(data).shape == (3, 4, 6)


def test_16_bit_grey_is_scaled_not_clipped_to_white():
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    expected = torch.tensor([[[0, 1, 128, 255]]] * 3, dtype=torch.uint8)
    for data in (encode(pil.fromarray(grey)), encode(pil.fromarray(grey), "TIFF")):
        assert torch.equal(whole(data, value_range=(0, 65535)), expected)
    assert torch.equal(whole(b"P5 4 1 65535\n" + grey.astype(">u2").tobytes(), value_range=(0, 65535)), expected)


def test_16_bit_colour_is_scaled():
    rows = b"\0" + struct.pack(">6H", 0, 32768, 65535, 256, 0, 65535)
    data = png(2, 1, 16, 2, rows)
    assert whole(data, value_range=(0, 65535)).tolist() == [[[0, 1]], [[128, 0]], [[255, 255]]]
    assert "the largest value here is 65535" in str(broken(data))
    assert "high byte only, too coarse for the range [0, 4095]" in str(broken(data, value_range=(0, 4095)))


def test_12_bit_tiff_is_scaled_by_its_own_depth():
    # little-endian TIFF, one strip of two 12-bit samples: 0xFFF and 0x800
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 1)]
    tags.append((279, 4, 3))
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0" + struct.pack("<H", len(tags)) + directory + b"\0" * 4
    assert whole(data)[0].tolist() == [[255, 128]]


def test_cmyk_becomes_rgb():
    red = pil.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = whole(encode(red, "JPEG", quality=95)).float().mean((1, 2))
    assert pixels[0] > 245
    assert pixels[1:].max() < 10


def test_grey_bilevel_and_palette_become_rgb():
    assert whole(encode(pil.new("L", (2, 2), 77), "JPEG")).unique().tolist() == [77]
    assert whole(encode(pil.new("1", (2, 2), 1))).unique().tolist() == [255]
    palette = RGB.quantize(24)
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(whole(encode(palette)), expected)


def test_transparency_is_composited_on_white():
    half = pil.new("RGBA", (1, 1), (200, 0, 0, 128))
    assert whole(encode(half)).flatten().tolist() == [227, 127, 127]
    hidden = pil.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert whole(encode(hidden)).flatten().tolist() == [255, 255, 255]
    palette = pil.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = encode(palette, transparency=0)
    assert whole(data).permute(1, 2, 0).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    grey = pil.new("LA", (1, 1), (100, 0))
    assert whole(encode(grey)).flatten().tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO"])
def test_an_animation_gives_its_first_frame(format):
    frames = [pil.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert whole(data)[:, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)


# --- images that are refused -------------------------------------------------------------------------------------


def broken(data, **options) -> BrokenImage:
    with pytest.raises(BrokenImage) as info:
        whole(data, "photos/a.jpg", **options)
    assert str(info.value).startswith(f"photos/a.jpg: {info.value.cause}: ")
    return info.value


def test_a_file_without_bytes_is_empty():
    assert broken(b"").cause == "empty"


def test_a_web_page_named_jpg_is_not_an_image():
    error = broken(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    assert error.cause == "not_an_image"
    assert "it begins with b'<!DOCTYPE html><'" in str(error)


def test_formats_that_run_programs_are_not_opened():
    assert broken(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n").cause == "not_an_image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize("scaled_decode", [True, False])
def test_a_truncated_file_is_broken(format, scaled_decode):
    data = encode(photo(120, 80), format)
    assert broken(data[: len(data) // 2], scaled_decode=scaled_decode).cause == "truncated"


def test_a_jpeg_that_lacks_only_its_end_is_truncated_when_scaled_too():
    data = encode(photo(320, 240), "JPEG")[:-20]
    for decoder in ("auto", "pillow"):
        assert "image file is truncated" in str(broken(data, decoder=decoder))
    with pytest.raises(BrokenImage, match="truncated"):
        open_image(data, "a.jpg").crop(0, 0, 240, 320, (15, 20))


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(decode, "jpeg_decoder", lambda decoder: refuse)


@pytest.mark.usefixtures("no_decoding")
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding():
    assert broken(png(100_000, 100_000, 8, 2, b"")).cause == "too_large"
    jpeg = bytearray(encode(RGB, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert broken(bytes(jpeg)).cause == "too_large"
    error = broken(png(12_000, 8_000, 8, 2, b""))  # where Pillow only warns
    assert "12000x8000 pixels, more than max_pixels=64000000" in str(error)
    assert broken(encode(RGB), max_pixels=23).cause == "too_large"
    assert broken(np.zeros((4, 6, 3), np.uint8), max_pixels=23).cause == "too_large"


def test_pixels_without_a_stated_range_are_unsupported():
    error = broken(encode(pil.new("F", (2, 2), 0.5), "TIFF"))
    assert error.cause == "unsupported"
    assert "pixels of float32 have no stated range: the largest value here is 0.5" in str(error)
    assert broken(encode(pil.new("I", (2, 2), 70_000), "TIFF")).cause == "unsupported"


@pytest.mark.parametrize("data", [np.zeros((2, 2), complex), np.zeros((3, 2, 2, 2), np.uint8), "a.jpg", None])
def test_samples_of_another_kind_are_unsupported(data):
    error = broken(data)
    assert error.cause == "unsupported"
    assert "a sample is bytes, a Pillow image or an array (H, W[, bands]) of numbers" in str(error)


def test_arrays_without_a_range_or_with_other_bands_are_unsupported():
    assert "pixels of float32 have no stated range" in str(broken(np.zeros((2, 2), np.float32)))
    assert "it has 2 bands, the views have 3 channels" in str(broken(np.zeros((3, 2, 2), np.uint8)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_whatever_is_damaged_only_a_broken_image_comes_out(format):
    data = encode(photo(40, 30), format)
    chance = random.Random(0)
    seen = set()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3, 20])):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        try:
            image = open_image(bytes(damaged), "a", max_pixels=10_000)
            assert image.crop(0, 0, *image.size, (8, 8)).shape == (3, 8, 8)
        except BrokenImage as error:
            seen.add(error.cause)
    assert seen <= {"not_an_image", "truncated", "too_large", "unreadable", "unsupported"}


# --- scaled decoding and the fast decoder -----------------------------------------------------------------------


def test_scaled_decoding_stays_within_the_stated_distance():
    data = encode(photo(1280, 960), "JPEG", quality=90)
    for box, out in [((0, 0, 960, 1280), 32), ((101, 203, 700, 650), 64), ((7, 9, 800, 801), 100)]:
        scaled = open_image(data, "a.jpg").crop(*box, (out, out))
        exact = open_image(data, "a.jpg", scaled_decode=False).crop(*box, (out, out))
        assert not torch.equal(scaled, exact)  # it was scaled
        assert (scaled.float() - exact.float()).abs().mean() < 1.5


def test_a_crop_below_twice_the_output_is_decoded_in_full():
    data = encode(photo(320, 240), "JPEG")
    box = (3, 5, 199, 300)
    scaled, exact = (open_image(data, "a.jpg", scaled_decode=s).crop(*box, (100, 100)) for s in (True, False))
    assert torch.equal(scaled, exact)


def test_a_second_finer_crop_is_decoded_again():
    data = encode(photo(640, 480), "JPEG")
    image = open_image(data, "a.jpg")
    image.crop(0, 0, 480, 640, (20, 20))
    finer = image.crop(10, 10, 200, 200, (200, 200))
    assert torch.equal(finer, open_image(data, "a.jpg").crop(10, 10, 200, 200, (200, 200)))
    coarse_again = image.crop(0, 0, 480, 640, (20, 20))
    exact = open_image(data, "a.jpg", scaled_decode=False).crop(0, 0, 480, 640, (20, 20))
    assert torch.equal(coarse_again, exact)  # from the finer pixels that are there


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
def test_torchcodec_gives_the_pixels_of_pillow(options):
    pytest.importorskip("torchcodec")
    data = encode(photo(123, 77), "JPEG", quality=90, **options)
    fast, floor = (open_image(data, "a.jpg", decoder=d) for d in ("torchcodec", "pillow"))
    for kwargs in ({}, {"flip": True}, {"interpolation": "lanczos"}):
        assert torch.equal(fast.crop(3, 5, 60, 70, (32, 32), **kwargs), floor.crop(3, 5, 60, 70, (32, 32), **kwargs))


def test_a_missing_torchcodec_is_named_only_if_it_was_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    decode.jpeg_decoder.cache_clear()
    try:
        with pytest.raises(DataError, match=r"pip install 'mim-framework\[fast\]' or use decoder: auto"):
            open_image(encode(RGB, "JPEG"), "a.jpg", decoder="torchcodec")
        assert whole(encode(RGB, "JPEG"), decoder="auto").shape == (3, 4, 6)
    finally:
        decode.jpeg_decoder.cache_clear()
