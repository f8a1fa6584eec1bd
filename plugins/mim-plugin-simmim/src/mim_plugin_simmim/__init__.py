"""SimMIM (Xie et al. 2021, arXiv 2111.09886): mask tokens inside an ordinary encoder, one linear layer, raw pixels, L1.

Start at `SwinEncoder.forward` in `encoder.py`, or at `MaskTokenViT.forward` in the core for the ViT. A step is the
encoder between the core's `random` masker on 32-pixel cells, `linear` decoder, `pixels` target and `l1` loss. The
blocks of Swin are in `blocks.py`, the layouts of official checkpoints in `checkpoints.py`.
"""

from __future__ import annotations

from mim_framework import hookimpl
from mim_plugin_simmim.checkpoints import (
    MMPretrainSwinCheckpoint,
    OfficialSwinCheckpoint,
    OfficialViTCheckpoint,
    TimmSwinCheckpoint,
    TimmViTCheckpoint,
)
from mim_plugin_simmim.encoder import SimMIMViT, SwinEncoder, SwinV2Encoder


@hookimpl
def mim_encoders():
    return [SwinEncoder, SwinV2Encoder, SimMIMViT]


@hookimpl
def mim_checkpoint_formats():
    return [
        OfficialSwinCheckpoint,
        OfficialViTCheckpoint,
        MMPretrainSwinCheckpoint,
        TimmSwinCheckpoint,
        TimmViTCheckpoint,
    ]
