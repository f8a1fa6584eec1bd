"""Where MAE's weights are found in the checkpoints of other code bases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from mim_framework import CheckpointFormat, Grid
from mim_framework.layouts import INSIDE_BLOCKS, Guess, ReadByOfficialNames, depth_of, guessed_heads, part_of
from mim_framework.nn import sincos_position_table

FIRST_MLP = "blocks.0.mlp.fc1.weight"
ENCODER, DECODER = "encoder.", "heads.main.decoder."
HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1280: 16}
"""Of ViT-S, -B, -L and -H; no shape tells it."""
DECODER_HEADS_OF_WIDTH = {512: 16}
HEADS_OF_MODEL = {"base": 12, "large": 16, "huge": 16}
"""Of the models that the official script knows by name, as `mae_vit_base_patch16`."""
POSITION_TOLERANCE = 1e-2
"""For files of half precision too."""
CLASSIFIER = ("head.weight", "fc_norm.weight")


class OfficialCheckpoint(CheckpointFormat):
    """facebookresearch/mae: the encoder alone (`mae_pretrain_vit_base.pth`) or with the decoder (`..._full.pth`)."""

    name = "mae_official"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.bias", FIRST_MLP}
        if "blocks.0.gamma_1" in state:  # with layer scale it is a BEiT
            return False
        # A mask token belongs to MAE's decoder; in the encoder it is that of another method.
        if not needed <= state.keys() or ("mask_token" in state) != ("decoder_" + FIRST_MLP in state):
            return False
        return "mask_token" in state or is_alone_from_pre_training(state)

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        side = isqrt(state["pos_embed"].shape[1] - 1)
        has_decoder = {"mask_token", "decoder_" + FIRST_MLP} <= state.keys()
        heads = DECODER_HEADS_OF_WIDTH
        decoder = transformer_options(state, "decoder_blocks", "mask_token", heads) if has_decoder else {}
        return {
            "views": {"type": "image", "img_size": side * patch_size},
            "masker": {"type": "random", "mask_ratio": Guess(0.75, "that of the paper")},
            "encoder": {
                "type": "mae_vit",
                "patch_size": patch_size,
                **transformer_options(state, "blocks", "cls_token", HEADS_OF_WIDTH),
            },
            "target": {"type": "pixels", "norm_pix_loss": Guess(False, "the default of the official script")},
            "decoder": {"type": "mae_decoder", **decoder},
            "loss": {"type": "mse"},
        }

    def told_by(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The official script's options: besides those that many have, the name of the model tells the heads."""
        told = super().told_by(options)
        named = re.match(r"mae_vit_(base|large|huge)_patch", str(options.get("model")))
        if named:
            told["encoder.num_heads"] = told["encoder.num_heads"] or HEADS_OF_MODEL[named[1]]
            told["decoder.num_heads"] = told["decoder.num_heads"] or 16
        return told

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        decoder = ("mask_token", "decoder_")
        return {(DECODER if name.startswith(decoder) else ENCODER) + name: tensor for name, tensor in state.items()}

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder, and the decoder if the run has this one."""
        exported = encoder_state(state)
        if DECODER + "mask_token" in state:
            exported |= part_of(state, DECODER)
        return exported


class TimmCheckpoint(OfficialCheckpoint):
    """The encoder for timm's `VisionTransformer`: token pooling, or average pooling with `fc_norm=False`."""

    name = "mae_timm"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False  # the same names as in the official layout, which reads them

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return encoder_state(state)


class MMPretrainCheckpoint(ReadByOfficialNames, OfficialCheckpoint):
    """open-mmlab/mmpretrain's MAE. Its position tables have the two halves exchanged; they are taken as they are."""

    name = "mae_mmpretrain"
    renames = (
        (r"^backbone\.ln1\.", "norm."),
        (r"^neck\.ln1\.", "decoder_norm."),
        (r"^(backbone|neck)\.", ""),
        (r"^layers\.", "blocks."),
        *INSIDE_BLOCKS,
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        other_methods = {"backbone.mask_token", "backbone.proj_weights", "backbone.layers.0.gamma_1"}
        if "backbone.layers.0.attn.qkv.bias" not in state or other_methods & state.keys():
            return False
        has_head = any(name.startswith("head.") for name in state)
        return "neck.mask_token" in state or (not has_head and is_alone_from_pre_training(self.official(state)))


def is_alone_from_pre_training(state: Mapping[str, Tensor]) -> bool:
    """Whether an encoder without decoder is MAE's: its positions are fixed ones, which no fine-tuning has moved."""
    table = state.get("pos_embed")
    if table is None or any(name in state for name in CLASSIFIER):
        return False
    side, dim = isqrt(table.shape[1] - 1), table.shape[-1]
    if side**2 + 1 != table.shape[1] or dim % 4:
        return False
    fixed = (
        sincos_position_table(dim, Grid((side, side)), row_first=rows, num_prefix_tokens=1) for rows in (False, True)
    )
    return any(torch.allclose(table[0].float(), each, atol=POSITION_TOLERANCE) for each in fixed)


def transformer_options(
    state: dict[str, Tensor], blocks: str, token: str, heads_of_width: Mapping[int, int]
) -> dict[str, Any]:
    """Options that the shapes tell; the number of heads is guessed for the published widths only, else None."""
    embed_dim = state[token].shape[-1]
    return {
        "embed_dim": embed_dim,
        "depth": depth_of(state, blocks),
        "num_heads": guessed_heads(heads_of_width, embed_dim),
        "mlp_ratio": state[f"{blocks}.0.mlp.fc1.weight"].shape[0] / embed_dim,
    }


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an objective's state under its official names."""
    return part_of(state, ENCODER)
