"""A subject without an encoder: features of a few classes, each a cloud of points, for tests of evaluations."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from mim_framework.contract.evaluation import Features
from mim_framework.contract.mask import Grid
from mim_framework.contract.specs import EncoderSpec
from mim_framework.contract.world import World


def blobs(per_class: int, *, num_classes: int = 3, dim: int = 8, spread: float = 0.3, seed: int = 0) -> Features:
    """Points around the corners of a cube, in turn of each class: features (n, dim), labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(per_class * num_classes) % num_classes
    return Features(corners(num_classes, dim)[y] + spread * torch.randn(len(y), dim, generator=generator), y)


def corners(num_classes: int, dim: int) -> Tensor:
    return torch.eye(dim)[:num_classes]


def subject_of(train: Features, test: Features, classes: list[str] | None = None) -> SimpleNamespace:
    """Of any pool and blocks the same features; `limit` takes the first."""
    of_split = {"train": train, "test": test}

    def features(split, *, pool="mean", layers=(), limit=None, labelled=True):
        found = of_split[split]
        repeated = torch.cat([found.x] * max(1, len(layers)), dim=-1)
        return Features(repeated[:limit], found.y[:limit])

    return SimpleNamespace(
        features=features,
        source=lambda split: SimpleNamespace(classes=classes),
        device=train.x.device,
        world=World(),
        spec=SPEC,
    )


SPEC = EncoderSpec(dim=8, grid=Grid((2, 2)), stride=4, depth=4, num_heads=2, num_prefix_tokens=0)
