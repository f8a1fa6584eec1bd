"""What of a source must stay the same, and in words what has changed of it; `Source.identity` says what it is."""

from __future__ import annotations

from typing import Any

KNOWN_IN_PLACES = ("sizes",)
"""What a source can say of its images in some places only, such as on a local disk: compared where both sides know it,
and no part of a run's state, which is the same wherever the images lie."""


def source_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two `Source.identity`, in words; what only one of them knows is not compared."""
    words = {"names": "other names", "sizes": "files of other sizes", "blocks": "blocks of other lengths"}
    changes = [key for key in now if key in then and then[key] != now[key]]
    if "num_images" in changes:  # everything else follows from it
        return [f"{then['num_images']} images -> {now['num_images']}"]
    return [words.get(key, f"another '{key}'") for key in changes]
