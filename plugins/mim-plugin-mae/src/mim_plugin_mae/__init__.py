"""MAE, masked autoencoders (He et al. 2021, arXiv 2111.06377): the visible-only ViT and its light decoder.

Start at `MAEEncoder.forward` in `encoder.py` and `MAEDecoder.forward` in `decoder.py`: a step is those two between the
core's `random` masker, `pixels` target and `mse` loss. The layouts of official checkpoints are in `checkpoints.py`.
"""

from __future__ import annotations

from mim_framework import hookimpl
from mim_plugin_mae.checkpoints import MMPretrainCheckpoint, OfficialCheckpoint, TimmCheckpoint
from mim_plugin_mae.decoder import MAEDecoder
from mim_plugin_mae.encoder import MAEEncoder


@hookimpl
def mim_encoders():
    return [MAEEncoder]


@hookimpl
def mim_decoders():
    return [MAEDecoder]


@hookimpl
def mim_checkpoint_formats():
    return [OfficialCheckpoint, TimmCheckpoint, MMPretrainCheckpoint]
