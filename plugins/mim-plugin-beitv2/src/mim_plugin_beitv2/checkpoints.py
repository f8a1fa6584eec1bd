"""Where the weights of VQ-KD and BEiT v2 are found in the checkpoints of other code bases.

mmpretrain's BEiT v2 holds the final norm in its neck and the whole tokenizer beside the model, which is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from mim_plugin_beit import checkpoints as beit
from torch import Tensor

from mim_framework import CheckpointError, CheckpointFormat
from mim_framework.layouts import INSIDE_BLOCKS, Guess, ReadByOfficialNames, part_of, renamed, vit_options

ENCODER, DECODER = "encoder.", "heads.main.decoder."
OUR_PLACES = {
    "encoder.": "encoder.vit.",
    "encode_task_layer.": "encoder.task_layer.",
    "quantize.embedding.weight": "encoder.codebook.codes",
    "quantize.embedding.initted": "encoder.codebook.initted",
    "decoder.": "heads.main.decoder.vit.",
    "decode_task_layer.": "heads.main.decoder.task_layer.",
}
"""Official prefix -> ours, of VQ-KD."""
UNUSED = ("quantize.cluster_size", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""Statistics that nothing depends on."""
DECODER_INPUT = "heads.main.decoder.vit.patch_embed"
PUBLISHED = {"type": "timm", "pretrained": True}
TEACHERS: dict[int, tuple[str, dict[str, Any]]] = {
    512: ("clip", {**PUBLISHED, "model": "vit_base_patch16_clip_quickgelu_224.openai", "project": True}),
    768: ("dino", {**PUBLISHED, "model": "vit_base_patch16_224.dino"}),
}
"""The published tokenizers' teachers by the width that the decoder predicts."""
EARLY_LAYERS = {12: 9, 24: 21}
"""Of the published models by depth; no tensor tells it."""
UNIT_TOLERANCE = 1e-2
"""How far a code's length may be from 1, in a file of half precision too."""


class OfficialVQKDCheckpoint(CheckpointFormat):
    """microsoft/unilm, folder beit2: the tokenizer, with its decoder and without its teacher."""

    name = "vqkd_official"
    encoders = frozenset({"vqkd"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return {"encoder.cls_token", "encoder.blocks.0.attn.q_bias", "quantize.embedding.weight"} <= state.keys()

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        check_codebook(state)
        img_size, options = vit_options(part_of(state, "encoder."))
        encoder = {name: options[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
        codes = state["quantize.embedding.weight"]
        decoder: dict[str, Any] = {}
        out_dim = 512  # of the recommended one, for a file without decoder
        if "decoder.cls_token" in state:
            _, options = vit_options(part_of(state, "decoder."))
            decoder = {name: options[name] for name in encoder}
            out_dim = len(state["decode_task_layer.2.weight"])
        teacher, teacher_encoder = TEACHERS.get(out_dim, ("teacher", None))
        return {
            "views": {"type": "image", "img_size": img_size, "mean": [0.0] * 3, "std": [1.0] * 3},
            "masker": {"type": "none"},
            "encoder": {
                "type": "vqkd",
                "patch_size": state["encoder.patch_embed.proj.weight"].shape[-1],
                **encoder,
                "num_codes": codes.shape[0],
                "code_dim": codes.shape[1],
            },
            "target": {"type": "features", "teacher": teacher, "normalize": False},
            "decoder": {"type": "vqkd_decoder", **decoder},
            "loss": {"type": "cosine"},
            "teachers": {teacher: teacher_encoder and {"encoder": teacher_encoder}},
        }

    def remarks(self, state: dict[str, Tensor]) -> list[str]:
        """Which published teacher a width stands for is nowhere written."""
        width = len(state["decode_task_layer.2.weight"]) if "decode_task_layer.2.weight" in state else 512
        name = TEACHERS.get(width, ("teacher",))[0]
        return [f"guess: teachers.{name}, by the {width} values that the published tokenizers of this teacher predict"]

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics, the teacher and what belongs to it are left out."""
        places = {name: our_name(name) for name in state}
        found = {ours: flat(ours, state[name]) for name, ours in places.items() if ours is not None}
        return {"encoder.codebook.initted": torch.ones(1), **found}

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """All that a strict load asks for: the decoder too, if the run has VQ-KD's, and unused statistics."""
        exported = {}
        for name, tensor in state.items():
            place = next((place for place, ours in OUR_PLACES.items() if name.startswith(ours)), None)
            if place is None:  # another decoder, or counts of unused steps
                continue
            official = place + name.removeprefix(OUR_PLACES[place])
            if name.startswith(DECODER_INPUT):
                official = official.replace("patch_embed.", "patch_embed.proj.")
                tensor = tensor[..., None, None] if tensor.ndim > 1 else tensor
            exported[official] = tensor
        codes = exported["quantize.embedding.weight"]
        nothing = codes.new_zeros(len(codes))
        return exported | dict(zip(UNUSED, (nothing, nothing.clone(), codes.clone()), strict=True))


class MMPretrainVQKDCheckpoint(ReadByOfficialNames, OfficialVQKDCheckpoint):
    """open-mmlab/mmpretrain's tokenizer, `vqkd_encoder.pth`, which has no decoder. Never written."""

    name = "vqkd_mmpretrain"
    renames = (
        (r"^encoder\.ln1\.", "encoder.fc_norm."),
        (r"^encoder\.layers\.", "encoder.blocks."),
        *INSIDE_BLOCKS,
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return {"encoder.cls_token", "encoder.layers.0.attn.q_bias", "quantize.embedding.weight"} <= state.keys()


class TimmVQKDCheckpoint(CheckpointFormat):
    """The ViT in front of the codes for timm's `VisionTransformer`, whose images are in [-1, 1]: mean and std 0.5."""

    name = "vqkd_timm"
    encoders = frozenset({"vqkd"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        raise ValueError("it is written only, without the codes; import what `mim export --to official` writes")

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        raise ValueError("it is written only, without the codes; import what `mim export --to official` writes")

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        exported = {}
        for name, tensor in part_of(state, "encoder.vit.").items():
            if name.endswith("attn.q_bias"):
                v_bias = state[f"encoder.vit.{name.replace('q_bias', 'v_bias')}"]
                exported[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros_like(tensor), v_bias])
            elif not name.endswith("attn.v_bias"):
                exported[name.replace("fc_norm.", "norm.")] = tensor
        return exported


class OfficialCheckpoint(beit.OfficialCheckpoint):
    """microsoft/unilm, folder beit2: BEiT's encoder and `lm_head`, and the blocks of patch aggregation."""

    name = "beitv2_official"
    encoders = frozenset({"beit"})
    objectives = frozenset({"beit_v2"})
    places = (
        ("cls_blocks.", "cls_pt_layers."),
        ("cls_norm.", "cls_pt_norm."),
        ("cls_decoders.main.head.", "cls_pt_lm_head."),
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        added = any(name.startswith("cls_pt_") for name in state)
        return added and super().recognises(without_aggregation(state))

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        slots = super().to_recipe(without_aggregation(state))
        img_size, depth = slots["views"]["img_size"], slots["encoder"]["depth"]
        added = {name.split(".")[1] for name in state if name.startswith("cls_pt_layers.")}
        early = EARLY_LAYERS.get(depth)
        return slots | {
            "views": {
                "type": "beit",
                "img_size": img_size,
                "second_size": img_size and img_size // slots["encoder"]["patch_size"] * 16,
                "second_interpolation": "bicubic",
                "scale": [0.2, 1.0],
            },
            "masker": {"type": "block", "mask_ratio": Guess(beit.MASK_RATIO, beit.PUBLISHED_MASKS), "rule": "exact"},
            "objective": {
                "type": "beit_v2",
                "early_layers": early and Guess(early, f"that of the published model of {depth} blocks"),
                "head_layers": len(added),
                "shared_head": "cls_pt_lm_head.weight" not in state,
            },
        }

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().import_state(without_aggregation(state))
        for ours, official in self.places:
            inside = part_of(state, official, ours)
            found |= {name: each for name, each in inside.items() if not name.endswith(beit.COMPUTED)}
        return found

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        exported = super().export_state(state)
        for ours, official in self.places:
            exported |= part_of(state, ours, official)
        return exported


class MMPretrainCheckpoint(ReadByOfficialNames, OfficialCheckpoint):
    """open-mmlab/mmpretrain's BEiT v2, without the tokenizer that its files hold too. Never written."""

    name = "beitv2_mmpretrain"
    objectives = frozenset()
    renames = (
        (r"^neck\.norm\.", "norm."),
        (r"^neck\.patch_aggregation\.", "cls_pt_layers."),
        (r"^head\.cls_head\.", "lm_head."),
        (r"^backbone\.", ""),
        (r"^layers\.", "blocks."),
        *INSIDE_BLOCKS,
    )

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return {"backbone.mask_token", "neck.patch_aggregation.0.attn.q_bias"} <= state.keys()

    def official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(state, self.renames, leave_out="target_generator.")


def our_name(name: str) -> str | None:
    """Official name of a tensor of VQ-KD -> the name in our objective, None if it has no place there."""
    place = next((place for place in OUR_PLACES if name.startswith(place)), None)
    if place is None:
        return None
    ours = OUR_PLACES[place] + name.removeprefix(place)
    return ours.replace(".proj.", ".") if ours.startswith(DECODER_INPUT) else ours


def flat(ours: str, tensor: Tensor) -> Tensor:
    """The decoder's input layer is a convolution of one pixel officially."""
    return tensor.flatten(1) if ours == f"{DECODER_INPUT}.weight" else tensor


def check_codebook(state: dict[str, Tensor]) -> None:
    """
    Raises:
        CheckpointError: if the codes have not been placed yet; official code would do that on the first images it sees.
    """
    initted = state.get("quantize.embedding.initted")
    lengths = state["quantize.embedding.weight"].float().norm(dim=-1)
    placed = initted is None or bool(initted.all())
    if not placed or not torch.allclose(lengths, torch.ones_like(lengths), rtol=0, atol=UNIT_TOLERANCE):
        what = "initted is 0" if not placed else "its rows have not the length 1"
        raise CheckpointError(
            f"the codebook quantize.embedding.weight was never trained: {what}. Official code would cluster the first "
            "batch that it sees into new codes; save the checkpoint after a training step"
        )


def without_aggregation(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, (), leave_out="cls_pt_")
