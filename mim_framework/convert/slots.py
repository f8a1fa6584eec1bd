"""The slots of an import: what tensors tell, what the script that wrote them told, what is supposed.

In this order of trust, the user's word first: KEY=VALUE, the record of `mim export`, tensors, options of the script
(`CheckpointFormat.told_by`), guesses. Nothing of the last kind goes unmarked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mim_framework.base.errors import CheckpointError
from mim_framework.contract.components import CheckpointFormat
from mim_framework.contract.kinds import KINDS
from mim_framework.convert.reading import ForeignCheckpoint
from mim_framework.layouts.guesses import Guess, resolved
from mim_framework.registry.registry import Registry

OF_VIEWS = "the default of these views; images must come as those that the weights have seen"


@dataclass
class DraftedSlots:
    """Slots with the origin of what no tensor tells, by "slot.option"."""

    slots: dict[str, dict[str, Any]]
    guesses: dict[str, str] = field(default_factory=dict)
    """Why a guess is what it is."""
    told: dict[str, Any] = field(default_factory=dict)
    """Values that the options of the script that wrote the file gave."""
    overruled: dict[str, Any] = field(default_factory=dict)
    """Values that these options had, and tensors or the user know otherwise."""
    remarks: list[str] = field(default_factory=list)

    def value(self, where: str) -> Any:
        slot, _, option = where.partition(".")
        return self.slots[slot][option]

    def yaml(self) -> str:
        """The slots as YAML, with the origin of what no tensor tells as comments."""
        return "".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for slot, options in self.slots.items():
            for line in yaml.safe_dump({slot: options}, sort_keys=False, width=10**6).splitlines():
                option = line.strip().partition(":")[0]
                of_slot = line.startswith("  ") and not line.startswith("   ")
                comment = self._comment(f"{slot}.{option}") if of_slot else ""
                yield f"{line}{'  # ' if comment else ''}{comment}\n"

    def _comment(self, where: str) -> str:
        if where in self.guesses:
            return f"guess: {self.guesses[where]}"
        if where in self.told:
            return "told by the script that wrote the file"
        if where in self.overruled:
            return f"the script that wrote the file said {self.overruled[where]!r}"
        return ""


def draft_slots(
    checkpoint_format: CheckpointFormat,
    foreign: ForeignCheckpoint,
    given: Mapping[str, Any],
    registry: Registry,
    file: Path,
) -> DraftedSlots:
    """
    Args:
        given: changes by "slot.option", the user's.

    Raises:
        CheckpointError: if something is told by nobody.
    """
    record = foreign.record if foreign.record is not None and foreign.record.layout == checkpoint_format.name else None
    slots = checkpoint_format.to_recipe(foreign.state) if record is None else record.slots
    drafted = DraftedSlots({slot: dict(options) for slot, options in slots.items()})
    if record is None:
        drafted.remarks = checkpoint_format.remarks(foreign.state)
        _take_told(drafted, checkpoint_format, foreign.options, given, registry)
        _suppose_normalisation(drafted.slots, registry)
    for where, value in given.items():
        slot, _, option = where.partition(".")
        drafted.slots.setdefault(slot, {})[option] = value
    if record is None:
        _check_known(drafted.slots, given, file)
    for slot, options in drafted.slots.items():
        for option, value in list(options.items()):
            if isinstance(value, Guess):
                drafted.guesses[f"{slot}.{option}"] = value.why
                value = value.value
            options[option] = _plain_lists(resolved(value, drafted.slots))
    drafted.told = {where: drafted.value(where) for where in drafted.told if where not in given}
    drafted.overruled = {where: value for where, value in drafted.overruled.items() if value != drafted.value(where)}
    return drafted


def _take_told(
    drafted: DraftedSlots,
    checkpoint_format: CheckpointFormat,
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    registry: Registry,
) -> None:
    for where, value in checkpoint_format.told_by(options).items():
        slot, _, option = where.partition(".")
        if value is None or slot not in drafted.slots or option not in _options_of(slot, drafted.slots, registry):
            continue
        known = drafted.slots[slot].get(option)
        if (known is None or isinstance(known, Guess)) and where not in given:
            drafted.slots[slot][option] = value
            drafted.told[where] = value
        elif not callable(value):
            drafted.overruled[where] = value


def _suppose_normalisation(slots: dict[str, dict[str, Any]], registry: Registry) -> None:
    """Mean and standard deviation stand in no weights; the default of the views is a guess like any other."""
    options = _options_of("views", slots, registry)
    for option in ("mean", "std"):
        if option in options and slots["views"].get(option) is None:
            slots["views"][option] = Guess(options[option].default, OF_VIEWS)


def _options_of(slot: str, slots: Mapping[str, Mapping[str, Any]], registry: Registry) -> Mapping[str, Any]:
    if slot not in KINDS:
        return {}
    name = slots[slot]["type"]
    return registry.find(slot, name.value if isinstance(name, Guess) else name).Config.model_fields


def _check_known(slots: dict[str, dict[str, Any]], given: Mapping[str, Any], file: Path) -> None:
    places = {f"{slot}.{option}": value for slot, options in slots.items() for option, value in options.items()}
    unknown = [where for where, value in places.items() if value is None and where not in given]
    if unknown:
        raise CheckpointError(f"{file} does not tell {', '.join(unknown)}; give the value, for example {unknown[0]}=12")


def _plain_lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
