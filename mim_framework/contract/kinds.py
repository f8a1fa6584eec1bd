"""Every kind of component, with its base class."""

from __future__ import annotations

from mim_framework.contract.components import (
    CheckpointFormat,
    Decoder,
    Encoder,
    Loss,
    Masker,
    Objective,
    Source,
    Target,
    ViewBuilder,
)
from mim_framework.contract.evaluation import Evaluation

KINDS: dict[str, type] = {
    cls.kind: cls
    for cls in (
        Masker, Encoder, Target, Decoder, Loss, Objective, ViewBuilder, Source, Evaluation, CheckpointFormat,
    )
}  # fmt: skip
