"""What is shown and written down never steers a terminal and never holds a secret."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mim_framework.base.errors import BrokenImage, MimError
from mim_framework.base.text import masked, plain_logger, printable, unmasked, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("lone \udcff", r"lone \udcff"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Übergröße 写真", "Übergröße 写真"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("s3://AKIA:se/cr+et@bucket/x", "s3://***@bucket/x"),
        ("http://user:p@ss@host:80/a?sig=1&x=2", "http://***@host:80/a?***"),
        ("https://token@host/x", "https://***@host/x"),
        ("simplecache::s3://k:s@b/x", "simplecache::s3://***@b/x"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("s3://bucket/a@b.png", "s3://bucket/a@b.png"),
        ("C:\\data?", "C:\\data?"),
    ],
)
def test_secrets_of_urls_are_left_out(url: str, written: str) -> None:
    assert without_secrets(url) == written
    assert without_secrets(written) == written


def test_an_address_whose_secret_was_left_out_opens_without_it() -> None:
    assert masked("s3://***@bucket/x")
    assert not masked("s3://bucket/x")
    assert unmasked("s3://***@bucket/x") == "s3://bucket/x"
    assert unmasked("http://h/x?***") == "http://h/x"


def test_errors_and_logged_lines_are_plain(caplog: pytest.LogCaptureFixture) -> None:
    assert str(MimError("\x1b[2J http://u:p@h")) == r"\x1b[2J http://***@h"
    broken = BrokenImage("\x1b[2J.png", "unreadable", "http://u:p@h/x failed")
    assert str(broken) == r"\x1b[2J.png: unreadable: http://***@h/x failed"
    assert broken.detail == "http://***@h/x failed"
    plain_logger("tests.text").warning("\x07 %s", "s3://a:b@c")
    assert caplog.record_tuples == [("tests.text", logging.WARNING, r"\x07 s3://***@c")]


def test_a_source_with_a_password_can_be_given_again(tmp_path: Path) -> None:
    from mim_framework.base.errors import DataError
    from mim_framework.data.stores import store_of

    with pytest.raises(DataError, match="was not written down: give the whole URL again, data.source.root=URL"):
        store_of("nowhere://***@host/images", "data.source.root")
