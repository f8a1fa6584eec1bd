"""The entries of `evaluate`, a list, and the mapping that earlier versions wrote there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field

from mim_framework.base.section import Choice
from mim_framework.base.validation import Problem


def _last_for_none(value: Any) -> Any:
    return "last" if value is None or value in ((), []) else value


class EvaluationChoice(Choice):
    """An evaluation of frozen features: when it is made, and its options inline; or just its name."""

    kind: ClassVar[str] = "evaluation"

    every_epochs: float = Field(20.0, ge=0)
    """Epochs between two evaluations; 0 for one at the end only."""
    forward_batch_size: int = Field(256, gt=0)
    """Images per forward pass of the encoder. Evaluations made together take the smallest of theirs."""
    layers: Annotated[Literal["last", "each"] | tuple[int, ...], BeforeValidator(_last_for_none)] = "last"
    """Features of which blocks: `last`, the end of the encoder; some side by side, from 0, or from the end if negative;
    or `each` of them by itself, for a curve over depth, with numbers called `layer3_top1`."""


def type_of(entry: Any) -> Any:
    """The name that an entry gives, be it `{type: NAME, ...}` or just `NAME`."""
    return entry.get("type") if isinstance(entry, dict) else entry


def repeated(data: dict[str, Any]) -> Iterator[Problem]:
    """Evaluations that stand in the list twice: their numbers would have one name in the metrics."""
    entries = data.get("evaluate")
    seen: list[Any] = []
    for index, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
        name = type_of(entry)
        if isinstance(name, str) and name in seen:
            yield Problem(("evaluate", index), f"evaluation '{name}' stands in the list already")
        seen.append(name)


def from_mapping(former: dict[str, Any]) -> list[dict[str, Any]]:
    """{"knn": {"k": 5}} or {"knn": None}, as `evaluate` was written once, as a list."""
    entries = []
    for name, options in {"knn": {}, **former}.items():
        if options is not None:
            options = dict(options) if isinstance(options, dict) else {}
            if "batch_size" in options:
                options["forward_batch_size"] = options.pop("batch_size")
            entries.append({"type": name, **options})
    return entries


def in_one_line(entries: list[dict[str, Any]]) -> str:
    """The entries as a recipe would write them."""
    return f"evaluate: {yaml.safe_dump(entries, default_flow_style=True, sort_keys=False, width=1e6).strip()}"
