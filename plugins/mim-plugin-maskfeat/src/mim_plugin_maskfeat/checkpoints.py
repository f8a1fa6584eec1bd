"""Where MaskFeat's weights are found in the checkpoints of other code bases."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from mim_framework import CheckpointFormat
from mim_framework.layouts import INSIDE_BLOCKS, Guess, part_of, renamed, vit_options

ENCODER, DECODER = "encoder.", "heads.main.decoder."
HEAD_NAMES = {"pred_head.transforms.0.0.": "norm.", "pred_head.projections.0.": "head."}
"""The official head, by its names in the core's `linear` decoder."""
BINS_OF_ALL_COLOURS = 27
TOLD_BY_SLOWFAST = {
    "views.img_size": "DATA.TRAIN_CROP_SIZE",
    "views.mean": "DATA.MEAN",
    "views.std": "DATA.STD",
    "masker.mask_ratio": "AUG.MASK_RATIO",
    "encoder.num_heads": "MVIT.NUM_HEADS",
}
"""Option of a slot -> where SlowFast's configuration has it."""


class OfficialCheckpoint(CheckpointFormat):
    """facebookresearch/SlowFast: pre-training checkpoints of the image models (`IN1K_VIT_B_MaskFeat_PT`)."""

    name = "maskfeat_official"
    encoders = frozenset({"maskfeat_vit"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        needed = {"mask_token", "pos_embed", "blocks.0.attn.qkv.bias", "pred_head.projections.0.weight"}
        return needed <= state.keys()

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        encoder = encoder_options(state)
        return recipe_of(state, encoder, state["pred_head.projections.0.bias"], decoder={"norm": True})

    def told_by(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """SlowFast keeps its whole configuration as text."""
        found = {where: options.get(name) for where, name in TOLD_BY_SLOWFAST.items()}
        return super().told_by(options) | {where: value for where, value in found.items() if value is not None}

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The filters of the official HOG are computed here, not loaded."""
        imported = {}
        for name, tensor in state.items():
            prefix = next((official for official in HEAD_NAMES if name.startswith(official)), None)
            if prefix is not None:
                imported[DECODER + HEAD_NAMES[prefix] + name.removeprefix(prefix)] = tensor
            elif not name.startswith("hogs."):
                imported[ENCODER + name] = tensor
        return imported

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder, and the head if the run has one like the official."""
        if ENCODER + "norm.weight" in state:
            raise ValueError("the encoder has a final norm (final_norm: true), the official one has none")
        exported = encoder_state(state)
        if DECODER + "norm.weight" in state:
            for official, ours in HEAD_NAMES.items():
                exported |= part_of(state, DECODER + ours, official)
        return exported


class TimmCheckpoint(CheckpointFormat):
    """The encoder for timm's `VisionTransformer`, whose final `norm` is the one of the head, or of the encoder.

    Without either the file holds no norm, for a model made with `final_norm=False` and `fc_norm=False`.
    """

    name = "maskfeat_timm"
    encoders = frozenset({"maskfeat_vit"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False  # MAE's layout has these names too, and reads them

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        raise ValueError(
            "the tensors do not tell the target; it reads only what `mim export` wrote with the slots of a run"
        )

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {ENCODER + name: tensor for name, tensor in state.items()}

    def adapt(self, found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The norm is that of the head if the encoder has none."""
        if ENCODER + "norm.weight" in wanted or DECODER + "norm.weight" not in wanted:
            return found
        return {name.replace(ENCODER + "norm.", DECODER + "norm."): tensor for name, tensor in found.items()}

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        exported = encoder_state(state)
        del exported["mask_token"]
        return part_of(state, DECODER + "norm.", "norm.") | exported


class MViTTimmCheckpoint(TimmCheckpoint):
    """The encoder for timm's `mvitv2_*`, whose final `norm` is the one of the head, or of the encoder."""

    name = "maskfeat_mvit_timm"
    encoders = frozenset({"maskfeat_mvit"})

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return part_of(state, DECODER + "norm.", "norm.") | part_of(state, ENCODER + "model.")

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            ENCODER + ("" if name.startswith("norm.") else "model.") + name: tensor for name, tensor in state.items()
        }

    def adapt(self, found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norm = DECODER if DECODER + "norm.weight" in wanted else ENCODER + "model."
        return {name.replace(ENCODER + "norm.", norm + "norm."): tensor for name, tensor in found.items()}


class MMPretrainCheckpoint(CheckpointFormat):
    """open-mmlab/mmpretrain's MaskFeat: the same ViT with the norm inside, and a Gaussian window in the HOG."""

    name = "maskfeat_mmpretrain"
    encoders = frozenset({"maskfeat_vit"})
    renames = (
        (r"^neck\.fc\.", DECODER + "head."),
        (r"^backbone\.ln1\.", ENCODER + "norm."),
        (r"^backbone\.layers\.", ENCODER + "blocks."),
        (r"^backbone\.", ENCODER),
        *INSIDE_BLOCKS,
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        needed = {"backbone.mask_token", "backbone.layers.0.attn.qkv.bias", "backbone.ln1.weight", "neck.fc.weight"}
        return needed <= state.keys()

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        ours = part_of(self.import_state(state), ENCODER)
        encoder = {
            **encoder_options(ours),
            "final_norm": True,
            "initial_bias": 0,
            "mask_token_decays": False,
        }
        return recipe_of(ours, encoder, state["neck.fc.bias"], gaussian_window=16, rule="mmpretrain")

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(state, self.renames, leave_out=("target_generator.", "data_preprocessor."))

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        raise ValueError("it can be read only; use 'official' or 'timm'")


def recipe_of(
    state: Mapping[str, Tensor],
    encoder: dict[str, Any],
    head_bias: Tensor,
    *,
    decoder: Mapping[str, Any] | None = None,
    gaussian_window: int = 0,
    rule: str = "stop_short",
) -> dict[str, Any]:
    """The slots of a recipe; `state` has the official names of the encoder."""
    patch_size, side = encoder["patch_size"], isqrt(state["pos_embed"].shape[1] - 1)
    cells_per_side = isqrt(len(head_bias) // BINS_OF_ALL_COLOURS)
    target = {"type": "hog", "cell_size": patch_size // cells_per_side if cells_per_side else None}
    return {
        "views": {"type": "image", "img_size": side * patch_size},
        "masker": {"type": "block", "mask_ratio": Guess(0.4, "that of the paper"), "rule": rule},
        "encoder": {"type": "maskfeat_vit", **encoder},
        "target": {**target, "gaussian_window": gaussian_window},
        "decoder": {"type": "linear", **(decoder or {})},
        "loss": {"type": "mse"},
    }


def encoder_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """Options that the shapes tell; the number of heads is known for the published widths only, else None."""
    _, options = vit_options(state)
    return {name: options[name] for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an objective's state under its official names.

    Raises:
        ValueError: if it has options that the official architecture lacks.
    """
    exported = part_of(state, ENCODER)
    other = ("rel_pos_bias", "relative_position_bias_table", "q_bias", "gamma_1")
    if "pos_embed" not in exported or any(name.endswith(other) for name in exported):
        raise ValueError("it holds no relative position biases, no layer scale, all biases and absolute positions")
    return exported
