"""Facts that no tensor holds: what a layout supposes, so that whoever shows it can say that it is a guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Slots = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Guess:
    """In the place of a value in the slots of `CheckpointFormat.to_recipe`, if nothing in the tensors tells it.

    It stands until the options of the script that wrote the file, or the user, know better. It is shown as a guess.
    """

    value: Any
    """The value, or a function of the slots that is called once all else is known."""
    why: str
    """Where it comes from, such as "as in the paper"."""


def resolved(value: Any | Callable[[Slots], Any], slots: Slots) -> Any:
    """A value, or what a function makes of the slots."""
    return value(slots) if callable(value) else value


def guessed_heads(heads_of_width: Mapping[int, int], width: int) -> Guess | None:
    """The number of heads of the published models of this width, None (to be asked for) for any other width."""
    heads = heads_of_width.get(width)
    return None if heads is None else Guess(heads, f"of the published models of width {width}")
