"""Where SimMIM's weights are found in the checkpoints of other code bases.

Three things differ besides names. The official head orders the values of a cell (channel, row, column), our `pixels`
target (row, column, channel). timm merges patches at the start of a stage, official code at the end of the one before.
mmpretrain merges with `Unfold`, which puts channels before places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from mim_framework import CheckpointFormat
from mim_framework.layouts import (
    INSIDE_BLOCKS,
    Guess,
    ReadByOfficialNames,
    part_of,
    renamed,
    to_timm_beit,
    unfold_to_places,
    vit_options,
    with_shared_table,
)

ENCODER, HEAD = "encoder.", "heads.main.decoder.head."
COMPUTED = ("relative_position_index", "attn_mask", "relative_coords_table")
"""Buffers in checkpoints that follow from the sizes."""
IN_CHANS = 3
TOLD_BY_CONFIG = {
    "views.img_size": "DATA.IMG_SIZE",
    "masker.mask_ratio": "DATA.MASK_RATIO",
    "masker.mask_patch_size": "DATA.MASK_PATCH_SIZE",
    "encoder.num_heads": "MODEL.VIT.NUM_HEADS",
}
"""Option of a slot -> where the official configuration has it."""


def head_to_ours(tensor: Any) -> Any:
    """Rows of the head (channel, row, column) -> (row, column, channel), as a linear layer. Other values stay."""
    if not isinstance(tensor, Tensor):
        return tensor
    side = isqrt(len(tensor) // IN_CHANS)
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor
    return rows.unflatten(0, (IN_CHANS, side * side)).transpose(0, 1).flatten(0, 1).contiguous()


def head_to_official(tensor: Tensor) -> Tensor:
    """The inverse, as a convolution of one pixel."""
    rows = tensor.unflatten(0, (-1, IN_CHANS)).transpose(0, 1).flatten(0, 1).contiguous()
    return rows[..., None, None] if tensor.ndim > 1 else rows


def shift_merging(name: str, by: int) -> str:
    """`layers.S.downsample.` counted at the start of a stage instead of the end of the one before, or back."""
    return re.sub(r"layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + by}.downsample.", name)


class SimMIMCheckpoint(CheckpointFormat):
    """What all layouts share: computed buffers are left out, the head is turned, encoder names are translated."""

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        imported = {}
        for name, tensor in state.items():
            if name.endswith(COMPUTED):
                continue
            if name.startswith("decoder.0."):
                imported[HEAD + name.removeprefix("decoder.0.")] = head_to_ours(tensor)
            else:
                imported[self.our_name(name)] = tensor
        return imported

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder, and the head if the run has a linear one for pixels."""
        exported = {self.official_name(name): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
        num_mergings = sum(name.endswith(".downsample.reduction.weight") for name in exported)
        stride = exported["encoder.patch_embed.proj.weight"].shape[-1] * 2**num_mergings
        for part in ("weight", "bias"):
            if HEAD + part in state and len(state[HEAD + part]) == IN_CHANS * stride**2:
                exported[f"decoder.0.{part}"] = head_to_official(state[HEAD + part])
        return exported

    def told_by(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The official configuration; its numbers of heads are those of a ViT, as those of a Swin stand in tensors."""
        found = {where: options.get(name) for where, name in TOLD_BY_CONFIG.items()}
        return super().told_by(options) | {where: value for where, value in found.items() if value is not None}

    def our_name(self, name: str) -> str:
        return name

    def official_name(self, name: str) -> str:
        return name


class OfficialViTCheckpoint(SimMIMCheckpoint):
    """microsoft/SimMIM, ViT: encoder and head of a pre-training checkpoint."""

    name = "simmim_vit_official"
    encoders = frozenset({"simmim_vit"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return {
            "encoder.mask_token",
            "encoder.cls_token",
            "encoder.blocks.0.attn.q_bias",
            "decoder.0.weight",
        } <= state.keys()

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        img_size, options = vit_options(part_of(state, ENCODER))
        return slots(img_size, {"type": "simmim_vit", **options})

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "encoder.blocks.0.attn.qkv.bias" in state:
            raise ValueError("there the key has no bias, in this run it has one (qkv_bias: full)")
        return super().export_state(state)


class OfficialSwinCheckpoint(SimMIMCheckpoint):
    """microsoft/SimMIM, Swin, and microsoft/Swin-Transformer, SwinV2: encoder and head of pre-training."""

    name = "simmim_swin_official"
    encoders = frozenset({"simmim_swin", "simmim_swinv2"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        attention = "encoder.layers.0.blocks.0.attn."
        of_swin = {attention + "relative_position_bias_table", attention + "logit_scale"} & state.keys()
        return bool(of_swin) and {"encoder.mask_token", "decoder.0.weight"} <= state.keys()

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        blocks = {tuple(map(int, match.groups())) for name in state
                  if (match := re.match(r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.", name))}  # fmt: skip
        depths = [len([s for s, _ in blocks if s == stage]) for stage in range(1 + max(s for s, _ in blocks))]
        first = [f"encoder.layers.{stage}.blocks.0.attn." for stage in range(len(depths))]
        v2 = first[0] + "logit_scale" in state
        patch_size = state["encoder.patch_embed.proj.weight"].shape[-1]
        dim = len(state["encoder.patch_embed.proj.weight"])
        return slots(
            self.img_size(state, depths, patch_size),
            {
                "type": "simmim_swinv2" if v2 else "simmim_swin",
                "patch_size": patch_size,
                "embed_dim": dim,
                "depths": depths,
                "num_heads": [
                    len(state[name + "logit_scale"]) if v2 else state[name + "relative_position_bias_table"].shape[1]
                    for name in first
                ],
                "window_size": self.window_size(state, first[0]),
                "mlp_ratio": len(state["encoder.layers.0.blocks.0.mlp.fc1.weight"]) / dim,
                "absolute_position": "encoder.absolute_pos_embed" in state,
            },
        )

    def window_size(self, state: dict[str, Tensor], attention: str) -> int | None:
        """Of the first stage, from its table, or from the index (T, T) that official files of SwinV2 hold."""
        table = state.get(attention + "relative_position_bias_table")
        if table is not None:
            return (isqrt(len(table)) + 1) // 2
        index = state.get(attention + "relative_position_index")
        return None if index is None else isqrt(len(index))

    def img_size(self, state: dict[str, Tensor], depths: list[int], patch_size: int) -> int | None:
        """From the positions, or the shift masks of official files (windows, tokens, tokens); None without."""
        if "encoder.absolute_pos_embed" in state:
            return isqrt(state["encoder.absolute_pos_embed"].shape[1]) * patch_size
        masks = [name for name in state if name.endswith("attn_mask")]
        if not masks:
            return None
        stage, mask = int(masks[0].split(".")[2]), state[masks[0]]
        return isqrt(len(mask)) * isqrt(mask.shape[1]) * patch_size * 2**stage

    def our_name(self, name: str) -> str:
        inner = name.removeprefix(ENCODER)
        if inner in ("mask_token", "absolute_pos_embed"):
            return name
        return f"{ENCODER}swin.{shift_merging(inner, +1)}"

    def official_name(self, name: str) -> str:
        return shift_merging(name.replace("encoder.swin.", ENCODER, 1), -1)


class MMPretrainSwinCheckpoint(ReadByOfficialNames, OfficialSwinCheckpoint):
    """open-mmlab/mmpretrain's SimMIM, which has Swin only. Read, never written."""

    name = "simmim_swin_mmpretrain"
    encoders = frozenset({"simmim_swin"})
    renames = (
        (r"^neck\.decoder\.0\.", "decoder.0."),
        (r"^backbone\.norm3\.", "encoder.norm."),
        (r"^backbone\.", "encoder."),
        (r"\.stages\.", ".layers."),
        (r"\.attn\.w_msa\.", ".attn."),
        *INSIDE_BLOCKS,
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return {"backbone.mask_token", "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight"} <= state.keys()

    def official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        named = renamed(state, self.renames)
        return {name: unfold_to_places(each) if ".downsample." in name else each for name, each in named.items()}


class TimmSwinCheckpoint(OfficialSwinCheckpoint):
    """The encoder for timm's `SwinTransformer`, without the mask token."""

    name = "simmim_swin_timm"
    encoders = frozenset({"simmim_swin", "simmim_swinv2"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False

    def official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official names, whose merging stands one stage earlier."""
        return {ENCODER + shift_merging(name, -1): tensor for name, tensor in state.items()}

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        return super().to_recipe(self.official(state))

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().import_state(self.official(state))

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "encoder.absolute_pos_embed" in state:
            raise ValueError("timm's Swin has no absolute positions (absolute_position: true)")
        return part_of(state, "encoder.swin.")


class TimmViTCheckpoint(OfficialViTCheckpoint):
    """The encoder for timm's `Beit`, whose blocks each hold a bias table: the shared one is copied into all of them."""

    name = "simmim_vit_timm"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        img_size, options = vit_options(state)
        return slots(img_size, {"type": "simmim_vit", **options})

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().import_state({ENCODER + name: tensor for name, tensor in state.items()})

    def adapt(self, found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_shared_table(found, wanted)

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return to_timm_beit(part_of(state, ENCODER))


def mask_cell(slots: Mapping[str, Mapping[str, Any]]) -> int:
    """Side of a mask cell in pixels: whole tokens, two cells or more a side, at most 32 if it can."""
    encoder, img_size = slots["encoder"], slots["views"]["img_size"]
    token = encoder["patch_size"] * 2 ** (len(encoder.get("depths", [0])) - 1)
    fitting = [side for side in range(token, 33, token) if img_size % side == 0 and img_size > side]
    return max(fitting, default=token)


def slots(img_size: int | None, encoder: dict[str, Any]) -> dict[str, Any]:
    """A recipe's slots around an encoder."""
    return {
        "views": {"type": "image", "img_size": img_size},
        "masker": {
            "type": "random",
            "mask_ratio": Guess(0.6, "that of the paper"),
            "mask_patch_size": Guess(mask_cell, "32 as in the paper, or the largest that divides the image"),
            "rounding": "hide_ceil",
        },
        "encoder": encoder,
        "target": {"type": "pixels"},
        "decoder": {"type": "linear", "init": "torch"},
        "loss": {"type": "l1"},
    }
