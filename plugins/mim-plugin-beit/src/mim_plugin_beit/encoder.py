"""The encoder of BEiT. Its forward pass is `MaskTokenViT.forward` in the core."""

from __future__ import annotations

from mim_framework import BEiTViT


class BEiTEncoder(BEiTViT):
    """ViT with a mask token at hidden positions and relative position biases that all blocks share."""

    name = "beit"
