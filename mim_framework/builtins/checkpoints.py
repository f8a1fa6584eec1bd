"""The built-in `vit` in the layout of timm: of its `VisionTransformer`, or of its `Beit` where attention has biases."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from mim_framework.contract.components import CheckpointFormat
from mim_framework.layouts.guesses import Guess
from mim_framework.layouts.names import part_of, renamed
from mim_framework.layouts.vit import OWN_TABLE, SHARED_TABLE, to_timm_beit, vit_options, with_shared_table

ENCODER = "encoder."
NEEDED = {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
OTHER_KINDS = (
    "mask_token",
    "dist_token",
    "reg_token",
    "norm_pre.weight",
    "blocks.0.attn.q_norm.weight",
    "lm_head.weight",
)
"""What a plain ViT does not have."""
CLASSIFIERS = ("head.", "fc_norm.")
NO_METHOD = "nothing in the file is of a method; this proposal is SimMIM's"
SCALES = ((r"\.ls([12])\.gamma$", r".gamma_\1"),)
"""timm's name of a layer scale in a `VisionTransformer`."""


class ViTTimmCheckpoint(CheckpointFormat):
    """Plain and supervised vision transformers of timm, for the encoder `vit`; written without the mask token.

    Biases by relative position are those of timm's `Beit`; a model of it is made with `global_pool="token"`.
    """

    name = "vit_timm"
    encoders = frozenset({"vit"})
    fallback = True

    def recognises(self, state: dict[str, Tensor]) -> bool:
        if not state.keys() >= NEEDED or any(name in state for name in OTHER_KINDS) or SHARED_TABLE in state:
            return False
        positions = state.get("pos_embed")
        has_places = positions is not None or f"blocks.0.{OWN_TABLE}" in state
        square = positions is None or isqrt(positions.shape[1] - 1) ** 2 + 1 == positions.shape[1]
        return has_places and square and not any(name.startswith("decoder_") for name in state)

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        img_size, options = vit_options(ours(state))
        bias = next((kind for kind, name in BIASES.items() if f"blocks.0.attn.{name}" in state), "none")
        has_norm = "norm.weight" in state or "fc_norm.weight" in state
        return {
            "views": {"type": "image", "img_size": img_size},
            "masker": {"type": Guess("random", NO_METHOD), "mask_ratio": Guess(0.6, NO_METHOD)},
            "encoder": {"type": "vit", **options, "qkv_bias": bias, "final_norm": has_norm},
            "target": {"type": Guess("pixels", NO_METHOD)},
            "decoder": {"type": Guess("linear", NO_METHOD)},
            "loss": {"type": Guess("l1", NO_METHOD)},
        }

    def remarks(self, state: dict[str, Tensor]) -> list[str]:
        """What a plain ViT is not."""
        head = any(name.startswith(CLASSIFIERS) for name in state)
        what = "with a classifier, which is left out" if head else "without a method's decoder or mask token"
        return [
            f"a plain ViT of timm {what}; its encoder is imported as `vit`, whose mask token starts at random. If it "
            "is the encoder of a method, name its layout, for example --layout mae_official"
        ]

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {ENCODER + name: tensor for name, tensor in ours(state).items()}

    def adapt(self, found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One table of biases for all blocks, and biases without that of the key, where the options say so."""
        found = with_shared_table(found, wanted)
        for name in [name for name in found if name.endswith("attn.qkv.bias")]:
            q_bias, v_bias = (name.replace("qkv.bias", f"{part}_bias") for part in "qv")
            if name not in wanted and q_bias in wanted:
                query, key, value = found[name].chunk(3)
                if not key.any():
                    del found[name]
                    found |= {q_bias: query.clone(), v_bias: value.clone()}
        return found

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        encoder = part_of(state, ENCODER)
        encoder.pop("mask_token")
        if SHARED_TABLE in encoder or f"blocks.0.{OWN_TABLE}" in encoder:
            return to_timm_beit(encoder)
        exported = renamed(encoder, ((r"\.gamma_([12])$", r".ls\1.gamma"),))
        for name in [name for name in exported if name.endswith("attn.q_bias")]:
            query, value = exported.pop(name), exported.pop(name.replace("q_bias", "v_bias"))
            exported[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
        return exported


BIASES = {"full": "qkv.bias", "qv": "q_bias"}
"""`qkv_bias` of the encoder -> the name of a bias that only this kind has."""


def ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors by the names of `vit`, without buffers that follow from the sizes."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}
    return renamed(kept, SCALES)
