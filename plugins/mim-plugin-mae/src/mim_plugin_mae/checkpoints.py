"""Where MAE's weights are found in the checkpoints of other code bases."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor

from mim_framework import CheckpointFormat
from mim_framework.layouts import INSIDE_BLOCKS, ReadByOfficialNames, depth_of, part_of

FIRST_MLP = "blocks.0.mlp.fc1.weight"
ENCODER, DECODER = "encoder.", "heads.main.decoder."
HEADS_OF_WIDTH = {384: 6, 512: 16, 768: 12, 1024: 16, 1280: 16}  # ViT-S, the decoder, ViT-B, -L, -H: no shape tells it


class OfficialCheckpoint(CheckpointFormat):
    """facebookresearch/mae: the encoder alone (`mae_pretrain_vit_base.pth`) or with the decoder (`..._full.pth`)."""

    name = "mae_official"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        needed = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.bias", FIRST_MLP}
        if "blocks.0.gamma_1" in state:  # with layer scale it is a BEiT
            return False
        # A mask token belongs to MAE's decoder; in the encoder it is that of another method.
        return needed <= state.keys() and ("mask_token" in state) == ("decoder_" + FIRST_MLP in state)

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        side = isqrt(state["pos_embed"].shape[1] - 1)
        has_decoder = {"mask_token", "decoder_" + FIRST_MLP} <= state.keys()
        decoder = transformer_options(state, "decoder_blocks", "mask_token") if has_decoder else {}
        return {
            "views": {"type": "image", "img_size": side * patch_size},
            "masker": {"type": "random"},
            "encoder": {
                "type": "mae_vit",
                "patch_size": patch_size,
                **transformer_options(state, "blocks", "cls_token"),
            },
            "target": {"type": "pixels"},
            "decoder": {"type": "mae_decoder", **decoder},
            "loss": {"type": "mse"},
        }

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
        return "backbone.layers.0.attn.qkv.bias" in state and not other_methods & state.keys()


def transformer_options(state: dict[str, Tensor], blocks: str, token: str) -> dict[str, Any]:
    """Options that the shapes tell; the number of heads is known for the published widths only, else None."""
    embed_dim = state[token].shape[-1]
    return {
        "embed_dim": embed_dim,
        "depth": depth_of(state, blocks),
        "num_heads": HEADS_OF_WIDTH.get(embed_dim),
        "mlp_ratio": state[f"{blocks}.0.mlp.fc1.weight"].shape[0] / embed_dim,
    }


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of an objective's state under its official names."""
    return part_of(state, ENCODER)
