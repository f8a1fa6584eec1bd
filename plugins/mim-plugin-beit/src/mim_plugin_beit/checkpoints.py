"""Where BEiT's weights are found in the checkpoints of other code bases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
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
    vit_options,
    with_shared_table,
)

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
INCEPTION = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
ENCODER, HEAD = "encoder.", "heads.main.decoder.head."
MASK_RATIO = 0.3827
"""75 of 196 patches."""
PUBLISHED_MASKS = "75 of 196 patches, as in the paper"
COMPUTED = ("relative_position_index",)
"""Buffers in checkpoints that follow from the sizes."""


class OfficialCheckpoint(CheckpointFormat):
    """microsoft/unilm, folder beit (and beit2 without patch aggregation): encoder and `lm_head` of pre-training."""

    name = "beit_official"
    encoders = frozenset({"beit"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        wanted = {"mask_token", "cls_token", "blocks.0.attn.q_bias", "lm_head.weight"}
        return wanted <= state.keys() and not any(name.startswith("cls_pt_") for name in state)

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        img_size, options = vit_options(state)
        return slots(img_size, {"type": "beit", **options}, vocab_size=len(state["lm_head.weight"]))

    def told_by(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The official script counts hidden patches, and chooses between two normalisations."""
        told = super().told_by(options)
        num_hidden = options.get("num_mask_patches")
        if isinstance(num_hidden, int):
            told["masker.mask_ratio"] = partial(share_of_patches, num_hidden)
        imagenet = options.get("imagenet_default_mean_and_std")
        if isinstance(imagenet, bool):
            told["views.mean"], told["views.std"] = IMAGENET if imagenet else INCEPTION
        return told

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {our_name(name): tensor for name, tensor in state.items() if not name.endswith(COMPUTED)}

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder, and the head if the run has a linear one."""
        if "encoder.blocks.0.attn.qkv.bias" in state:
            raise ValueError("there the key has no bias, in this run it has one (qkv_bias: full)")
        return part_of(state, ENCODER) | part_of(state, HEAD, "lm_head.")


class MMPretrainCheckpoint(ReadByOfficialNames, OfficialCheckpoint):
    """open-mmlab/mmpretrain's BEiT without the tokenizer, which a layout of its own reads. Never written."""

    name = "beit_mmpretrain"
    renames = (
        (r"^head\.cls_head\.", "lm_head."),
        (r"^backbone\.ln1\.", "norm."),
        (r"^backbone\.", ""),
        (r"^layers\.", "blocks."),
        *INSIDE_BLOCKS,
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        wanted = {"backbone.mask_token", "backbone.layers.0.attn.q_bias", "head.cls_head.weight"}
        return wanted <= state.keys() and not any(name.startswith("neck.") for name in state)

    def official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(state, self.renames, leave_out="target_generator.")


class TimmCheckpoint(OfficialCheckpoint):
    """The encoder for timm's `Beit`, whose blocks each hold a bias table: the shared one is copied into all of them."""

    name = "beit_timm"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        img_size, options = vit_options(state)
        return slots(img_size, {"type": "beit", **options}, vocab_size=None)

    def adapt(self, found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_shared_table(found, wanted)

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return to_timm_beit(part_of(state, ENCODER))


def share_of_patches(num_hidden: int, slots: Mapping[str, Mapping[str, Any]]) -> float:
    """The ratio, in four digits, that hides so many patches of a view."""
    num_patches = (slots["views"]["img_size"] // slots["encoder"]["patch_size"]) ** 2
    return round(num_hidden / num_patches, 4)


def our_name(name: str) -> str:
    """Official name -> the name in our objective."""
    return HEAD + name.removeprefix("lm_head.") if name.startswith("lm_head.") else ENCODER + name


def slots(img_size: int | None, encoder: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """A recipe's slots around an encoder; `tokenizer` is for the user to add."""
    return {
        "views": {"type": "beit", "img_size": img_size},
        "masker": {"type": "block", "mask_ratio": Guess(MASK_RATIO, PUBLISHED_MASKS), "rule": "stop_short"},
        "encoder": encoder,
        "target": {"type": "token_ids", "vocab_size": vocab_size},
        "decoder": {"type": "linear", "init": "trunc_normal_one_std"},
        "loss": {"type": "cross_entropy"},
    }
