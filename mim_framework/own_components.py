"""The core's own components as one plugin, `builtins`: the hooks of the rooms that hold them."""

from __future__ import annotations

from mim_framework.builtins import (
    mim_checkpoint_formats,
    mim_decoders,
    mim_encoders,
    mim_losses,
    mim_maskers,
    mim_objectives,
    mim_sources,
    mim_targets,
    mim_views,
)
from mim_framework.evaluate import mim_evaluations

__all__ = [
    "mim_checkpoint_formats",
    "mim_decoders",
    "mim_encoders",
    "mim_evaluations",
    "mim_losses",
    "mim_maskers",
    "mim_objectives",
    "mim_sources",
    "mim_targets",
    "mim_views",
]
