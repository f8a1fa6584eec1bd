"""Files of features: Parquet, as it comes; npz and safetensors, held in memory until all is there."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mim_framework.base.errors import MimError
from mim_framework.base.files import replacing

METADATA = "mim_framework"
"""Key of the facts, as JSON: in the metadata of a Parquet or safetensors file, and name of an array in an npz."""
GROUP_BYTES = 64 * 2**20
"""Rows of so many bytes of features are written to a Parquet file together."""


@dataclass(frozen=True)
class Rows:
    """Of a few images: (index in the source, name), labels (b,) with -1 where there is none, features (b, ...)."""

    names: list[tuple[int, str]]
    labels: np.ndarray
    features: np.ndarray


@contextmanager
def writer_for(output: Path, num_images: int, dtype: str) -> Iterator[Writer]:
    """What writes features under the suffix of `output`; the file takes its name when all is well.

    Args:
        num_images: no more will come.

    Raises:
        MimError: if there is no such format, what it needs is not installed, or writing fails.
    """
    if output.suffix not in WRITERS:
        raise MimError(f"--output {output}: a file of features ends in {', '.join(WRITERS)}")
    writer_type = WRITERS[output.suffix]
    if writer_type.needs and find_spec(writer_type.needs) is None:
        raise MimError(
            f"--output {output}: {writer_type.needs} is not installed; pip install 'mim-framework[parquet]', or write "
            "a .npz or .safetensors file"
        )
    if output.is_dir():
        raise MimError(f"cannot write {output}: it is a folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as temporary:
            writer = writer_type(temporary, num_images, dtype)
            try:
                yield writer
            finally:
                writer.close()
    except (OSError, SafetensorError) as error:
        raise MimError(f"cannot write {output}: {getattr(error, 'strerror', None) or error}") from error


class Writer:
    """Takes rows as they come, and the facts at the end."""

    needs = ""
    """The package that it is written by, if it is an optional one."""

    def __init__(self, file: Path, num_images: int, dtype: str) -> None:
        self.file, self.num_images, self.dtype = file, num_images, dtype
        self.num_rows = 0
        self.shape: tuple[int, ...] = ()

    def add(self, rows: Rows) -> None:
        """The features of some more images."""
        self.shape = rows.features.shape[1:]
        self._add(rows)
        self.num_rows += len(rows.features)

    @abstractmethod
    def _add(self, rows: Rows) -> None: ...

    @abstractmethod
    def finish(self, facts: dict[str, Any]) -> None:
        """Write what is left, and where the features come from."""

    def close(self) -> None:
        """Called at the end, whatever happened."""
        return


class _InMemory(Writer):
    """One array for all, as long as images may come."""

    def __init__(self, file: Path, num_images: int, dtype: str) -> None:
        super().__init__(file, num_images, dtype)
        self.names: list[str] = []
        self.labels = np.full(num_images, -1, dtype=np.int64)
        self.features: np.ndarray | None = None

    def _add(self, rows: Rows) -> None:
        if self.features is None:
            self.features = np.empty((self.num_images, *self.shape), self.dtype)
        here = slice(self.num_rows, self.num_rows + len(rows.features))
        self.features[here], self.labels[here] = rows.features, rows.labels
        self.names += [name for _, name in rows.names]

    def arrays(self) -> dict[str, np.ndarray]:
        assert self.features is not None
        return {"features": self.features[: self.num_rows], "labels": self.labels[: self.num_rows]}


class NpzWriter(_InMemory):
    """Arrays `features`, `labels`, `names`, and the facts as JSON in `mim_framework`; nothing is pickled."""

    def finish(self, facts: dict[str, Any]) -> None:
        with self.file.open("wb") as file:
            np.savez(file, **self.arrays(), names=np.array(self.names), **{METADATA: np.array(json.dumps(facts))})


class SafetensorsWriter(_InMemory):
    """Tensors `features` and `labels`, and `names`: the bytes of a JSON list, as safetensors holds no texts."""

    def finish(self, facts: dict[str, Any]) -> None:
        names = np.frombuffer(json.dumps(self.names).encode(), dtype=np.uint8)
        save_file({**self.arrays(), "names": names}, self.file, {METADATA: json.dumps(facts)})


class ParquetWriter(Writer):
    """Columns `name`, `label` (null where there is none) and `features`, a list of fixed length.

    Of tokens, that list is (N, D) row by row; the facts have its shape.
    """

    needs = "pyarrow"

    def __init__(self, file: Path, num_images: int, dtype: str) -> None:
        super().__init__(file, num_images, dtype)
        self._rows: list[Rows] = []
        self._parquet: Any = None

    def _add(self, rows: Rows) -> None:
        self._rows.append(rows)
        if sum(each.features.nbytes for each in self._rows) >= GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        names = [name for rows in self._rows for _, name in rows.names]
        labels = np.concatenate([rows.labels for rows in self._rows])
        values = np.concatenate([rows.features.reshape(-1) for rows in self._rows])
        columns = {
            "name": pa.array(names, pa.string()),
            "label": pa.array(labels, pa.int64(), mask=labels < 0),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(values), int(np.prod(self.shape))),
        }
        table = pa.table(columns)
        if self._parquet is None:
            self._parquet = parquet.ParquetWriter(self.file, table.schema, use_dictionary=["name"])
        self._parquet.write_table(table)
        self._rows = []

    def finish(self, facts: dict[str, Any]) -> None:
        if self._rows:
            self._write()
        self._parquet.add_key_value_metadata({METADATA: json.dumps(facts)})

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()


WRITERS: dict[str, type[Writer]] = {".parquet": ParquetWriter, ".npz": NpzWriter, ".safetensors": SafetensorsWriter}
"""Suffix of a file -> what writes it."""
