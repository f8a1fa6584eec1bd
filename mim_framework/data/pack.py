"""Images of any source into tar shards, named as webdataset names them. Start at `pack`.

Which images a shard holds follows from its number alone, so that shards are made in any order, by any machines, and
again after a kill. A shard appears whole or not at all; its record, in the folder `.pack`, is written after it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as pil

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage, DataError, MimError
from mim_framework.base.files import replace_file, replacing, sha256_of
from mim_framework.base.text import printable
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data.decode import MAX_PIXELS, is_transparent, kind_of, native_of, open_image
from mim_framework.data.identity import full_identity
from mim_framework.data.journal import lock
from mim_framework.data.prefetch import prefetch
from mim_framework.data.reader import read_each
from mim_framework.data.values import GREY, RGB

RECORDS, SUMMARY, CLASSES = ".pack", "pack.json", "classes.txt"
VERSION = 1
TOGETHER = 8
"""Images of one request to a worker: encoded ones of a camera are many bytes."""
LONGEST_NAME = 80
"""Characters of the last part of a name that are kept."""
_SUFFIXES = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm",
    "AVIF": "avif", "JPEG2000": "jp2",
}  # fmt: skip
_SHRUNK = {"grey, 8 bit": GREY, "bilevel, 1 bit": GREY, "RGB, 8 bit": RGB, "CMYK, 8 bit": RGB, "palette, 8 bit": RGB}
"""Channels of the JPEG that a mode becomes; others would lose bits or bands and stay as they are."""
_OF_A_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_IMAGE_SUFFIX = re.compile(r"\.(jpe?g?|jfif|png|webp|gif|bmp|tiff?|p[pgbn]m|avif|jp2)$", re.IGNORECASE)


@dataclass(frozen=True)
class Packing:
    """What becomes of the images. `short_side`: pixels to shrink to, None to keep all bytes as they are."""

    per_shard: int = 2000
    shuffled: bool = False
    seed: int = 0
    short_side: int | None = None
    quality: int = 90
    max_pixels: int = MAX_PIXELS


class Packed(NamedTuple):
    """An image of a shard. `kept`: larger than it should be, but left as it is."""

    key: str
    suffix: str
    data: bytes
    label: int | None
    kept: bool = False


class Unreadable(NamedTuple):
    """An image that is in no shard; `cause` as in `BrokenImage`."""

    name: str
    cause: str
    detail: str


def pack(
    source: Source,
    output: Path,
    packing: Packing = Packing(),
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
    progress: Callable[[int, int, str], object] = lambda done, total, text: None,
) -> dict[str, Any] | None:
    """Write the shards of a part of the images; those that are there and whole are not made again.

    Args:
        output: a local folder.
        part: (i, n) for every n-th shard, from number i on; parts may be packed at once, by machines that share it.
        workers: processes that read and shrink.
        progress: is told images done, images of this part, and shards in words.

    Returns:
        What `pack.json` says of all parts; None while shards of other parts are missing.

    Raises:
        DataError: if the source cannot be read any more, or gives what no shard can hold.
        MimError: if the folder holds other shards, cannot be written, or gives back other bytes than were written.
    """
    try:
        with _begun(output, {"version": VERSION, "source": full_identity(source), **asdict(packing)}, part[0]):
            num_shards = -(-len(source) // packing.per_shard)
            _pack_shards(source, output, packing, range(part[0], num_shards, part[1]), workers, progress)
            return _finish(output, num_shards, source, part[0])
    except OSError as error:
        raise MimError(f"{output} cannot be written: {error.strerror}; the same command goes on later") from error


def _pack_shards(
    source: Source,
    output: Path,
    packing: Packing,
    mine: range,
    workers: int,
    progress: Callable[[int, int, str], object],
) -> None:
    todo = [shard for shard in mine if _record(output, shard) is None]
    order = rng.permutation(packing.seed, "pack", len(source)) if packing.shuffled else None

    def places(shard: int) -> range:
        return range(shard * packing.per_shard, min(len(source), (shard + 1) * packing.per_shard))

    def requests() -> Iterator[list[int]]:
        for shard in todo:
            for start in places(shard)[::TOGETHER]:
                positions = range(start, min(start + TOGETHER, places(shard).stop))
                yield list(positions) if order is None else order[positions.start : positions.stop].tolist()

    total, ready = sum(len(places(shard)) for shard in mine), len(mine) - len(todo)
    done = total - sum(len(places(shard)) for shard in todo)
    progress(done, total, f"{ready:,} of {len(mine):,} shards")
    answers = prefetch(_Reader(source, packing), requests(), workers=workers, remote=source.remote)
    for number, shard in enumerate(todo, 1 + ready):
        _write(output, shard, _images(answers, len(places(shard))))
        done += len(places(shard))
        progress(done, total, f"{number:,} of {len(mine):,} shards")


def shard_name(shard: int) -> str:
    """File of a shard; names sort as numbers do."""
    return f"shard-{shard:06d}.tar"


def key_of(name: str, index: int) -> str:
    """Name of a sample in a shard: its path, without what tar or webdataset would read as something else.

    The index in the source keeps it apart from all others; the first dot of its last part is that before the suffix.
    """
    stem = _IMAGE_SUFFIX.sub("", name)
    parts = [re.sub(r"[^\w\-+=@#(), ]", "_", each) for each in stem.split("/") if each not in ("", ".", "..")]
    last = parts.pop() if parts else "image"
    return "/".join([*parts, f"{last[:LONGEST_NAME]}_{index:09d}"])


class _Reader:
    """Reads some images per call, in a worker."""

    def __init__(self, source: Source, packing: Packing) -> None:
        self.source, self.packing = source, packing

    def __getitem__(self, indices: list[int]) -> list[Packed | Unreadable] | DataError:
        """The images in order, or the error that ends the packing: raised, its text would be one of a traceback."""
        found: list[Packed | Unreadable] = []
        try:
            for index, sample in zip(indices, read_each(self.source, indices), strict=True):
                try:
                    if isinstance(sample, BrokenImage):
                        raise sample
                    found.append(self._packed(index, sample))
                except BrokenImage as error:
                    found.append(Unreadable(error.name, error.cause, error.detail))
        except DataError as error:
            return error
        return found

    def _packed(self, index: int, sample: Sample) -> Packed:
        """
        Raises:
            BrokenImage: if the image cannot be used.
            DataError: if a shard cannot hold it.
        """
        if sample.page:
            text = f"'{sample.name}' is a later page of its file, and a shard holds whole files"
            raise DataError(f"{text}; pack without data.source.pages=each")
        packing, key = self.packing, key_of(sample.name, index)
        image = open_image(sample.data, sample.name, max_pixels=packing.max_pixels, decoder="pillow", alpha="keep")
        format, mode = kind_of(image)
        larger = packing.short_side is not None and min(image.size) > packing.short_side
        if larger and mode in _SHRUNK and not is_transparent(image):
            return Packed(key, "jpg", _shrunk(sample, _SHRUNK[mode], packing), sample.label)
        native_of(image)  # a file that is cut off is found out now, not by a run
        if isinstance(sample.data, bytes):
            return Packed(key, _SUFFIXES[format], sample.data, sample.label, larger)
        return Packed(key, *_encoded(sample), sample.label, larger)


def _shrunk(sample: Sample, channels: int, packing: Packing) -> bytes:
    """A JPEG of the whole picture, upright, from its full resolution."""
    assert packing.short_side is not None
    image = open_image(
        sample.data, sample.name, max_pixels=packing.max_pixels, decoder="pillow", scaled_decode=False,
        in_chans=channels,
    )  # fmt: skip
    scale = packing.short_side / min(image.size)
    height, width = (max(packing.short_side, round(side * scale)) for side in image.size)
    pixels = image.crop(0, 0, *image.size, (height, width)).numpy()
    buffer = io.BytesIO()
    picture = pil.fromarray(pixels[0] if channels == GREY else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.save(buffer, "JPEG", quality=packing.quality)
    return buffer.getvalue()


def _encoded(sample: Sample) -> tuple[str, bytes]:
    """Suffix and bytes of what a source has decoded, without loss.

    Raises:
        DataError: if neither PNG nor TIFF can hold it.
    """
    image = sample.data
    if isinstance(image, np.ndarray):
        values = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        deep = values.ndim == 2 and str(values.dtype) in ("uint16", "float32")
        if not deep and not (values.dtype == np.uint8 and (values.ndim == 2 or values.shape[2] == RGB)):
            raise DataError(f"'{sample.name}': no file for an array {image.shape} of {image.dtype} is written")
        image = pil.fromarray(np.ascontiguousarray(values))
    buffer = io.BytesIO()
    if image.mode in _OF_A_PNG:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()
    if image.mode not in ("F", "CMYK"):
        raise DataError(f"'{sample.name}': no file for a picture of Pillow mode '{image.mode}' is written")
    image.save(buffer, "TIFF", compression="tiff_deflate")
    return "tif", buffer.getvalue()


def _images(answers: Iterator[Any], count: int) -> Iterator[Packed | Unreadable]:
    """The next images of the workers.

    Raises:
        DataError: that of a worker.
    """
    while count > 0:
        answer = next(answers)
        if isinstance(answer, DataError):
            raise answer
        count -= len(answer)
        yield from answer


# --- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def _begun(output: Path, about: dict[str, Any], part: int) -> Iterator[None]:
    """The folder, for no other process that makes the same part.

    Every part has a file of its own that says what is packed, as parts may begin at the same moment.

    Raises:
        MimError: if other shards are there.
        DataError: if another process makes this part.
    """
    about, records = json.loads(json.dumps(about)), output / RECORDS
    if not records.is_dir() and output.is_dir() and any(output.iterdir()):
        raise MimError(f"{output} is not empty; name a new folder")
    for file in sorted(records.glob("about-*.json")):
        if (before := _json(file)) != about:
            changed = ", ".join(key for key in about if not isinstance(before, dict) or before.get(key) != about[key])
            raise MimError(f"{output} holds shards of other images or options ({changed}); name another folder")
    records.mkdir(parents=True, exist_ok=True)
    with (records / f"lock-{part}").open("ab") as file:
        lock(file, output)
        replace_file(records / f"about-{part}.json", json.dumps(about).encode())
        yield


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, FileNotFoundError):
        return None


def _record(output: Path, shard: int) -> dict[str, Any] | None:
    """What was written down of a shard that is there in its whole length; None if it has to be made."""
    record = _json(output / RECORDS / f"{shard_name(shard)}.json")
    if not isinstance(record, dict):
        return None
    file = output / shard_name(shard)
    size = file.stat().st_size if file.is_file() else 0
    return record if record.get("bytes") == size else None


def _write(output: Path, shard: int, images: Iterable[Packed | Unreadable]) -> None:
    """One shard, read back before it takes its name, and its record."""
    unreadable: list[Unreadable] = []
    hashes: list[tuple[str, bytes]] = []
    kept, path = 0, output / shard_name(shard)
    record: dict[str, Any] = {"bytes": 0, "sha256": None}
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as file:
            for image in images:
                if isinstance(image, Unreadable):
                    unreadable.append(image)
                    continue
                kept += image.kept
                members = {image.suffix: image.data}
                if image.label is not None:
                    members["cls"] = str(image.label).encode()
                for suffix, data in members.items():
                    hashes.append((f"{image.key}.{suffix}", hashlib.sha256(data).digest()))
                    file.addfile(_header(hashes[-1][0], len(data)), io.BytesIO(data))
        _compare(temporary, hashes, path)
        record |= {"bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
    num_images = sum(not name.endswith(".cls") for name, _ in hashes)
    if not num_images:
        path.unlink()
        record |= {"bytes": 0, "sha256": None}
    record |= {"images": num_images, "kept": kept, "unreadable": [each._asdict() for each in unreadable]}
    replace_file(output / RECORDS / f"{path.name}.json", json.dumps(record).encode())


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Without a time or an owner, so that the same images make the same bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header


def _compare(file: Path, hashes: list[tuple[str, bytes]], path: Path) -> None:
    """
    Raises:
        MimError: if a file does not hold what was written to it.
    """
    with tarfile.open(file, "r:") as found:
        back = [(each.name, hashlib.sha256(_content(found, each)).digest()) for each in found]
    if back != hashes:
        raise MimError(f"{path} does not hold what was written to it; see to the disk")


def _content(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = file.extractfile(member)
    return b"" if content is None else content.read()


def _finish(output: Path, num_shards: int, source: Source, part: int) -> dict[str, Any] | None:
    """The list of all shards, once all are there."""
    shards, unreadable, kept = {}, [], 0
    for shard in range(num_shards):
        if (record := _record(output, shard)) is None:
            return None
        kept += record["kept"]
        unreadable += record["unreadable"]
        if record["images"]:
            shards[shard_name(shard)] = {key: record[key] for key in ("images", "bytes", "sha256")}
    num_images = sum(each["images"] for each in shards.values())
    found = {"images": num_images, "shards": shards, "kept_larger": kept, "unreadable": unreadable}
    if source.classes is not None:
        names = (printable(name).replace("\n", " ") for name in source.classes)
        _publish(output, CLASSES, "".join(f"{name}\n" for name in names).encode(), part)
    _publish(output, SUMMARY, json.dumps(found, indent=1).encode(), part)
    return found


def _publish(output: Path, name: str, content: bytes, part: int) -> None:
    """Parts may end at the same moment, with the same content."""
    own = output / RECORDS / f"{name}.{part}"
    replace_file(own, content)
    own.replace(output / name)
