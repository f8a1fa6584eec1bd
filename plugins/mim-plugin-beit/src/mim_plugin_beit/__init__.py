"""BEiT (Bao et al. 2021, arXiv 2106.08254): predict the visual words of hidden blocks of an image.

A step is the encoder in `encoder.py` between the core's `block` masker, `token_ids` target, `linear` decoder and
`cross_entropy` loss; read `MaskTokenViT.forward` in the core. The tokenizer and its training are in `dvae.py`, the two
views of a crop in `views.py`, the layouts of official checkpoints in `checkpoints.py` and `dvae_checkpoints.py`.
"""

from __future__ import annotations

from mim_framework import hookimpl
from mim_plugin_beit.checkpoints import MMPretrainCheckpoint, OfficialCheckpoint, TimmCheckpoint
from mim_plugin_beit.dvae import DalleDecoder, DalleEncoder, DVAEPixels, ELBOLoss
from mim_plugin_beit.dvae_checkpoints import DalleCheckpoint, MMPretrainDalleCheckpoint
from mim_plugin_beit.encoder import BEiTEncoder
from mim_plugin_beit.views import BEiTViews


@hookimpl
def mim_encoders():
    return [BEiTEncoder, DalleEncoder]


@hookimpl
def mim_targets():
    return [DVAEPixels]


@hookimpl
def mim_decoders():
    return [DalleDecoder]


@hookimpl
def mim_losses():
    return [ELBOLoss]


@hookimpl
def mim_views():
    return [BEiTViews]


@hookimpl
def mim_checkpoint_formats():
    return [OfficialCheckpoint, MMPretrainCheckpoint, TimmCheckpoint, DalleCheckpoint, MMPretrainDalleCheckpoint]
