"""What of a source must stay the same, and in words what has changed of it; `Source.identity` says what it is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mim_framework.contract.components import Source
from mim_framework.data.file_systems import RemoteSection

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


def full_identity(source: Source) -> dict[str, Any]:
    """`Source.identity` with a hash of all options, but for those of how patiently a server is asked."""
    patience = set(RemoteSection.model_fields)
    options = json.dumps([source.name, source.config.model_dump(mode="json", exclude=patience)], sort_keys=True)
    return {**source.identity(), "options": hashlib.sha256(options.encode()).hexdigest()}
