"""The report of a run's health: one page with verdicts in words, pictures and curves. Start at `write_report`.

`report.html` holds everything in itself and runs nothing; `report.md` shows the same with the files of `report/`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mim_framework.base.errors import MimError
from mim_framework.base.files import replace_file
from mim_framework.contract.evaluation import Subject
from mim_framework.evaluate.health.curves import Curve, curve_svg
from mim_framework.evaluate.health.evaluation import gradient_norms
from mim_framework.evaluate.health.measures import spikes
from mim_framework.evaluate.health.pictures import fixed_batch, reconstructed, seen
from mim_framework.evaluate.health.verdicts import Facts, Judgement, judge

PREFIX = "health_"
"""With which the evaluation's numbers begin in the metrics."""
NUM_IMAGES = 6
MARKS = {"bad": "✗", "watch": "!", "good": "✓"}

MEANINGS = {
    "images": "images kept aside whose features were looked at",
    "rankme": "RankMe: directions that carry the features, at most the number of images and the width",
    "rankme_centred": "the same without the mean of all images",
    "effective_rank": "effective rank of their covariance",
    "participation_ratio": "participation ratio of its eigenvalues",
    "stable_rank": "sum of its eigenvalues over the largest",
    "mean_cosine": "mean cosine between features of different images",
    "relative_std": "spread of features of unit length: 0 is one point, 1 fills the sphere",
    "uniformity": "uniformity on the sphere (t = 2): 0 is one point",
    "channel_std": "mean standard deviation of a channel",
    "covariance_abs": "mean size of the covariance of two channels",
    "covariance_squared": "mean square of it",
    "correlation_abs": "mean size of the correlation of two channels",
    "vicreg_covariance": "VICReg's covariance term",
    "vicreg_variance": "VICReg's variance term",
    "alpha": "alpha-ReQ: minus the slope of ln eigenvalue over ln rank",
    "alpha_r2": "how well that line fits",
    "alpha_first": "first rank that was fitted",
    "alpha_last": "last rank that was fitted",
    "lidar": "LiDAR: directions in which images differ by more than views of one image",
    "lidar_eps_inside": "the same with its small number added before normalising",
    "alignment": "mean squared distance of two views of an image, of unit length",
    "token_mean": "mean of all values of patch tokens",
    "token_variance": "variance over all patch tokens",
    "token_variance_within": "share of it that lies within images",
    "token_content": "share of it from image to image at one position: 0 knows positions only",
    "attention_entropy": "entropy of attention by block, as a share of the largest",
    "loss": "loss on images kept aside, fixed masks",
    "trivial_loss": "the same of the best constant, or of a guess by frequency",
    "position_loss": "the same of the mean of each position",
    "target_spread": "share of the target's mean square that varies",
    "target_perplexity": "how many classes the target seems to have",
    "norms_at_start": "share of normalisation layers that have not moved since the start",
    "typical_weight": "size of a typical weight of the encoder",
    "grad_norm_spikes": "logged gradient norms above five times their usual size",
}
"""What each number is, by its name up to the slash; after it stands a block, a head or a network."""

CURVES = {
    "loss": ("loss",),
    "learning rate": ("lr",),
    "norm of the gradient": ("grad_norm",),
    "loss kept aside": ("health_loss", "health_trivial_loss", "health_position_loss"),
    "RankMe": ("health_rankme", "health_rankme_centred"),
    "LiDAR": ("health_lidar",),
    "alpha": ("health_alpha",),
    "spread of features": ("health_relative_std",),
    "mean cosine between images": ("health_mean_cosine",),
    "entropy of attention": ("health_attention_entropy",),
}
"""Curves of the page: title -> names in the metrics, with what stands behind a slash."""


@dataclass(frozen=True)
class Training:
    """What is known of a run beside its metrics: see `Facts`. `notes`: doubts that were said at its start."""

    adam: bool = False
    moving: bool = False
    notes: Sequence[str] = ()


@dataclass
class Page:
    """What a report shows. Pictures and curves by title."""

    title: str
    judgement: Judgement
    numbers: Mapping[str, float]
    notes: Sequence[str] = ()
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    curves: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def write_report(
    subject: Subject, run_dir: Path, numbers: Mapping[str, float] | None, training: Training
) -> Judgement | None:
    """Write `report.html` and `report.md` into a run directory. Every rank must call it; rank 0 writes.

    Args:
        numbers: those of the evaluation `health`, without its name before them; None for the last ones of the metrics.

    Returns:
        What the run comes to, on rank 0.

    Raises:
        MimError: on every rank, if the files cannot be written.
    """
    batch = fixed_batch(subject, NUM_IMAGES)
    found = {
        "Tokens as colours, and where the last block looks": seen(subject, batch),
        "Reconstructions": reconstructed(subject, batch),
    }
    pictures = {title: picture for title, picture in found.items() if picture is not None}
    absent = dict.fromkeys(found.keys() - pictures.keys(), NO_PICTURE)

    def write() -> Judgement:
        history = [] if subject.method is None else subject.method.history()
        measured = last_numbers(history) if numbers is None else numbers
        judgement = judge(facts_of(measured, history, training))
        page = Page(run_dir.name, judgement, measured, training.notes, pictures, curves_of(history), absent)
        _write(page, run_dir)
        return judgement

    return subject.world.on_main(write)


NO_PICTURE = "this method or encoder has none"


def last_numbers(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The evaluation's numbers of the last line of the metrics that has any."""
    for line in reversed(history):
        if found := {key.removeprefix(PREFIX): value for key, value in line.items() if key.startswith(PREFIX)}:
            return found
    return {}


def facts_of(numbers: Mapping[str, float], history: Sequence[Mapping[str, Any]], training: Training) -> Facts:
    """What is judged, from numbers and the lines of the metrics."""
    rates = [value for line in history for key, value in line.items() if key.split("/")[0] == "lr"]
    return Facts(
        numbers,
        losses=[line["loss"] for line in history if "loss" in line],
        skipped=int(sum(line.get("skipped_steps", 0) for line in history)),
        rate=max(rates, default=None),
        adam=training.adam,
        moving=training.moving,
    )


def curves_of(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """SVG by title, of what the metrics hold; a curve of one point is one too."""
    found = {}
    for title, names in CURVES.items():
        lines: dict[str, Curve] = {}
        for key in dict.fromkeys(key for line in history for key in line):
            if any(key == name or key.startswith(f"{name}/") for name in names):
                lines[key.removeprefix(PREFIX)] = [(line["step"], line[key]) for line in history if key in line]
        if lines:
            marks = _spiked(history) if title == "norm of the gradient" else []
            found[title] = curve_svg(title, lines, marks)
    return found


def _spiked(history: Sequence[Mapping[str, Any]]) -> list[float]:
    steps = [line["step"] for line in history if any("grad_norm" in key.split("/") for key in line)]
    return [steps[place] for norms in gradient_norms(history) for place in spikes(norms) if place < len(steps)]


# --- pages -----------------------------------------------------------------------------------------------------------


def as_html(page: Page) -> str:
    """The page with everything in it. All text is escaped, and nothing is fetched or run."""
    return "\n".join(_html(page)) + "\n"


def _html(page: Page) -> Iterator[str]:
    title = escape(f"Health of {page.title}")
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{title}</h1>"
    summary = f"<b>{escape(page.judgement.diagnosis)}</b>: {escape(page.judgement.sentence)}"
    yield f'<p class="sum {_class(page)}">{summary}</p>'
    yield "<table>"
    for each in page.judgement.verdicts:
        cure = f'<br><span class="try">Try: {escape(each.cure)}</span>' if each.cure else ""
        cells = f"<td>{MARKS[each.level]}</td><td>{escape(each.topic)}</td><td>{escape(each.text)}{cure}</td>"
        yield f'<tr class="{each.level}">{cells}</tr>'
    yield "</table>"
    if page.notes:
        yield "<h2>Said at the start</h2><ul>"
        yield from (f"<li>{escape(note)}</li>" for note in page.notes)
        yield "</ul>"
    for heading, picture in page.pictures.items():
        data = base64.b64encode(_png(picture)).decode()
        yield f'<h2>{escape(heading)}</h2><img alt="{escape(heading)}" src="data:image/png;base64,{data}">'
    yield "<h2>Curves</h2>"
    yield from (page.curves.values() or ["<p>The run has no metrics.</p>"])
    yield "<h2>Numbers</h2><table>"
    for key, value in page.numbers.items():
        yield f"<tr><td>{escape(key)}</td><td>{value:.4g}</td><td>{escape(_meaning(key))}</td></tr>"
    yield "</table>"
    yield from (f"<p>{escape(what)}: {escape(why)}.</p>" for what, why in page.absent.items())
    yield f"<p>{escape(LIMITS)}</p></body></html>"


def as_markdown(page: Page) -> str:
    """The same as Markdown, with pictures and curves as files of `report/`."""
    return "\n".join(_markdown(page)) + "\n"


def _markdown(page: Page) -> Iterator[str]:
    yield f"# Health of {_md(page.title)}\n"
    yield f"**{page.judgement.diagnosis}**: {_md(page.judgement.sentence)}\n"
    for each in page.judgement.verdicts:
        cure = f" Try: {_md(each.cure)}" if each.cure else ""
        yield f"- {MARKS[each.level]} {_md(each.topic)}: {_md(each.text)}{cure}"
    if page.notes:
        yield "\n## Said at the start\n"
        yield from (f"- {_md(note)}" for note in page.notes)
    for heading in page.pictures:
        yield f"\n## {_md(heading)}\n\n![{_md(heading)}](report/{_slug(heading)}.png)"
    yield "\n## Curves\n"
    yield from (f"![{_md(heading)}](report/{_slug(heading)}.svg)" for heading in page.curves)
    yield "" if page.curves else "The run has no metrics."
    yield "## Numbers\n\n| number | value | what it is |\n|---|---|---|"
    yield from (f"| {_md(key)} | {value:.4g} | {_md(_meaning(key))} |" for key, value in page.numbers.items())
    yield from (f"\n{_md(what)}: {_md(why)}." for what, why in page.absent.items())
    yield f"\n{_md(LIMITS)}"


LIMITS = (
    "These numbers are curves of one run. They do not rank methods: features that fill few directions can be the "
    "better ones to fine-tune."
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse}td{padding:.3em .6em;border-bottom:1px solid #ddd;vertical-align:top}"
    "img{max-width:100%;image-rendering:pixelated}.sum{padding:.6em 1em;background:#eee}.try{color:#555}"
    ".bad td:first-child,p.bad b{color:#b00020}.watch td:first-child{color:#a65f00}.good td:first-child{color:#2d7a2d}"
)


def _class(page: Page) -> str:
    return "good" if page.judgement.diagnosis == "healthy" else "bad"


def _meaning(key: str) -> str:
    return MEANINGS.get(key.split("/")[0], "")


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    one_line = " ".join(text.split())
    return "".join(f"\\{character}" if character in r"\`*_{}[]<>()#|!&~$" else character for character in one_line)


def _slug(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write(page: Page, run_dir: Path) -> None:
    files = {f"{_slug(heading)}.png": _png(picture) for heading, picture in page.pictures.items()}
    files |= {f"{_slug(heading)}.svg": svg.encode() for heading, svg in page.curves.items()}
    try:
        (run_dir / "report").mkdir(exist_ok=True)
        for name, content in files.items():
            replace_file(run_dir / "report" / name, content)
        replace_file(run_dir / "report.html", as_html(page).encode())
        replace_file(run_dir / "report.md", as_markdown(page).encode())
    except OSError as error:
        raise MimError(f"cannot write the report of {run_dir}: {error.strerror}") from error
