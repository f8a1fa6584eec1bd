"""`mim data scan`: what images are, as `scan.json`, `scan.html` and a few lines. Start at `run_scan`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mim_framework.base.errors import DataError, MimError
from mim_framework.base.files import content_of, replace_file
from mim_framework.base.section import Choice
from mim_framework.base.text import without_secrets
from mim_framework.commands.evaluate import source_of
from mim_framework.commands.scan_page import page
from mim_framework.contract.components import Source
from mim_framework.data.loader import DataSection
from mim_framework.data.scan import scan
from mim_framework.data.scan_summary import for_recipe, summary
from mim_framework.registry.registry import Registry

JOURNAL, JSON, HTML = ".scan.jsonl", "scan.json", "scan.html"
SHOWN = 5
"""So many names of a list are told on the terminal; all are in the files."""


@dataclass(frozen=True)
class Written:
    """The findings as in `scan.json`, and the lines for a person."""

    facts: dict[str, Any]
    lines: list[str]


def run_scan(
    text: str,
    registry: Registry,
    *,
    output: Path | None = None,
    labels: bool = False,
    sample: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, str], object] = lambda done, total, text: None,
    report: Callable[[str], object] = print,
) -> Written:
    """Scan the images of a source and write what they are. Killed at any time, the same call goes on.

    Args:
        text: a folder, a URL, the name of a source, or a mapping as a recipe has it.
        output: folder of the files; by default `scans/NAME`.
        labels: take the class folders of a folder as labels.
        sample: read the pixels of about so many images only.
        workers: processes that read; by default as many as a run would have.
        progress: is told images done, images in all, and how many are broken.

    Raises:
        RecipeError: if there is no such source.
        DataError: if the images cannot be read.
        MimError: if the files cannot be written, or `output` holds the scan of something else.
    """
    source, name = open_source(text, registry, labels=labels)
    folder = Path("scans", re.sub(r"[^\w.-]+", "_", Path(name.rstrip("/")).name) or source.name)
    folder = folder if output is None else output
    _refuse_another(folder / JSON, name)
    if workers is None:
        workers = DataSection(source=Choice(type=source.name)).num_workers
    scanned = scan(
        source, folder / JOURNAL, sample=sample, workers=workers,
        progress=lambda done, found: progress(done, len(source), f"{len(found.broken):,} broken"),
    )  # fmt: skip
    if scanned.resumed_from:
        report(f"went on after {scanned.resumed_from:,} of {scanned.num_images:,} images, done before")
    facts = {"source": name, **summary(scanned, source)}
    recipe = for_recipe(scanned.found)
    dated = {"format": 1, "written": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
    try:
        replace_file(folder / JSON, json.dumps(dated, indent=1).encode())
        replace_file(folder / HTML, page(facts, recipe).encode(errors="backslashreplace"))
        (folder / JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        raise MimError(
            f"the report cannot be written to {folder}: {error.strerror}; the same command tries again"
        ) from error
    return Written(facts, [*_told(facts, recipe.lines(), recipe.notes), f"written: {folder / HTML}, {folder / JSON}"])


def open_source(text: str, registry: Registry, *, labels: bool = False) -> tuple[Source, str]:
    """A source, and its name for people, which holds no secret.

    Raises:
        RecipeError: if there is no such source.
        DataError: if it cannot be listed.
    """
    options = source_of(text, "SOURCE", registry, labels=labels)
    cls, config = registry.resolve("source", Choice.model_validate(options))
    try:
        source = cls(config)
    except DataError as error:
        raise type(error)(str(error).replace("data.source", "SOURCE")) from error
    unnamed = {"type", "storage_options", "labels"}
    chosen = config.model_dump(mode="json", exclude_unset=True)
    root = chosen.pop("root", None)
    rest = " ".join(f"{key}={value}" for key, value in chosen.items() if key not in unnamed and value is not False)
    return source, without_secrets(f"{root or source.name} ({rest})" if rest else str(root or source.name))


def _refuse_another(file: Path, name: str) -> None:
    try:
        before = json.loads(content_of(file)).get("source") if file.exists() else name
    except (ValueError, AttributeError, OSError):  # no report of ours that could be lost
        raise MimError(f"{file} is no report of a scan; name another folder with --output") from None
    if before != name:
        raise MimError(f"{file.parent} holds the scan of {before}, not of {name}; name another folder with --output")


def _told(facts: dict[str, Any], paste: list[str], notes: list[str]) -> Iterator[str]:
    """What a person should know at once."""
    sizes = facts["sizes"]
    yield f"{facts['source']}: {facts['images']:,} images, {facts['readable']:,} can be read"
    if sizes:
        common = ", ".join(f"{size} ({count:,})" for size, count in list(sizes["most_common"].items())[:3])
        yield f"sides {sizes['smallest_side']:,} to {sizes['largest_side']:,} pixels; most often {common}"
        yield "; ".join(_counted(facts[key]) for key in ("formats", "modes"))
    if facts["broken"]["images"]:
        names = [each["name"] for each in facts["broken"]["images"]]
        yield f"broken: {len(names):,} ({_counted(facts['broken']['causes'])}): {_some(names)}"
    if groups := facts["duplicates"]["groups"]:
        pairs = [" = ".join(group[:3]) for group in groups]
        yield f"exact duplicates: {facts['duplicates']['images_too_many']:,} images too many: {_some(pairs)}"
    for what, names in (("constant", facts["constant"]), ("near-empty", facts["near_empty"]["images"])):
        if names:
            yield f"{what}: {len(names):,}: {_some(names)}"
    if facts["left_out"]:
        yield f"no images, and left out: {', '.join(facts['left_out'])}"
    if classes := facts["classes"]:
        least, most = min(classes, key=lambda n: classes[n]), max(classes, key=lambda n: classes[n])
        yield f"{len(classes):,} classes, of {classes[least]:,} ({least}) to {classes[most]:,} images ({most})"
    if paste:
        yield f"for the recipe, over all pixels of {facts['recipe']['images']:,} images:"
        yield from (f"  {line}" for line in paste)
    yield from (f"  note: {note}" for note in notes)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
