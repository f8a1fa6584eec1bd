"""`mim data index`: where every image of tar shards lies, found once and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mim_framework.base.errors import DataError, Unreachable
from mim_framework.base.files import replace_file
from mim_framework.base.paths import is_url, path_or_url
from mim_framework.data.file_systems import RemoteSection
from mim_framework.data.shard_index import ENERGON, OURS, ShardIndex, energon_bytes, make_index
from mim_framework.data.sources.folder import IMAGE_SUFFIXES, told_kinds
from mim_framework.data.sources.tar import Shards
from mim_framework.data.stores import LocalStore


def index_shards(
    root: str, output: Path | None, *, label_key: str, force: bool, report: Callable[[str], object]
) -> int:
    """Write `SHARD.mim_index` for every shard, and energon's `SHARD.idx` where there is none.

    An index that fits its shard is left as it is. A shard that cannot be indexed is told and the others are made.

    Args:
        root: as `data.source.root` of source `tar`.
        output: folder to write to, by default beside the shards, which must then be local.
        label_key: where in `json` members labels are looked for.
        force: make them all anew.

    Returns:
        How many shards could not be indexed.

    Raises:
        DataError: if there are no shards, or nothing can be written there.
        Unreachable: if a remote store does not answer.
    """
    try:
        root = path_or_url(root)
    except ValueError as error:
        raise DataError(f"SHARDS: {error}") from None
    if is_url(root) and output is None:
        raise DataError(f"'{root}' is a URL; name a local folder for the indices: --output FOLDER (data.source.index)")
    shards = Shards.of(root, RemoteSection())
    failed = 0
    for shard in shards.names:
        target = Path(shards.store.path(shard)) if isinstance(shards.store, LocalStore) else None
        place = target if output is None and target is not None else Path(output or "") / shard
        kept = None if force else _kept(Path(f"{place}{OURS}"))
        try:
            if kept is not None and (kept.size, kept.label_key) == (shards.store.size(shard), label_key):
                report(f"{shard}: has its index of {len(kept.names):,} images")
                continue
            index = make_index(shards.store, shard, IMAGE_SUFFIXES, label_key=label_key)
        except Unreachable:
            raise
        except DataError as error:
            failed += 1
            report(f"cannot be indexed: {error}")
            continue
        _write(index, place)
        there = f", left out: {', '.join(told_kinds(Counter(index.skipped)))}" if index.skipped else ""
        report(f"{shard}: {len(index.names):,} images in {len(index.starts):,} samples{there}")
    return failed


def _kept(path: Path) -> ShardIndex | None:
    """An index that is there and whole."""
    try:
        return ShardIndex.from_bytes(path.read_bytes())
    except (OSError, ValueError):
        return None


def _write(index: ShardIndex, place: Path) -> None:
    energon = Path(f"{place}{ENERGON}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(f"{place}{OURS}"), index.to_bytes())
        if not energon.exists():
            replace_file(energon, energon_bytes(index))
    except OSError as error:
        cure = "name another folder with --output"
        raise DataError(f"the index of '{place}' cannot be written: {error.strerror}; {cure}") from error
