"""Which bytes the values of a file become: ranges, bands, alpha and pages. All files are made here."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as pil
from torch import Tensor

from mim_framework.base.errors import BrokenImage
from mim_framework.data.decode import num_pages, open_image
from mim_framework.data.tiff import open_bands, with_directory
from mim_framework.data.values import to_bytes

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def encode(image: pil.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(
    values: np.ndarray,
    *,
    order: str = "<",
    photometric: int = 1,
    extra: tuple[int, ...] = (),
    planar: bool = False,
    compress: bool = False,
    predictor: int = 1,
    tile: int = 0,
    pages: int = 1,
    big: bool = False,
) -> bytes:
    """values (H, W, bands) as a TIFF of one strip or of square tiles, by hand; several pages are equal."""
    height, width, count = values.shape
    kind = values.dtype.newbyteorder(order)
    parts: list[np.ndarray] = [values[..., i : i + 1] for i in range(count)] if planar else [values]
    blocks = []
    for part in parts:
        side = tile or max(height, width)
        for top in range(0, height, side):
            for left in range(0, width, side):
                block = part[top : top + side, left : left + side]
                if tile:
                    room = ((0, side - block.shape[0]), (0, side - block.shape[1]), (0, 0))
                    block = np.pad(block, room)
                if predictor == 2:
                    block = np.diff(block, axis=1, prepend=np.zeros_like(block[:, :1]))
                content = block.astype(kind).tobytes()
                blocks.append(zlib.compress(content) if compress else content)
    head = 16 if big else 8
    starts = np.cumsum([head, *map(len, blocks)])
    offsets, lengths = starts[:-1].tolist(), [len(block) for block in blocks]
    tags = {
        256: [width], 257: [height], 258: [8 * values.dtype.itemsize] * count, 259: [8 if compress else 1],
        262: [photometric], 277: [count], 284: [2 if planar else 1], 317: [predictor],
        339: [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * count,
    }  # fmt: skip
    tags |= (
        {322: [tile], 323: [tile], 324: offsets, 325: lengths} if tile else {273: offsets, 278: [height], 279: lengths}
    )
    tags |= {338: list(extra)} if extra else {}
    place = int(starts[-1])
    directories = []
    for page in range(pages):
        directories.append(_directory(tags, order, place, last=page == pages - 1, big=big))
        place += len(directories[-1])
    mark = b"II" if order == "<" else b"MM"
    header = struct.pack(f"{order}HHHQ", 43, 8, 0, starts[-1]) if big else struct.pack(f"{order}HI", 42, starts[-1])
    return mark + header + b"".join(blocks) + b"".join(directories)


def _directory(tags: dict[int, list[int]], order: str, place: int, *, last: bool, big: bool) -> bytes:
    inline, code, count_code = (8, "Q", "Q") if big else (4, "I", "H")
    size = len(tags) * (20 if big else 12) + struct.calcsize("=" + count_code) + inline
    entries, arrays = struct.pack(order + count_code, len(tags)), b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(f"{order}HH{code}", tag, 4, len(numbers))
        if len(packed) > inline:
            entries += struct.pack(order + code, place + size + len(arrays))
            arrays += packed
        else:
            entries += packed.ljust(inline, b"\0")
    return entries + struct.pack(order + code, 0 if last else place + size + len(arrays)) + arrays


def whole(data, **options) -> Tensor:
    """All pixels (C, H, W), unscaled."""
    image = open_image(data, "a.tif", **options)
    return image.crop(0, 0, *image.size, image.size)


def refused(data, **options) -> str:
    with pytest.raises(BrokenImage) as info:
        whole(data, **options)
    assert info.value.cause == "unsupported"
    return str(info.value)


def smooth(height: int, width: int, count: int, largest: int = 255, kind=np.uint8) -> np.ndarray:
    """(H, W, bands), another wave in every band."""
    rows, columns = np.mgrid[:height, :width]
    waves = [0.5 + 0.5 * np.sin(rows / (3 + i) + columns / (5 + 2 * i)) for i in range(count)]
    return (np.stack(waves, -1) * largest).astype(int).astype(kind)


# --- ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_values_of_a_part_of_16_bits_are_refused_with_the_line_to_write(format, bits):
    data = encode(pil.fromarray((RAMP.astype(np.int64) * (2**bits - 1) // 4095).astype(np.uint16)), format)
    text = refused(data)
    assert f"the largest value here is {2**bits - 1}; say the range" in text
    line = text.rpartition("views.value_range=")[2]
    assert line == f"[0, {2**bits - 1}]"
    assert len(whole(data, value_range=(0, 2**bits - 1)).unique()) == 256


def test_a_window_is_cut_out_of_the_values_and_the_rest_clipped():
    grey = np.array([[0, 1000, 1500, 2000, 4000]], np.uint16)
    for data in (encode(pil.fromarray(grey), "PNG"), tiff(grey[..., None], order=">"), grey):
        assert whole(data, value_range=(1000, 2000))[0].tolist() == [[0, 0, 128, 255, 255]]


def test_a_range_leaves_8_bit_files_as_they_are():
    grey = np.array([[0, 100, 255]], np.uint8)
    assert whole(encode(pil.fromarray(grey), "PNG"), value_range=(0, 4095))[0].tolist() == grey.tolist()


def test_a_depth_or_largest_value_that_the_file_states_is_its_range():
    assert whole(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 511, 1023))[0].tolist() == [[0, 127, 255]]
    assert whole(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 511, 1023), value_range=(511, 1023))[0].tolist() == [
        [0, 0, 255]
    ]


def test_float_and_signed_values_have_the_range_of_the_recipe():
    heights = np.array([[-100.0, 0.0, 100.0]], np.float32)
    data = encode(pil.fromarray(heights), "TIFF")
    assert "the largest value here is 100, the smallest -100" in refused(data)
    assert whole(data, value_range=(-100, 100))[0].tolist() == [[0, 128, 255]]
    assert whole(tiff(heights.astype(np.int16)[..., None]), value_range=(-100, 100))[0].tolist() == [[0, 128, 255]]
    heights[0, 1] = np.nan
    assert "it holds NaN or infinite values" in refused(encode(pil.fromarray(heights), "TIFF"), value_range=(-100, 100))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32])
def test_one_band_of_any_kind_is_read_in_either_order_of_bytes(kind):
    values = smooth(8, 12, 1, 250, kind)
    for order in "<>":
        data = tiff(values, order=order, compress=True)
        found = whole(data, in_chans=1, value_range=(0, 255))
        assert torch.equal(found[0], torch.from_numpy(values[..., 0].astype(np.uint8)))


def test_values_of_any_kind_are_scaled_alike():
    values = np.array([0, 7, 4095, 65535])
    for kind in (np.uint16, np.int32, np.float32, np.uint32):
        assert to_bytes(values.astype(kind), (0, 4095)).tolist() == [0, 0, 255, 255]


# --- bands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"planar": True},
        {"compress": True},
        {"compress": True, "predictor": 2},
        {"compress": True, "planar": True, "predictor": 2},
        {"tile": 16},
        {"tile": 16, "compress": True, "predictor": 2},
        {"tile": 16, "planar": True},
        {"big": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32, np.int16])
def test_every_layout_of_bands_gives_the_same_values(layout, kind, order):
    if layout.get("predictor") and kind == np.float32:
        layout = {**layout, "predictor": 1}
    values = smooth(24, 40, 5, 200, kind)
    data = tiff(values, order=order, **layout)
    value_range = None if kind == np.uint8 else (0, 255)
    found = whole(data, in_chans=5, value_range=value_range)
    assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(values.astype(np.uint8)))


@pytest.mark.parametrize("count", [2, 4, 13])
def test_bands_that_the_view_does_not_have_are_named(count):
    values = smooth(8, 8, count)
    assert torch.equal(whole(tiff(values), in_chans=count), torch.from_numpy(values).permute(2, 0, 1))
    assert torch.equal(whole(values, in_chans=count), torch.from_numpy(values).permute(2, 0, 1))
    text = refused(tiff(values))
    assert f"it has {count} bands, the views have 3 channels; give views.mean and views.std {count} numbers" in text


def test_a_colour_picture_has_not_enough_bands_for_four_channels():
    assert "it has 3 bands, the views have 4 channels" in refused(encode(pil.new("RGB", (4, 4)), "JPEG"), in_chans=4)
    assert "it has 1 band, the views have 2 channels" in refused(encode(pil.new("L", (4, 4)), "PNG"), in_chans=2)


def test_16_bit_colours_of_a_tiff_keep_their_depth():
    values = smooth(16, 16, 3, 4095, np.uint16)
    data = tiff(values, photometric=2)
    assert "3 bands of uint16 have no stated range: the largest value here is 4094" in refused(data)
    levels = whole(data, value_range=(0, 4095)).permute(1, 2, 0).numpy()
    assert np.abs(levels - values / 4095 * 255).max() <= 0.5


def test_one_channel_is_grey_and_not_three_copies():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for data in (encode(pil.fromarray(grey), "PNG"), grey, encode(pil.fromarray(grey), "TIFF")):
        assert torch.equal(whole(data, in_chans=1), torch.from_numpy(grey)[None])
    red = encode(pil.new("RGB", (2, 2), "red"), "PNG")
    assert whole(red, in_chans=1).tolist() == [[[76, 76], [76, 76]]]  # 0.299 of 255


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("count", [1, 2, 4, 13])
def test_a_band_is_resized_as_it_would_be_alone(count, interpolation):
    values = smooth(30, 40, count)
    together = open_image(values, "a", in_chans=count).crop(2, 4, 20, 30, (8, 16), True, interpolation)
    for number in range(count):
        alone = open_image(values[..., number], "a", in_chans=1).crop(2, 4, 20, 30, (8, 16), True, interpolation)
        assert torch.equal(together[number], alone[0])


def test_a_grey_jpeg_is_decoded_at_a_lower_scale_too():
    data = encode(pil.fromarray(smooth(640, 640, 1)[..., 0]), "JPEG", quality=95)
    scaled = open_image(data, "a.jpg", in_chans=1).crop(0, 0, 640, 640, (40, 40))
    exact = open_image(data, "a.jpg", in_chans=1, scaled_decode=False).crop(0, 0, 640, 640, (40, 40))
    assert scaled.shape == (1, 40, 40)
    assert (scaled.float() - exact.float()).abs().mean() < 1.5


def test_bands_that_would_fill_the_memory_are_refused():
    data = tiff(smooth(8, 8, 2))
    claimed = with_directory(
        data, "<", {**open_bands(data).tags, 277: (60_000,), 256: (6000,), 257: (6000,), 284: (2,)}
    )
    assert "bytes of pixels, more than 1,073,741,824" in refused(claimed, in_chans=2)


@pytest.mark.parametrize("layout", [{}, {"planar": True, "compress": True}, {"tile": 16, "predictor": 2}], ids=str)
def test_whatever_is_damaged_in_bands_only_a_broken_image_comes_out(layout):
    data = tiff(smooth(20, 30, 5, 4000, np.uint16), **layout)
    chance = random.Random(0)
    seen = set()
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3, 20])):
            where = chance.randrange(len(data)) if chance.random() < 0.3 else len(data) - 1 - chance.randrange(250)
            damaged[where] = chance.randrange(256)
        try:
            image = open_image(bytes(damaged), "a", max_pixels=10_000, in_chans=5, value_range=(0, 4095))
            assert image.crop(0, 0, *image.size, (8, 8)).shape == (5, 8, 8)
        except BrokenImage as error:
            seen.add(error.cause)
    assert seen <= {"not_an_image", "truncated", "too_large", "unreadable", "unsupported"}


# --- alpha -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), (0,)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_fourth_band_that_is_not_called_alpha_is_measured(extra, kind):
    values = smooth(16, 16, 4, 200, kind)
    data = tiff(values, photometric=2, extra=extra)
    value_range = None if kind == np.uint8 else (0, 255)
    assert "it has 4 bands, the views have 3 channels" in refused(data, value_range=value_range)
    assert "views.alpha=drop to leave the last band out" in refused(data, value_range=value_range)
    kept = whole(data, in_chans=4, value_range=value_range)
    assert torch.equal(kept.permute(1, 2, 0), torch.from_numpy(values.astype(np.uint8)))
    assert torch.equal(whole(data, alpha="drop", value_range=value_range), kept[:3])


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_that_calls_its_fourth_band_alpha_needs_the_word_of_the_recipe(kind):
    values = smooth(16, 16, 4, 200, kind)
    data = tiff(values, photometric=2, extra=(2,))
    options = {} if kind == np.uint8 else {"value_range": (0, 255)}
    text = refused(data, **options)
    assert "its last band is called alpha, as TIFF writers call any fourth band" in text
    expected = torch.from_numpy(values.astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(whole(data, alpha="keep", in_chans=4, **options), expected)
    assert torch.equal(whole(data, alpha="drop", **options), expected[:3])
    if kind == np.uint8:
        assert torch.equal(whole(data, alpha="white"), whole(encode(pil.fromarray(values), "PNG")))
    else:
        assert "alpha is composited in 8-bit files only" in refused(data, alpha="white", **options)


def test_a_second_band_is_lost_to_nobody():
    values = smooth(8, 8, 2)
    assert torch.equal(whole(tiff(values), in_chans=2), torch.from_numpy(values).permute(2, 0, 1))
    assert "it has 2 bands, the views have 1 channel" in refused(tiff(values), in_chans=1)
    assert torch.equal(whole(tiff(values), in_chans=1, alpha="drop")[0], torch.from_numpy(values[..., 0]))
    assert "as TIFF writers call any second band" in refused(tiff(values, extra=(1,)), in_chans=1)


def test_alpha_of_a_logo_is_composited_dropped_or_kept():
    data = encode(pil.new("RGBA", (1, 1), (200, 0, 0, 128)), "PNG")
    assert whole(data).flatten().tolist() == [227, 127, 127]
    assert whole(data, alpha="drop").flatten().tolist() == [200, 0, 0]
    assert whole(data, alpha="keep", in_chans=4).flatten().tolist() == [200, 0, 0, 128]
    assert "it has 4 bands with its alpha, which views.alpha=keep keeps" in refused(data, alpha="keep")
    grey = encode(pil.new("LA", (1, 1), (100, 0)), "PNG")
    assert whole(grey, in_chans=1).flatten().tolist() == [255]
    assert whole(grey, in_chans=1, alpha="drop").flatten().tolist() == [100]
    assert whole(grey, in_chans=2, alpha="keep").flatten().tolist() == [100, 0]


def test_kept_alpha_does_not_weigh_the_colours_when_they_are_resized():
    values = smooth(16, 16, 4)
    values[:8, :, 3] = 0
    data = encode(pil.fromarray(values), "PNG")
    kept = open_image(data, "a", in_chans=4, alpha="keep").crop(0, 0, 16, 16, (8, 8), interpolation="lanczos")
    plain = open_image(values[..., :3].copy(), "a").crop(0, 0, 16, 16, (8, 8), interpolation="lanczos")
    assert torch.equal(kept[:3], plain)


# --- pages -------------------------------------------------------------------------------------------------------


def test_pages_and_frames_are_counted_and_read_by_their_number():
    greys = [pil.new("L", (4, 4), 50 * i) for i in range(1, 4)]
    for format in ("TIFF", "GIF"):
        data = encode(greys[0], format, save_all=True, append_images=greys[1:])
        assert num_pages(data) == 3
        assert [whole(data, page=page)[0, 0, 0].item() for page in range(3)] == [50, 100, 150]
    bands = tiff(smooth(8, 8, 5), pages=3)
    assert torch.equal(whole(bands, in_chans=5, page=2), whole(bands, in_chans=5))


def test_a_page_that_is_not_there_is_a_broken_image():
    for data in (encode(pil.new("L", (4, 4)), "TIFF"), tiff(smooth(8, 8, 5))):
        with pytest.raises(BrokenImage):
            whole(data, page=1, in_chans=1)
    assert num_pages(b"no image at all") == 1
