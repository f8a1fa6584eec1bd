"""Curves of a run as SVG, with nothing but text: no script, no font, no other file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 420, 170
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 26, 24
COLOURS = ("#2563a8", "#b4530a", "#3d7a3a", "#8a3c8c")

Curve = Sequence[tuple[float, float]]
"""(step, value) in order of steps."""


def curve_svg(title: str, curves: dict[str, Curve], marks: Sequence[float] = ()) -> str:
    """A small plot. Values that are not finite are left out, and leave a gap.

    Args:
        curves: by name; the names are written only where there are several.
        marks: steps at which a red line stands, such as those of spikes.
    """
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    steps, values = zip(*points, strict=True) if points else ((0.0,), (0.0,))
    x0, x1, y0, y1 = min(steps), max(steps), min(values), max(values)

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - x0) / ((x1 - x0) or 1)
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y0) / ((y1 - y0) or 1)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 15, title, "start", "black"),
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
        _text(LEFT - 4, TOP + 8, f"{y1:.3g}"),
        _text(LEFT - 4, HEIGHT - BOTTOM, f"{y0:.3g}"),
        _text(LEFT, HEIGHT - 8, f"{x0:.0f}", "start"),
        _text(WIDTH - RIGHT, HEIGHT - 8, f"step {x1:.0f}"),
    ]
    for step in marks:
        x, top = place(step, y1).split(",")
        parts.append(f'<path d="M{x} {top}V{HEIGHT - BOTTOM}" stroke="#c00" stroke-dasharray="3 3"/>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        for run in _finite_runs(curve):
            line = " ".join(place(*point) for point in run)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            if len(run) == 1:
                x, y = line.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>')
        if len(curves) > 1:
            parts.append(_text(WIDTH - RIGHT, TOP + 4 + 12 * number, name, "end", colour))
    return "\n".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "end", colour: str = "#555") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _finite_runs(curve: Curve) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in curve:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
