"""Surfaces of triangle meshes: eight kinds of solids of random proportions, for which nothing has to be downloaded.

Start at `MeshShapes.read`. Every shape follows from its number alone.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from mim_framework import Sample, Section, Source

ROUND = 48
"""Sides of what should be round."""


def arc(center: float, height: float, radius: float, start: float, end: float, steps: int = 16) -> list[list[float]]:
    """Points (radius, height) on an arc of a profile, angles in half turns from the outside."""
    angles = math.pi * np.linspace(start, end, steps + 1)
    return [[center + radius * math.cos(a), height + radius * math.sin(a)] for a in angles]


def revolve(profile: list[list[float]], sides: int) -> tuple[np.ndarray, np.ndarray]:
    """A profile of points (radius, height) turned about the axis in `sides` steps.

    Returns vertices (V, 3) and triangles (T, 3); those at the axis may be empty.
    """
    radius, height = np.asarray(profile).T
    angle = 2 * math.pi * np.arange(sides) / sides
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    flat = radius[:, None, None] * ring
    vertices = np.concatenate([flat, np.broadcast_to(height[:, None, None], (len(radius), sides, 1))], axis=2)
    number = np.arange(len(radius) * sides).reshape(len(radius), sides)
    turned = np.roll(number, -1, axis=1)
    a, b, c, d = (corner.ravel() for corner in (number[:-1], turned[:-1], turned[1:], number[1:]))
    return vertices.reshape(-1, 3), np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])


def sample_surface(
    vertices: np.ndarray, triangles: np.ndarray, num_points: int, rng: np.random.Generator
) -> np.ndarray:
    """Points (num_points, 3) uniform by area: a triangle, then a place in it (Osada et al. 2002, section 3.1)."""
    a, b, c = vertices[triangles].swapaxes(0, 1)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).cumsum()
    chosen = np.searchsorted(area, rng.random(num_points) * area[-1], side="right")
    root, share = np.sqrt(rng.random((num_points, 1))), rng.random((num_points, 1))
    return (1 - root) * a[chosen] + root * (1 - share) * b[chosen] + root * share * c[chosen]


def profile_of(kind: str, rng: np.random.Generator) -> tuple[list[list[float]], int]:
    """Profile and sides of a solid of about unit size."""
    match kind:
        case "box" | "prism" | "cylinder":
            return [[0, -1], [1, -1], [1, 1], [0, 1]], {"box": 4, "prism": 3, "cylinder": ROUND}[kind]
        case "pyramid" | "cone":
            return [[0, -1], [1, -1], [0, 1]], {"pyramid": 4, "cone": ROUND}[kind]
        case "ellipsoid":
            return arc(0, 0, 1, -0.5, 0.5), ROUND
        case "capsule":
            return arc(0, -1, 1, -0.5, 0) + arc(0, 1, 1, 0, 0.5), ROUND
        case _:  # a torus
            return arc(1, 0, rng.uniform(0.2, 0.5), -1, 1), ROUND


class MeshShapes(Source):
    """Points on the surfaces of solids, (num_points, 3) float32 in random order, labelled by the kind of solid.

    Each axis is scaled at random. All stand upright and turned alike, as those of ShapeNet do. Every fifth shape is a
    test shape.
    """

    name = "mesh_shapes"
    classes = ("box", "prism", "cylinder", "pyramid", "cone", "ellipsoid", "capsule", "torus")

    class Config(Section):
        split: Literal["train", "test", "all"] = "train"
        """Every fifth shape is in `test`, the others are in `train`."""
        num_shapes: int = Field(1000, ge=40)
        """Shapes in all splits together."""
        num_points: int = Field(8192, gt=0)
        """Points held of each shape, of which a view takes some (the official data: 8192)."""

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        split = self.config.split
        numbers = range(self.config.num_shapes)
        self._numbers = [i for i in numbers if split == "all" or (i % 5 == 4) == (split == "test")]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> Sample:
        number = self._numbers[index]
        label = number % len(self.classes)
        rng = np.random.default_rng([number, 20220313])  # the date of the paper, to share no stream with others
        vertices, triangles = revolve(*profile_of(self.classes[label], rng))
        vertices = vertices * rng.uniform(0.5, 1.5, 3)
        points = sample_surface(vertices, triangles, self.config.num_points, rng)
        return Sample(torch.from_numpy(points.astype(np.float32)), f"{self.classes[label]} {number}", label)

    def evaluation_sources(self) -> tuple[Source, Source]:
        train, test = (MeshShapes(self.config.model_copy(update={"split": split})) for split in ("train", "test"))
        return train, test
