"""Stochastic depth: the module, and how blocks of timm get it. Start at `DropPath`."""

from __future__ import annotations

import timm.layers
from torch import nn

from mim_framework.contract.drop_path import DropPath

__all__ = ["DropPath", "replace_drop_path"]


def replace_drop_path(module: nn.Module) -> None:
    """Put ours in the place of every timm `DropPath` inside, with its rate, so that ranks agree about what is dropped.

    For blocks of timm, which have one for each branch. A block that calls a single one twice would lose both branches
    together: give it two.

    Raises:
        ValueError: if one does not divide by the share that it keeps.
    """
    for name, child in module.named_children():
        if isinstance(child, timm.layers.DropPath):
            if not child.scale_by_keep:
                raise ValueError(f"'{name}' of {type(module).__name__} has scale_by_keep=False, which ours cannot")
            setattr(module, name, DropPath(child.drop_prob).train(child.training))
        else:
            replace_drop_path(child)
