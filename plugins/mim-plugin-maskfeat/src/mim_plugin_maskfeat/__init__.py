"""MaskFeat, masked feature prediction (Wei et al. 2022, arXiv 2112.09133): predict the HOG of hidden patches.

Start at `HOGTarget` in `target.py`: it is what the method adds, by the histograms of `hog.py`. The rest of a step is
the core's `block` masker, one of the two encoders in `encoder.py`, the core's `linear` decoder and `mse` loss. Layouts
of checkpoints are in `checkpoints.py`.
"""

from __future__ import annotations

from mim_framework import hookimpl
from mim_plugin_maskfeat.checkpoints import (
    MMPretrainCheckpoint,
    MViTTimmCheckpoint,
    OfficialCheckpoint,
    TimmCheckpoint,
)
from mim_plugin_maskfeat.encoder import MaskFeatMViT, MaskFeatViT
from mim_plugin_maskfeat.target import HOGTarget


@hookimpl
def mim_encoders():
    return [MaskFeatViT, MaskFeatMViT]


@hookimpl
def mim_targets():
    return [HOGTarget]


@hookimpl
def mim_checkpoint_formats():
    return [OfficialCheckpoint, TimmCheckpoint, MViTTimmCheckpoint, MMPretrainCheckpoint]
