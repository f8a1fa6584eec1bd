"""MIM Framework: masked image modeling pre-training, assembled from plugins by a recipe.

Importing this package is cheap: torch is imported when a name that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "contract.hooks": ["hookimpl"],
    "base.section": ["Section"],
    "base.errors": ["MimError", "RecipeError", "PluginError", "DataError", "CheckpointError", "TrainingError"],
    "base.schedule": ["Schedule", "Curve", "extremes"],
    "contract.records": ["Ask", "Latent", "Masked", "Pred", "Sample", "Views"],
    "contract.specs": ["EncoderSpec", "MaskerSpec", "PredSpec", "TargetSpec", "ViewSpec", "Specs"],
    "contract.mask": ["Grid", "Mask"],
    "contract.step": ["Step"],
    "contract.components": [
        "API_VERSION", "CheckpointFormat", "Component", "Decoder", "Encoder", "Head", "Loss", "Masker", "Objective",
        "Parts", "Source", "Target", "ViewBuilder",
    ],
    "builtins.objectives": ["MaskedPrediction"],
    "nn.images": ["Renormalize"],
    "nn.attention": ["attend"],
    "nn.masking": ["gather_tokens", "paste"],
    "nn.patches": ["patch_grid", "patchify", "unpatchify"],
    "nn.codes": ["perplexity", "usage_picture"],
    "nn.positions": ["sincos_position_table"],
    "layouts.tables": ["unfold_to_places"],
    "base.precision": ["without_autocast"],
    "data.decode": ["BrokenImage"],
    "data.views": ["NUM_CROP_RANDOM", "ImageViews", "jitter_color", "random_resized_crop_box"],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"mim_framework.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'mim_framework' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
