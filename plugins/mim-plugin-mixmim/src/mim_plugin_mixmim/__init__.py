"""MixMIM, also called MixMAE (Liu et al. 2022, arXiv 2205.13137): hidden patches are filled from another image.

A step is `MixMasker` in `masker.py`, `MixEncoder` in `encoder.py` and `MixDecoder` in `decoder.py`, with the core's
`pixels` target and `mse` loss; start at their `forward`. The blocks of the last two are in `blocks.py`, the layouts of
official checkpoints in `checkpoints.py`. `load_encoder` rebuilds a trained encoder without a recipe.
"""

from __future__ import annotations

from mim_framework import hookimpl
from mim_plugin_mixmim.checkpoints import MMPretrainCheckpoint, OfficialCheckpoint, SafetensorsCheckpoint
from mim_plugin_mixmim.decoder import MixDecoder
from mim_plugin_mixmim.encoder import MixEncoder, load_encoder
from mim_plugin_mixmim.masker import MixMasker

__all__ = ["MixDecoder", "MixEncoder", "MixMasker", "load_encoder"]


@hookimpl
def mim_maskers():
    return [MixMasker]


@hookimpl
def mim_encoders():
    return [MixEncoder]


@hookimpl
def mim_decoders():
    return [MixDecoder]


@hookimpl
def mim_checkpoint_formats():
    return [OfficialCheckpoint, SafetensorsCheckpoint, MMPretrainCheckpoint]
