"""Components that more than one method uses, registered by the same hooks as any plugin's."""

from __future__ import annotations

from mim_framework.builtins.checkpoints import ViTTimmCheckpoint
from mim_framework.builtins.classification import Classifier, Classify
from mim_framework.builtins.decoders import LinearDecoder, PooledDecoder
from mim_framework.builtins.losses import CosineLoss, CrossEntropyLoss, L1Loss, MSELoss
from mim_framework.builtins.maskers import BlockMasker, NoMasker, RandomMasker
from mim_framework.builtins.objectives import MaskedPrediction
from mim_framework.builtins.targets import FeatureTarget, LabelTarget, PixelTarget, TokenTarget
from mim_framework.builtins.timm import TimmEncoder
from mim_framework.builtins.vit import MaskTokenViT
from mim_framework.contract.hooks import hookimpl
from mim_framework.data.sources.digits import DigitsSource
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.sources.tar import TarSource
from mim_framework.data.sources.torchvision import TorchvisionSource
from mim_framework.data.views import ImageViews


@hookimpl
def mim_maskers():
    return [RandomMasker, BlockMasker, NoMasker]


@hookimpl
def mim_encoders():
    return [TimmEncoder, MaskTokenViT]


@hookimpl
def mim_targets():
    return [PixelTarget, FeatureTarget, TokenTarget, LabelTarget]


@hookimpl
def mim_decoders():
    return [LinearDecoder, PooledDecoder, Classifier]


@hookimpl
def mim_losses():
    return [MSELoss, L1Loss, CosineLoss, CrossEntropyLoss]


@hookimpl
def mim_objectives():
    return [MaskedPrediction, Classify]


@hookimpl
def mim_views():
    return [ImageViews]


@hookimpl
def mim_sources():
    return [FolderSource, TarSource, DigitsSource, TorchvisionSource]


@hookimpl
def mim_checkpoint_formats():
    return [ViTTimmCheckpoint]
