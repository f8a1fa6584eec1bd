"""BEiT v2 (Peng et al. 2022, arXiv 2208.06366): BEiT with a tokenizer of its own and a class token that is made useful.

Stage one, the tokenizer VQ-KD, is in `vqkd.py`, and its codes in `codebook.py`. Stage two is the objective in
`objective.py` on BEiT's encoder, views, target, decoder and loss; start at `PatchAggregation.forward`. The layouts of
official checkpoints are in `checkpoints.py`.
"""

from __future__ import annotations

from mim_framework import hookimpl
from mim_plugin_beitv2.checkpoints import (
    MMPretrainCheckpoint,
    MMPretrainVQKDCheckpoint,
    OfficialCheckpoint,
    OfficialVQKDCheckpoint,
    TimmVQKDCheckpoint,
)
from mim_plugin_beitv2.objective import PatchAggregation
from mim_plugin_beitv2.vqkd import VQKDDecoder, VQKDEncoder


@hookimpl
def mim_encoders():
    return [VQKDEncoder]


@hookimpl
def mim_decoders():
    return [VQKDDecoder]


@hookimpl
def mim_objectives():
    return [PatchAggregation]


@hookimpl
def mim_checkpoint_formats():
    return [
        OfficialCheckpoint,
        MMPretrainCheckpoint,
        OfficialVQKDCheckpoint,
        MMPretrainVQKDCheckpoint,
        TimmVQKDCheckpoint,
    ]
