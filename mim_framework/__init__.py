"""MIM Framework: masked image modeling pre-training, assembled from plugins by a recipe.

Importing this package is cheap: torch is imported when a name that needs it is first used. `load` opens an encoder for
its features. Plugins import from here, from `mim_framework.nn`, `mim_framework.layouts` and `mim_framework.testing`,
and from nothing else.
"""

from __future__ import annotations

from mim_framework.base.lazy import module_of_names, on_demand

__version__ = "0.1.0"

_HOME = {
    "contract.hooks": ["hookimpl"],
    "base.section": ["LocalPath", "PathOrURL", "Section"],
    "base.errors": [
        "MimError", "RecipeError", "PluginError", "DataError", "CheckpointError", "TrainingError",
        "BrokenImage", "Unreachable",
    ],
    "base.schedule": ["Schedule", "Curve", "extremes", "value_at"],
    "base.rng": ["random_bits", "uniform", "permutation"],
    "contract.records": ["Ask", "Latent", "Masked", "Measured", "Outcome", "Pred", "Sample", "Stretch", "Views"],
    "contract.specs": ["EncoderSpec", "MaskerSpec", "PredSpec", "TargetSpec", "ViewSpec", "Specs"],
    "contract.mask": ["Grid", "Mask"],
    "contract.step": ["Step"],
    "contract.components": [
        "API_VERSION", "CheckpointFormat", "Component", "Decoder", "Encoder", "Head", "JointEncoder", "Loss", "Masker",
        "Objective",
        "Parts", "Source", "Target", "ViewBuilder",
    ],
    "registry.registry": ["Registry"],
    "recipe.draft": ["load_recipe"],
    "training.trainer": ["Trainer", "train"],
    "convert.importing": ["import_checkpoint"],
    "features.encoder": ["FrozenEncoder", "load"],
    "contract.evaluation": ["Estimate", "Evaluation", "Features", "Method", "Subject", "check_features"],
    "builtins.objectives": ["MaskedPrediction"],
    "builtins.vit": ["ViTSizes", "MaskTokenViT", "BEiTViT"],
    "nn.images": ["Renormalize"],
    "nn.attention": ["attend"],
    "nn.masking": ["gather_tokens", "paste"],
    "nn.patches": ["patch_grid", "patchify", "unpatchify"],
    "nn.codes": ["perplexity", "usage_picture"],
    "nn.positions": ["sincos_position_table"],
    "layouts.tables": ["unfold_to_places"],
    "base.precision": ["without_autocast"],
    "data.decode": ["Image", "Interpolation", "JpegBackend", "MAX_PIXELS", "PILLOW_MAX_PIXELS"],
    "data.values": ["Alpha"],
    "data.views": [
        "NUM_CROP_RANDOM", "ImageViews", "ImgSize", "Share", "height_width", "increasing", "jitter_color",
        "one_for_each_channel", "random_resized_crop_box",
    ],
}  # fmt: skip
_MODULE_OF = module_of_names(_HOME)

__all__ = ["__version__", *_MODULE_OF]
__getattr__ = on_demand(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted(__all__)
