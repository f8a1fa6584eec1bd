"""Errors that a user can cause. The command line prints them without a traceback."""

from __future__ import annotations

from typing import Literal

from mim_framework.base.text import for_people, without_secrets

Cause = Literal["empty", "not_an_image", "truncated", "too_large", "unreadable", "unsupported", "missing", "forbidden"]
"""Why an image cannot be used; a remote store says that it is `missing` or `forbidden`."""


class MimError(Exception):
    """Base of every error that a user can cause and cure. Its text can be shown: see `base.text`."""

    told_by_another_rank = False
    """Set where another rank of the run has the same error and prints it."""

    def __str__(self) -> str:
        return for_people(super().__str__())


class RecipeError(MimError):
    """A recipe is wrong; the message lists every problem with its file and line."""


class PluginError(MimError):
    """A plugin or a component cannot be found or used."""


class DataError(MimError):
    """The images cannot be read, or too many of them are broken."""


class BrokenImage(DataError):
    """One image cannot be used. `cause` is the class under which it is counted, `name` the sample's name."""

    def __init__(self, name: str, cause: Cause, detail: str) -> None:
        super().__init__(f"{name!r}: {cause}: {detail}" if "\n" in name else f"{name}: {cause}: {detail}")
        self.name, self.cause, self.detail = name, cause, without_secrets(detail)


class Unreachable(DataError):
    """A store does not answer, also when asked again. No image is at fault or replaced: a run saves and stops."""


class WorkerKilled(DataError):
    """A process that reads images ahead is gone, killed by the system or by a fault in its code."""


class CheckpointError(MimError):
    """A checkpoint is missing, damaged or does not fit the recipe."""


class TrainingError(MimError):
    """Training cannot go on, for example because the loss stays non-finite."""


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """', did you mean 'x'?' for the nearest known name, or an empty string."""
    import difflib

    if len(name) > 200:
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""
