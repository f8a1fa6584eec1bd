"""What evaluations have measured: tables for people, and records for the run's `evaluations.jsonl`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mim_framework.assembly.opened import LoadedEncoder
from mim_framework.base.files import SideFile
from mim_framework.contract.components import Encoder, Source
from mim_framework.contract.evaluation import Estimate, Split
from mim_framework.contract.world import World
from mim_framework.evaluate.base import Asked
from mim_framework.evaluate.cache import about_source
from mim_framework.evaluate.overlap import Overlap
from mim_framework.evaluate.splits import Splits
from mim_framework.registry.registry import Registry
from mim_framework.training.directory import environment

FILE = "evaluations.jsonl"
"""Name of the file in a run's directory."""
FORMAT = 1
"""Version of a record."""
POOLS = {"mean": "the mean of patch tokens", "cls": "the class token", "tokens": "every patch token"}
NORMS = {True: "after its last norm", False: "without a norm", None: "as it hands it out"}
MANY = 8
"""Numbers of an evaluation from which on those of one subject stand in one table."""
_OF_LAYER = re.compile(r"layer(\d+)_(.+)")


@dataclass(frozen=True)
class Made:
    """An evaluation: its options with its name as `type`, the features it read, and its numbers by variant and name."""

    options: dict[str, Any]
    asked: tuple[Asked, ...]
    numbers: dict[str, dict[str, float]]

    @property
    def name(self) -> str:
        return str(self.options["type"])


@dataclass(frozen=True)
class Judged:
    """What was measured of an encoder; `run_dir` and `step` are None if it comes from no run."""

    subject: str
    run_dir: Path | None
    step: int | None
    opened: LoadedEncoder
    splits: Splits
    overlap: Overlap
    made: tuple[Made, ...]
    in_train: Overlap | None = None
    """The test images that are also there to learn from; None without both splits."""

    @property
    def encoder(self) -> Encoder:
        return self.opened.trained

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """All numbers by variant, under names that begin with that of the evaluation."""
        found: dict[str, dict[str, float]] = {}
        for made in self.made:
            for variant, numbers in made.numbers.items():
                named = {f"{made.name}_{name}": value for name, value in numbers.items()}
                found[variant] = {**found.get(variant, {}), **named}
        return found

    @property
    def images(self) -> dict[Split, int]:
        return {split: len(source) for split, source in self.splits.sources.items()}


# --- for people ------------------------------------------------------------------------------------------------------


def tables(judged: Sequence[Judged]) -> Iterator[str]:
    """A table for every number, with a row for every subject and layer, and what was read of which images.

    Many numbers of one subject stand in one table, a row each.
    """
    for evaluation in dict.fromkeys(made.name for each in judged for made in each.made):
        made = [made for each in judged for made in each.made if made.name == evaluation]
        names = list(dict.fromkeys(name for each in made for name in _names(each)))
        variants = _variants(judged, evaluation)
        if len(made) == 1 and len(names) > MANY:
            title = f"{evaluation}, {_subject(judged[0])}"
            yield from _aligned([[title, *variants], *_row_for_each(made[0], names, variants)])
            yield ""
            continue
        for number in dict.fromkeys(map(_without_layer, names)):
            rows = [[f"{evaluation} {number}", *variants]]
            for each in judged:
                rows += _rows(each, evaluation, number, variants)
            yield from _aligned(rows)
            yield ""
    several = len({each.subject for each in judged}) > 1
    yield from dict.fromkeys(line for each in judged for line in _said(each, name=several))
    if any(isinstance(v, Estimate) for each in judged for row in each.numbers.values() for v in row.values()):
        yield "in brackets: the 95 % interval, as the test images are a sample of many more"
    if kept := [str(each.run_dir / FILE) for each in judged if each.run_dir is not None]:
        yield f"kept in {', '.join(dict.fromkeys(kept))}"
    if other := [each.subject for each in judged if each.run_dir is None]:
        yield f"not kept, as there is no run directory; --json prints the record: {', '.join(dict.fromkeys(other))}"


def _row_for_each(made: Made, names: list[str], variants: list[str]) -> Iterator[list[str]]:
    for name in names:
        yield [name, *(_shown(made.numbers.get(variant, {}).get(name)) for variant in variants)]


def _subject(judged: Judged) -> str:
    return judged.subject if judged.step is None else f"{judged.subject} (step {judged.step})"


def _names(made: Made) -> list[str]:
    return list(dict.fromkeys(name for numbers in made.numbers.values() for name in numbers))


def _without_layer(name: str) -> str:
    found = _OF_LAYER.fullmatch(name)
    return found[2] if found else name


def _variants(judged: Sequence[Judged], evaluation: str) -> list[str]:
    made = [made for each in judged for made in each.made if made.name == evaluation]
    return list(dict.fromkeys(variant for each in made for variant in each.numbers))


def _rows(judged: Judged, evaluation: str, number: str, variants: list[str]) -> Iterator[list[str]]:
    """One row; of an evaluation layer by layer, one for each of them. Pixels have no layer and stand in all rows."""
    subject = _subject(judged)
    for made in judged.made:
        names = [name for name in _names(made) if _without_layer(name) == number] if made.name == evaluation else []
        of_layers = [name for name in names if name != number]
        for name in of_layers or names:
            layer = f", layer {found[1]}" if (found := _OF_LAYER.fullmatch(name)) else ""
            rows = (made.numbers.get(variant, {}) for variant in variants)
            yield [f"{subject}{layer}", *(_shown(row.get(name, row.get(number))) for row in rows)]


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.4f}" if 0.01 <= abs(value) < 100 or isinstance(value, Estimate) else f"{value:.4g}"
    return f"{text} [{value.low:.4f}, {value.high:.4f}]" if isinstance(value, Estimate) else text


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _said(judged: Judged, *, name: bool) -> Iterator[str]:
    """What the numbers are of, in words; `name` calls the subject by its name where lines can differ."""
    of = f" ({judged.subject})" if name else ""
    for made in judged.made:
        if made.asked:
            yield f"{made.name} reads {_read(made.asked, judged.encoder)}{of}"
    purposes = {"train": "to learn from", "test": "to be tested on"}
    sources = judged.splits.sources.items()
    counts = ", ".join(f"{len(source):,} {purposes[split]} ({source.name})" for split, source in sources)
    yield f"images: {counts}{of}"
    yield f"overlap: {judged.overlap}{of}"
    if judged.in_train is not None and judged.in_train.names:
        yield f"overlap: {judged.in_train}; of these the numbers are no test{of}"
    if judged.opened.origin.kind == "random":
        yield f"{judged.subject} has random weights: what stands under 'trained' is an untrained encoder"


def _read(asked: Sequence[Asked], encoder: Encoder) -> str:
    """Pooling, layer and norm of features in words, those of the same pooling and norm together."""
    places: dict[tuple[str, str], list[str]] = {}
    for pool, layers in asked:
        norm = NORMS[_norm((pool, layers), encoder)]
        place = f"layer {' beside '.join(map(str, layers))}" if layers else "the encoder's output"
        places.setdefault((POOLS[pool], norm), []).append(place)
    return "; ".join(f"{pool} of {', '.join(found)}, {norm}" for (pool, norm), found in places.items())


def _norm(asked: Asked, encoder: Encoder) -> bool | None:
    """Whether what was read passed the encoder's last norm: it has one, and the layers have its width and grid.

    None of the output of an encoder that has none by itself, but may have one inside, as models of timm do.
    """
    spec = encoder.spec
    if not asked[1] and type(encoder).final_norm is Encoder.final_norm:
        return None
    end = (spec.dim, spec.grid)
    fits = all(spec.layers.get(layer % spec.depth, end) == end for layer in asked[1])
    return fits and type(encoder).final_norm is not Encoder.final_norm


# --- for programs ----------------------------------------------------------------------------------------------------


def records(judged: Sequence[Judged], registry: Registry) -> Iterator[str]:
    """A line of JSON for every evaluation of every encoder."""
    for each in judged:
        yield from (json.dumps(record, allow_nan=False) for record in _records(each, registry))


def append_records(judged: Judged, registry: Registry) -> None:
    """Add the same lines to the file in the run's directory."""
    assert judged.run_dir is not None
    SideFile(judged.run_dir / FILE).append(records([judged], registry))


def _records(judged: Judged, registry: Registry) -> Iterator[dict[str, Any]]:
    facts = environment(registry, World())
    common = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject": judged.subject,
        "step": judged.step,
        "origin": asdict(judged.opened.origin),
        "weights_sha256": judged.opened.weights_sha256,
        "data": {split: _about(source) for split, source in judged.splits.sources.items()},
        "overlap": {
            "num_test": judged.overlap.num_test,
            "names": None if judged.overlap.not_compared else list(judged.overlap.names),
            "not_compared": judged.overlap.not_compared or None,
            "in_train": None if judged.in_train is None else list(judged.in_train.names),
        },
        "versions": {"python": facts["python"], **facts["packages"], **facts["plugins"]},
    }
    for made in judged.made:
        features = [
            {"pool": asked[0], "layers": list(asked[1]) or "last", "final_norm": _norm(asked, judged.encoder)}
            for asked in made.asked
        ]
        numbers = {
            variant: {name: _number(value) for name, value in row.items()} for variant, row in made.numbers.items()
        }
        options = {key: value for key, value in made.options.items() if key != "type"}
        judged_by = {"evaluation": made.name, "options": options, "features": features}
        yield {"format": FORMAT, **judged_by, **common, "numbers": numbers}


def _about(source: Source) -> dict[str, Any]:
    about = about_source(source)
    classes = about.pop("classes")
    return {**about, "num_classes": None if classes is None else len(classes)}


def _number(value: float) -> dict[str, float | None]:
    """JSON has no word for what is not finite."""
    both = {"low": value.low, "high": value.high} if isinstance(value, Estimate) else {}
    return {"value": float(value) if math.isfinite(value) else None, **both}
