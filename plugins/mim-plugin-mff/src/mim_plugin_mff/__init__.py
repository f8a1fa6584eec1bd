"""MFF, multi-level feature fusion (Liu et al. 2023, arXiv 2308.00261): the heads see shallow layers too.

Start at `FusedPrediction.encode` in `objective.py`: it stands between the encoder and the heads of any masked
prediction, so that masker, encoder, target, decoder and loss are those of the method it is added to, MAE in the paper.
The weak crop that belongs to the recipe is in `views.py`, the layout of official checkpoints in `checkpoints.py`.
"""

from __future__ import annotations

from mim_framework import hookimpl
from mim_plugin_mff.checkpoints import MMPretrainCheckpoint
from mim_plugin_mff.objective import FusedPrediction
from mim_plugin_mff.views import ResizedCropViews


@hookimpl
def mim_objectives():
    return [FusedPrediction]


@hookimpl
def mim_views():
    return [ResizedCropViews]


@hookimpl
def mim_checkpoint_formats():
    return [MMPretrainCheckpoint]
