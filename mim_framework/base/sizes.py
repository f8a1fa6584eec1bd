"""Bounds on the sizes that a recipe may ask for, so that a typo is an error and not a machine without memory.

A number is known by the last word of its key (`embed_dim` by `dim`), as names are the same everywhere. The bounds are
several times what any published model has; what a model of allowed sizes costs in all is looked at before it is built.
"""

from __future__ import annotations

from typing import Any

from mim_framework.base.validation import KeyPath, Problem, leaves, show

LARGEST = {
    "depth": 256, "depths": 256, "layers": 256, "group": 256, "heads": 1_024, "bins": 1_024, "workers": 1_024,
    "factor": 1_024, "size": 4_096, "dim": 16_384, "dims": 16_384, "window": 1_000_000, "patches": 1_000_000,
    "hidden": 1_000_000, "codes": 1_000_000, "classes": 1_000_000, "image": 1_000_000, "batch_size": 10_000_000,
    "vocab_size": 1_000_000, "epochs": 10_000_000, "steps": 10**12, "ratio": 1_024,
}  # fmt: skip
"""Largest number by the end of its key."""
LARGEST_WHOLE = 10**12
"""Of a whole number under any other key but `seed`."""


def oversized(data: Any, path: KeyPath = ()) -> list[Problem]:
    """A problem for every number of a recipe, or of a component's options, that is beyond its bound."""
    found = []
    for where, value in leaves(data, path):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        key = next((part for part in reversed(where) if isinstance(part, str)), "")
        bound = _bound(key, value)
        if bound is not None and value > bound:
            found.append(Problem(where, f"must be at most {bound:,}, got {show(value)}; no published model has more"))
    return found


def _bound(key: str, value: float) -> int | None:
    words = key.split("_")
    for count in (2, 1):
        if (bound := LARGEST.get("_".join(words[-count:]))) is not None:
            return bound
    return LARGEST_WHOLE if isinstance(value, int) and key != "seed" else None
