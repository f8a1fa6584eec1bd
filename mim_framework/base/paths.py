"""Paths as options and commands take them: `~`, `file://` and relative ones alike, and URLs where they can be read."""

from __future__ import annotations

import os
import re

_LOCAL_SCHEMES = ("file://", "local://")


def is_url(text: str) -> bool:
    """Whether it names something behind a protocol, such as s3://bucket/images or a chain of them (zip::...)."""
    return not text.startswith(_LOCAL_SCHEMES) and ("://" in text or "::" in text)


def path_or_url(text: str) -> str:
    """A URL as it is; of a local path `~` becomes the home folder, and `file://` is left out.

    A relative path stays one, to the current folder.

    Raises:
        ValueError: if `~` names a home folder that does not exist, or the path begins with a variable of the shell.
    """
    if is_url(text):
        return text
    for scheme in _LOCAL_SCHEMES:
        text = text.removeprefix(scheme)
    if variable := re.match(r"\$\{?\w+\}?", text):
        raise ValueError(
            f"variables such as {variable[0]} are not looked up here; write the folder that it stands for, or ./{text} "
            "for a folder of that name"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"there is no home folder of '{text.split('/')[0]}'; write ./{text} for a folder of that name")
    return expanded


def local_path(text: str) -> str:
    """As `path_or_url`, where only a local path will do.

    Raises:
        ValueError: for a URL.
    """
    if "://" in text and is_url(text):
        raise ValueError(f"needs a local path, got the URL '{text}'; only images are read from URLs (data.source)")
    return path_or_url(text)
