"""The page of a scan: one HTML file that holds everything, fetches nothing and runs nothing. Start at `page`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mim_framework.base.text import printable
from mim_framework.data.scan_summary import ForRecipe
from mim_framework.evaluate.health.report import POLICY

LISTED = 200
"""So many names of a list are on the page; all are in `scan.json`."""
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse}td,th{padding:.2em .6em;border-bottom:1px solid #ddd;vertical-align:top;"
    "text-align:left}pre{background:#eee;padding:.6em 1em}.n{text-align:right}"
    ".b{background:#2563a8;height:.9em;min-width:1px}.w{width:300px}"
)
LISTS = {
    "broken": "Broken files, which a run replaces by others",
    "duplicates": "Exact duplicates: files of the same content",
    "constant": "Constant images: every pixel is the same",
    "near_empty": "Near-empty images: no channel spreads more than {std:g} of 255 levels",
}


def page(facts: Mapping[str, Any], recipe: ForRecipe) -> str:
    """The findings of `summary` as HTML. All text is escaped."""
    return "\n".join(_html(facts, recipe)) + "\n"


def _html(facts: Mapping[str, Any], recipe: ForRecipe) -> Iterator[str]:
    title = _text(f"Images of {facts['source']}")
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
    yield from _overview(facts)
    yield "<h2>For the recipe</h2>"
    if recipe.views:
        yield f"<p>In [0, 1], over all pixels of {recipe.num_images:,} images:</p>"
        yield f"<pre>{_text(chr(10).join(recipe.lines()))}</pre>"
    yield from (f"<p>{_text(note)}.</p>" for note in recipe.notes)
    for key in ("formats", "modes"):
        yield from _bars(key.capitalize(), facts[key])
    if sizes := facts["sizes"]:
        yield from _bars("Short side, pixels", sizes["short_side"])
        yield from _bars("Long side, pixels", sizes["long_side"])
        yield from _bars("Width over height", sizes["width_over_height"])
        yield from _bars("Most frequent sizes, width x height", sizes["most_common"])
    yield from _values(facts["values"])
    if facts["classes"] is not None:
        yield from _bars("Images by class", facts["classes"])
    yield from _lists(facts)
    yield "</body></html>"


def _overview(facts: Mapping[str, Any]) -> Iterator[str]:
    rows = {
        "images": f"{facts['images']:,}",
        "can be read": f"{facts['readable']:,}",
        "broken": f"{len(facts['broken']['images']):,}",
        "duplicates": f"{facts['duplicates']['images_too_many']:,} too many",
        "constant, near-empty": f"{len(facts['constant']):,}, {len(facts['near_empty']['images']):,}",
        "encoded bytes": f"{facts['bytes']:,}",
        "pixels read of": f"{facts['pixels_read_of']:,} images",
        "left out": ", ".join(facts["left_out"]) or "nothing",
    }
    yield "<table>"
    yield from (f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in rows.items())
    yield "</table>"


def _bars(title: str, counts: Mapping[str, int]) -> Iterator[str]:
    """Counts as bars, the longest one in full width."""
    most = max(counts.values(), default=0) or 1
    yield f"<h2>{_text(title)}</h2><table>"
    for name, count in list(counts.items())[:LISTED]:
        bar = f'<div class="b" style="width:{100 * count / most:.1f}%"></div>' if count else ""
        yield f'<tr><td>{_text(name)}</td><td class="n">{count:,}</td><td class="w">{bar}</td></tr>'
    yield f"</table>{_more(len(counts))}"


def _values(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "<h2>Values of the files</h2><table>"
    yield "<tr><th>images</th><th>channels</th><th>type</th><th>range stated</th><th>smallest</th><th>largest</th>"
    yield "<th>mean</th><th>std</th></tr>"
    for each in groups:
        stated = "none" if each["stated_range"] is None else _numbers(each["stated_range"])
        cells = [
            f"{each['images']:,}",
            str(each["channels"]),
            each["dtype"],
            "" if each["dtype"] == "uint8" else stated,
        ]
        cells += [_numbers(each[key]) for key in ("low", "high", "mean", "std")]
        yield f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>"
    yield "</table>"


def _lists(facts: Mapping[str, Any]) -> Iterator[str]:
    rows = {
        "broken": [(each["name"], each["cause"], each["detail"]) for each in facts["broken"]["images"]],
        "duplicates": [tuple(group[:LISTED]) for group in facts["duplicates"]["groups"]],
        "constant": [(name,) for name in facts["constant"]],
        "near_empty": [(name,) for name in facts["near_empty"]["images"]],
    }
    for key, title in LISTS.items():
        if not rows[key]:
            continue
        yield f"<h2>{_text(title.format(std=facts['near_empty']['std_of_255_at_most']))}</h2><table>"
        for row in rows[key][:LISTED]:
            yield f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>"
        yield f"</table>{_more(len(rows[key]))}"


def _more(count: int) -> str:
    return f"<p>and {count - LISTED:,} more, all in scan.json</p>" if count > LISTED else ""


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _text(text: str) -> str:
    return escape(printable(text))
