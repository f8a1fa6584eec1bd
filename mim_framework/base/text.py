"""Text for people: what a file, a name or an address holds never steers the terminal and never gives a secret away."""

from __future__ import annotations

import logging
import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_USER = re.compile(
    r"""([A-Za-z][A-Za-z0-9+.-]*://)
    (?: [^/\s'":]*:(?!\d+/)[^/\s'"]*@   # user:password@, whatever the password holds but a slash
      | [^/\s'":@]+:(?!\d+/)[^\s'"@]*@   # the secret keys of S3 hold slashes
      | [^/\s'"?\#@]*@ )                 # a token
    """,
    re.VERBOSE,
)
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s'\"?]*)\?[^\s'\"#]+")

MASK = "***"
"""Stands where a user name and a password, or a query such as a signature, stood in a URL."""


def printable(text: str) -> str:
    r"""The text with control characters, direction marks and lone surrogates written out, as `\x1b`; lines stay lines.

    An escape sequence could retitle a terminal, hide lines or fake them; a direction mark shows another name.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_secrets(text: str) -> str:
    """URLs in a text with `***` for user and password, and for a query, which may be a signature."""
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\1?{MASK}", _USER.sub(rf"\1{MASK}@", text))


def for_people(text: str) -> str:
    """Both: what every message and every line on the terminal goes through."""
    return printable(without_secrets(text))


def masked(url: str) -> bool:
    """Whether a secret was taken out of a URL."""
    return f"://{MASK}@" in url or url.endswith(f"?{MASK}")


def unmasked(url: str) -> str:
    """A URL from which a secret was taken, as it can be opened with credentials of the environment."""
    return url.replace(f"://{MASK}@", "://").removesuffix(f"?{MASK}")


def plain_logger(name: str) -> logging.Logger:
    """The logger of a module, whose messages are `for_people`."""
    logger = logging.getLogger(name)
    logger.addFilter(_plain)
    return logger


def _plain(record: logging.LogRecord) -> bool:
    record.msg, record.args = for_people(record.getMessage()), ()
    return True
