"""fsspec's file systems as a store asks them: once, with our time limits and retries. Start at `open_file_system`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.base.text import without_secrets
from mim_framework.base.validation import leaves

HTTP = ("http", "https")
S3 = ("s3", "s3a")
NOTICES_SILENCE = (*HTTP, *S3)
"""Protocols whose file systems can give up after some seconds without a byte, whatever the size of the file."""

_CREDENTIAL = re.compile("secret|passw|token|credential|private|(access|account|api)_?key|^key$|auth|cookie", re.I)
_NO_SECRETS = ("anon", "cloud", "browser", "cache", "google_default")
"""What gcsfs takes for `token` beside secrets."""
_DECIDED_ELSEWHERE = {
    "asynchronous": "belongs to fsspec",
    "loop": "belongs to fsspec",
    "skip_instance_cache": "would connect anew for every image",
    "client_kwargs.timeout": "is the option 'timeout' beside it",
    "config_kwargs.read_timeout": "is the option 'timeout' beside it",
    "config_kwargs.connect_timeout": "is the option 'timeout' beside it",
    "config_kwargs.retries": "is the option 'retries' beside it",
}


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        ValueError: naming an option that is a secret or decided elsewhere, never its value.
    """
    for path, value in leaves(options):
        parts = [str(part) for part in path]
        name = ".".join(parts)
        for taken, why in _DECIDED_ELSEWHERE.items():
            if f".{taken}." in f".{name}.":
                raise ValueError(f"'{name}' {why}; leave it out")
        plain = value is None or isinstance(value, bool) or value in _NO_SECRETS
        secret = not plain and any(_CREDENTIAL.search(part) for part in parts)
        if secret or (isinstance(value, str) and without_secrets(value) != value):
            raise ValueError(
                f"'{name}' would be written to recipe.yaml, where no secret belongs: give credentials in the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for example), or name a profile"
            )
    return options


class RemoteSection(Section):
    """How a remote store is asked, and how patiently; for a source's options to inherit."""

    retries: int = Field(5, ge=0, le=100)
    """Further tries of a remote read that fails for a reason that may pass (server errors, resets, silence, short
    answers), with random waits of up to 0.1, 0.2, 0.4 ... 15 seconds between them and none begun after 60 seconds; then
    the run saves and stops. Clients of object stores do alike: s3fs 4 further tries with waits of up to 15 seconds."""
    timeout: float = Field(10.0, gt=0, le=3600)
    """Seconds without a byte from a remote store after which a try has failed (s3fs waits for 15 by itself, fsspec's
    http for 300). Over http and s3 a file may take longer while bytes arrive, elsewhere it bounds a whole read."""
    storage_options: Annotated[dict[str, Any], AfterValidator(_checked)] = {}
    """Options of fsspec's file system for URLs, such as `{endpoint_url: "https://minio.local:9000"}`, `{profile: NAME}`
    or `{anon: true}` of s3fs. Secrets are refused, since options are written down: credentials come from the
    environment. Retries and time limits are those beside it."""


def protocol_of(url: str) -> str:
    """That of the server: of a chain such as `simplecache::s3://bucket`, the last one."""
    return url.rpartition("::")[2].partition("://")[0]


def open_file_system(url: str, section: RemoteSection) -> tuple[Any, str]:
    """The file system of a URL, which fsspec keeps one of per process, and the path on it.

    It gives up after the seconds of silence of the section, and repeats nothing by itself: tries of its own would
    multiply with ours and not be counted.
    """
    from fsspec.core import url_to_fs

    protocol = protocol_of(url)
    ours = _options(protocol, section.timeout)
    chained = "::" in url
    file_system, path = url_to_fs(url, **_merged({protocol: ours} if chained else ours, section.storage_options))
    if protocol in S3:
        (file_system.fs if chained else file_system).retries = 1
    return file_system, path


def _options(protocol: str, seconds: float) -> dict[str, Any]:
    if protocol in HTTP:
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(None, sock_connect=seconds, sock_read=seconds)}}
    if protocol in S3:
        once = {"retries": {"total_max_attempts": 1}}
        limits = {"connect_timeout": seconds, "read_timeout": seconds, **once}
        # s3fs would ask for the size of every file before it reads it, and keep all listings
        return {"config_kwargs": limits, "max_concurrency": 1, "use_listings_cache": False}
    return {}


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options, of which those of the recipe count where both have one."""
    merged = dict(ours)
    for name, value in given.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def check_address(url: str, key: str) -> None:
    """
    Raises:
        DataError: if the address holds credentials that its file system would take for a part of the name.
    """
    if protocol_of(url) not in S3 or "@" not in url or "://arn:" in url:
        return
    if without_secrets(url) != url:
        options = f"{key.rpartition('.')[0] or 'data.source'}.storage_options"
        raise DataError(
            f"{key}: '{url}' holds credentials, which S3 takes from elsewhere: give AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY in the environment, or name a profile of ~/.aws/credentials: {options}.profile=NAME"
        )
