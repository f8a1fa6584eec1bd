"""What errors of remote file systems mean, by hand: those of S3 as s3fs raises them."""

from __future__ import annotations

import pytest

from mim_framework.data.answers import Answer, told


class BotoError(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__("boto")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class ContentLengthError(Exception):
    code = 400


class NoCredentialsError(Exception):
    pass


def as_s3fs_raises(status: int, code: str, kind: type[OSError] = OSError) -> OSError:
    error = kind("what the server said")
    error.__cause__ = BotoError(status, code)
    return error


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (as_s3fs_raises(416, "InvalidRange"), Answer("unreadable")),
        (as_s3fs_raises(403, "AccessDenied", PermissionError), Answer("forbidden")),
        (as_s3fs_raises(404, "NoSuchKey", FileNotFoundError), Answer("missing")),
        (as_s3fs_raises(403, "InvalidObjectState", PermissionError), Answer("forbidden")),
        (as_s3fs_raises(503, "SlowDown"), Answer(None)),
        (as_s3fs_raises(400, "RequestTimeout", TimeoutError), Answer(None)),
        (as_s3fs_raises(400, "BadDigest"), Answer(None)),
        (as_s3fs_raises(409, "OperationAborted"), Answer(None)),
        (as_s3fs_raises(400, "ExpiredToken", PermissionError), Answer("forbidden", of_the_store=True)),
        (as_s3fs_raises(403, "SignatureDoesNotMatch", PermissionError), Answer("forbidden", of_the_store=True)),
        (as_s3fs_raises(404, "NoSuchBucket", FileNotFoundError), Answer("missing", of_the_store=True)),
        (as_s3fs_raises(301, "PermanentRedirect"), Answer("forbidden", of_the_store=True)),
        (NoCredentialsError(), Answer("forbidden", of_the_store=True)),
    ],
)
def test_what_s3_says_of_a_file_of_the_store_and_of_now(error: Exception, answer: Answer):
    assert Answer.of(error) == answer


def test_the_status_of_what_an_error_was_made_of_is_only_that_of_s3():
    """aiohttp makes the error of a short answer of one with the code 400, which is no answer of the server."""
    error = ConnectionError("not completed")
    error.__cause__ = ContentLengthError()
    assert Answer.of(error) == Answer(None)


def test_an_error_is_told_in_a_line():
    assert told(ValueError("Parameter validation failed:\nInvalid  bucket name")) == (
        "ValueError: Parameter validation failed: Invalid bucket name"
    )
    assert told(TimeoutError()) == "TimeoutError"
