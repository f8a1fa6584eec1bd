"""Checkpoints of other code bases, read as data and written in their layouts; plugins know the layouts."""

from __future__ import annotations

from mim_framework.convert.exporting import export_run
from mim_framework.convert.importing import ImportReport, import_checkpoint
from mim_framework.convert.reading import ForeignCheckpoint, read_checkpoint
from mim_framework.layouts.tables import resize_bias_table, resize_position_table

__all__ = [
    "ForeignCheckpoint",
    "ImportReport",
    "export_run",
    "import_checkpoint",
    "read_checkpoint",
    "resize_bias_table",
    "resize_position_table",
]
