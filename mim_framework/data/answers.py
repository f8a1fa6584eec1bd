"""What the errors of remote file systems mean: whose fault they are, and whether to ask again. Start at `Answer.of`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mim_framework.base.errors import Cause

_TEMPORARY_STATUS = frozenset({408, 425, 429})
_MISSING_STATUS = frozenset({404, 410})
_FORBIDDEN_STATUS = frozenset({401, 403, 407})
FAULTS_OF_THE_CALL = (TypeError, AttributeError, NotImplementedError, ImportError, MemoryError)
"""Of a file system's code, not of its server."""

# fmt: off
_PASSING_CODES = frozenset([
    "RequestTimeout", "RequestThrottled", "RequestLimitExceeded", "SlowDown", "Throttling", "ThrottlingException",
    "InternalError", "ServiceUnavailable", "OperationAborted", "BadDigest", "IncompleteBody",
])
"""Codes by which S3 asks for patience, some with a status that would say otherwise (its list of error responses)."""
_CODES_OF_THE_STORE = frozenset([
    "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch",
    "RequestTimeTooSkewed", "InvalidSecurity", "AccountProblem", "AllAccessDisabled", "NotSignedUp", "NoSuchBucket",
    "InvalidBucketName", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
])
"""Codes by which S3 refuses whatever is asked for: they say nothing of a file."""
_ERRORS_OF_THE_SETTINGS = frozenset([
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "InvalidRegionError",
    "UnknownEndpointError", "ParamValidationError", "TokenRetrievalError", "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
])
"""Names of what botocore raises before it asks any server."""
# fmt: on


@dataclass(frozen=True)
class Answer:
    """Why a remote file cannot be used: `cause` is None if the store may answer at another time.

    `of_the_store` is set where the store refuses every file alike, for its credentials or its name.
    """

    cause: Cause | None
    of_the_store: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Answer:
        """What an error of a file system means.

        Whatever is not known to be the file's fault is taken for the store's: a run then stops, and loses no sample.
        """
        code = _answer_of_s3(error).get("Error", {}).get("Code")
        if code in _PASSING_CODES:
            return cls(None)
        if code in _CODES_OF_THE_STORE or type(error).__name__ in _ERRORS_OF_THE_SETTINGS:
            return cls("missing" if code == "NoSuchBucket" else "forbidden", of_the_store=True)
        return cls(_cause_of(error))


def _cause_of(error: BaseException) -> Cause | None:
    status = _status_of(error)
    if status in _MISSING_STATUS or isinstance(error, FileNotFoundError):
        return "missing"
    if status in _FORBIDDEN_STATUS or isinstance(error, PermissionError):
        return "forbidden"
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return "unreadable"
    if status is not None and 400 <= status < 500 and status not in _TEMPORARY_STATUS:
        return "unreadable"
    return "unreadable" if isinstance(error, ValueError) and not isinstance(error, OSError) else None


def _status_of(error: BaseException) -> int | None:
    """The status of an answer over HTTP, where the libraries of file systems keep it."""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdigit():
            return int(value)
    answer = _answer_of_s3(error)
    if answer:
        value = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        value = getattr(getattr(error, "response", None), "status_code", None)
    return value if isinstance(value, int) else None


def _answer_of_s3(error: BaseException) -> dict[str, Any]:
    """What botocore keeps of it; s3fs raises an OSError that was made of botocore's error."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def told(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
