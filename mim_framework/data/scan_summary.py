"""The findings of a scan as numbers for a report, and what a recipe should say of them. Start at `summary`."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mim_framework.contract.components import Source
from mim_framework.data.moments import Moments, total
from mim_framework.data.scan import FAINT, Found, Group, Scanned
from mim_framework.data.values import GREY, RGB, Range, likely_range

SIDES = (16, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Edges of the histogram of sides, in pixels: 224 is the crop of most recipes."""
ASPECTS = (0.25, 0.5, 0.67, 0.75, 0.9, 1.1, 1.34, 1.51, 2.0, 4.0)
"""Edges of the histogram of width over height."""
COMMON_SIZES = 10
"""So many sizes are told, the most frequent ones."""
DIGITS = 4
"""Of the mean and std for a recipe, without leading zeros."""


@dataclass
class ForRecipe:
    """What `views` of a recipe should say, in words and numbers; `notes`: what to know of it."""

    views: dict[str, list[float]] = field(default_factory=dict)
    num_images: int = 0
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """To be pasted into a recipe."""
        return ["views:", *(f"  {key}: {_listed(value)}" for key, value in self.views.items())] if self.views else []


def summary(scanned: Scanned, source: Source) -> dict[str, Any]:
    """All findings, as JSON. Lists are whole: names of broken, constant, near-empty and repeated images."""
    found = scanned.found
    recipe = for_recipe(found)
    return {
        "images": scanned.num_images,
        "readable": sum(found.sizes.values()),
        "pixels_read_of": found.num_decoded,
        "bytes": found.num_bytes,
        "recipe": {"views": recipe.views, "images": recipe.num_images, "notes": recipe.notes},
        "broken": {"causes": _ordered(Counter(each["cause"] for each in found.broken)), "images": found.broken},
        "duplicates": {
            "images_too_many": sum(len(group) - 1 for group in scanned.duplicates),
            "groups": scanned.duplicates,
        },
        "constant": found.constant,
        "near_empty": {"std_of_255_at_most": FAINT, "images": found.faint},
        "left_out": list(source.left_out()),
        "formats": _ordered(found.formats),
        "modes": _ordered(found.modes),
        "sizes": _sizes(found.sizes),
        "values": [_values(group, *found.groups[group]) for group in _by_images(found)],
        "classes": None if source.classes is None else _classes(found.classes, source.classes),
    }


def for_recipe(found: Found) -> ForRecipe:
    """Mean and std of the channels that most images have, in [0, 1] as views see them, and the range of deep values.

    Grey images count as RGB ones with three equal channels where there are RGB images, as views make them.
    """
    if not found.groups:
        return ForRecipe(notes=["no pixels were read, so that there is no mean and std"])
    images: Counter[int] = Counter()
    for group, (count, _) in found.groups.items():
        images[group.channels] += count
    if images[RGB] and images[GREY]:
        images[RGB] += images.pop(GREY)
    channels, num_images = max(images.items(), key=lambda each: (each[1], each[0]))
    taken = [g for g in _by_images(found) if g.channels == channels or (channels == RGB and g.channels == GREY)]
    value_range = _range_of(taken, found)
    moments = total(_scaled(g, found.groups[g][1], value_range, channels) for g in taken)
    views: dict[str, list[float]] = {"mean": _rounded(moments.mean), "std": _rounded(moments.std)}
    if value_range is not None:
        views["value_range"] = list(value_range)
    return ForRecipe(views, num_images, list(_notes(found, images, taken, views)))


def _range_of(groups: Sequence[Group], found: Found) -> Range | None:
    """What deep values without a stated range make necessary; a recipe's range is then that of all deep images."""
    deep = [group for group in groups if group.dtype != "uint8"]
    if all(group.stated is not None for group in deep):
        return None
    low = min(float(found.groups[group][1].low.min()) for group in deep)
    high = max(float(found.groups[group][1].high.max()) for group in deep)
    return likely_range(low, high, whole=all("int" in group.dtype for group in deep))


def _scaled(group: Group, moments: Moments, value_range: Range | None, channels: int) -> Moments:
    low, high = (0, 255) if group.dtype == "uint8" else value_range or group.stated or (0, 1)
    return moments.scaled(low, high).repeated(channels if group.channels == GREY else 1)


def _notes(found: Found, images: Counter[int], taken: Sequence[Group], views: dict[str, Any]) -> Iterable[str]:
    readable, channels = sum(found.sizes.values()), len(views["mean"])
    if found.num_decoded < readable:
        yield f"from the pixels of {found.num_decoded:,} of {readable:,} images, evenly chosen"
    grey = sum(found.groups[group][0] for group in taken if group.channels < channels)
    if grey:
        yield f"{grey:,} grey images count with three equal channels, as such views make them"
    for other, count in sorted(images.items()):
        if other != channels:
            yield f"{count:,} images of {other} channel{'s' * (other != 1)} are not among them; such views " + (
                "make them grey" if channels == GREY and other == RGB else "refuse them"
            )
    if channels == GREY:
        yield "for RGB views of grey images, write the number of mean and of std three times"
    if "value_range" in views:
        yield "value_range is the smallest range of whole bits, or of the values found, that clips nothing; if a few " \
            "bright pixels decide it, a narrower one keeps more of the picture"  # fmt: skip
    if found.called_alpha:
        yield f"{found.called_alpha:,} TIFFs call their last band alpha: views.alpha=keep makes it a channel, as here"
    if not all(views["std"]):
        yield "a channel has no spread at all: there is nothing to normalise by, and its std cannot be used"


def _values(group: Group, images: int, moments: Moments) -> dict[str, Any]:
    """Numbers as the files have them."""
    arrays = {key: getattr(moments, key).tolist() for key in ("low", "high", "mean", "std")}
    stated = None if group.stated is None else list(group.stated)
    about = {"channels": group.channels, "dtype": group.dtype, "stated_range": stated, "images": images}
    return {**about, "pixels": moments.count, **arrays}


def _sizes(sizes: Counter[tuple[int, int]]) -> dict[str, Any] | None:
    """Sizes are written as width x height."""
    if not sizes:
        return None
    common = sorted(sizes.items(), key=lambda each: (-each[1], each[0]))[:COMMON_SIZES]
    return {
        "different": len(sizes),
        "most_common": {f"{width}x{height}": count for (height, width), count in common},
        "short_side": _histogram(((min(size), count) for size, count in sizes.items()), SIDES),
        "long_side": _histogram(((max(size), count) for size, count in sizes.items()), SIDES),
        "width_over_height": _histogram(((w / h, count) for (h, w), count in sizes.items()), ASPECTS),
        "smallest_side": min(map(min, sizes)),
        "largest_side": max(map(max, sizes)),
    }


def _histogram(values: Iterable[tuple[float, int]], edges: Sequence[float]) -> dict[str, int]:
    """Counts by bin, the lower edge inside; without the empty bins at both ends."""
    counts = [0] * (len(edges) + 1)
    for value, count in values:
        counts[bisect_right(edges, value)] += count
    names = [f"< {edges[0]:g}", *(f"{a:g} to < {b:g}" for a, b in itertools.pairwise(edges))]
    names.append(f">= {edges[-1]:g}")
    filled = [number for number, count in enumerate(counts) if count]
    return {names[number]: counts[number] for number in range(filled[0], filled[-1] + 1)}


def _classes(counts: Counter[int], names: Sequence[str]) -> dict[str, int]:
    """Images that can be used by class, in the order of the classes; labels that are no class by their number."""
    found = {name: counts.get(number, 0) for number, name in enumerate(names)}
    return found | {f"label {label}": counts[label] for label in sorted(counts) if not 0 <= label < len(names)}


def _by_images(found: Found) -> list[Group]:
    return sorted(found.groups, key=lambda g: (-found.groups[g][0], g.channels, g.dtype, g.stated or ()))


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _listed(values: Iterable[float]) -> str:
    return f"[{', '.join(f'{value:.12g}' for value in values)}]"
