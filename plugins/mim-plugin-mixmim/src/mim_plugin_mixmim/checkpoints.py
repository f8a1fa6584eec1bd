"""Where MixMIM's weights are found in the checkpoints of other code bases.

Our names are the official ones. mmpretrain merges patches with `Unfold`, which puts channels before places, and has
the halves of the position tables exchanged; tables are always taken from the file.
"""

from __future__ import annotations

import re
from math import isqrt
from typing import Any

from torch import Tensor

from mim_framework import CheckpointFormat, Grid
from mim_framework.layouts import (
    INSIDE_BLOCKS,
    Guess,
    ReadByOfficialNames,
    depth_of,
    guessed_heads,
    part_of,
    renamed,
    unfold_to_places,
)
from mim_framework.nn import relative_position_index

ENCODER, DECODER = "encoder.", "heads.main.decoder."
TABLE = ".relative_position_bias_table"
COMPUTED = ".relative_position_index"
FIRST_TABLE = f"layers.0.blocks.0.attn{TABLE}"
DECODER_HEADS_OF_WIDTH = {512: 16}
"""Of the decoder in all published models; no shape tells it."""


class OfficialCheckpoint(CheckpointFormat):
    """Sense-X/MixMIM: a pre-training checkpoint, or a fine-tuned encoder, whose head is left out."""

    name = "mixmim_official"
    bias_tables = "bicubic"  # util/pos_embed.py

    def recognises(self, state: dict[str, Tensor]) -> bool:
        shifted = any(name.endswith(".attn_mask") for name in state)  # an ordinary Swin
        return {"absolute_pos_embed", "patch_embed.norm.weight", FIRST_TABLE} <= state.keys() and not shifted

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "views": {"type": "image", "img_size": img_size_of(state)},
            "masker": {"type": "mixmim", "mask_ratio": Guess(0.5, "that of the paper")},
            "encoder": {"type": "mixmim_swin", **encoder_options(state)},
            "target": {"type": "pixels", "norm_pix_loss": Guess(False, "the default of the official script")},
            "decoder": {"type": "mixmim_decoder", **decoder_options(state)},
            "loss": {"type": "mse"},
        }

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        decoder = ("mask_token", "decoder_")
        return {
            (DECODER if name.startswith(decoder) else ENCODER) + name: tensor
            for name, tensor in state.items()
            if not name.endswith(COMPUTED)
        }

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder with the index buffers that official code expects, and the decoder if the run has this one."""
        exported = encoder_state(state)
        for name in [name for name in exported if name.endswith(TABLE)]:
            index = index_of_window(window_of(exported[name]))
            exported[name.removesuffix(TABLE) + COMPUTED] = index
        if DECODER + "mask_token" in state:
            exported |= part_of(state, DECODER)
        return exported


class SafetensorsCheckpoint(OfficialCheckpoint):
    """The encoder alone, for `mim_plugin_mixmim.load_encoder`; timm has no model of this kind."""

    name = "mixmim_safetensors"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False  # the same names as in the official layout, which reads them

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return encoder_state(state)


class MMPretrainCheckpoint(ReadByOfficialNames, OfficialCheckpoint):
    """open-mmlab/mmpretrain's MixMIM."""

    name = "mixmim_mmpretrain"
    renames = (
        (r"^neck\.ln1\.", "decoder_norm."),
        (r"^(backbone|neck)\.", ""),
        *INSIDE_BLOCKS,
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        needed = {"backbone.absolute_pos_embed", "backbone.patch_embed.norm.weight", f"backbone.{FIRST_TABLE}"}
        return needed <= state.keys()

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        slots = super().to_recipe(state)
        slots["decoder"]["norm_eps"] = 1e-6
        return slots

    def official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        named = renamed(state, self.renames)
        return {name: unfold_to_places(each) if ".downsample." in name else each for name, each in named.items()}


def index_of_window(window: int) -> Tensor:
    """(w^2, w^2) int64: for a query (row) and a key (column), the row of the bias table (Swin)."""
    return relative_position_index(Grid((window, window)))[1:, 1:].contiguous()  # without the class token


def window_of(table: Tensor) -> int:
    """Side of the window of a bias table ((2w - 1)^2, heads)."""
    return (isqrt(len(table)) + 1) // 2


def img_size_of(state: dict[str, Tensor]) -> int:
    """Side of the square images of an official encoder, in pixels."""
    return isqrt(state["absolute_pos_embed"].shape[1]) * state["patch_embed.proj.weight"].shape[-1]


def encoder_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """The encoder's options, all of which the shapes of an official state tell."""
    blocks = {(int(m[1]), int(m[2])) for name in state if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    num_stages = 1 + max(stage for stage, _ in blocks)
    tables = [state[f"layers.{stage}.blocks.0.attn{TABLE}"] for stage in range(num_stages)]
    embed_dim = state["patch_embed.proj.weight"].shape[0]
    return {
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "embed_dim": embed_dim,
        "depths": [sum(each == stage for each, _ in blocks) for stage in range(num_stages)],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": [window_of(table) for table in tables],
        "mlp_ratio": len(state["layers.0.blocks.0.mlp.fc1.weight"]) / embed_dim,
    }


def decoder_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """The decoder's options; none for a file without one, which leaves the defaults."""
    if "mask_token" not in state:
        return {}
    embed_dim = state["mask_token"].shape[-1]
    return {
        "embed_dim": embed_dim,
        "depth": depth_of(state, "decoder_blocks"),
        "num_heads": guessed_heads(DECODER_HEADS_OF_WIDTH, embed_dim),
        "mlp_ratio": len(state["decoder_blocks.0.mlp.fc1.weight"]) / embed_dim,
    }


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an objective's state under its official names."""
    return part_of(state, ENCODER)
