"""Where the weights of DALL-E's dVAE are found in the checkpoints of other code bases."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_framework import CheckpointFormat
from mim_framework.layouts import Guess, ReadByOfficialNames, depth_of, part_of

PARTS = {"encoder": "encoder.blocks.", "decoder": "heads.main.decoder.blocks."}
SUFFIXES = {".w": ".weight", ".b": ".bias"}


class DalleCheckpoint(CheckpointFormat):
    """openai/DALL-E: the encoder's `blocks.…`, or `encoder.blocks.…` and `decoder.blocks.…` of both halves.

    The published encoder.pkl is a pickled module, which is refused. Where its code is installed, once and for all:
    `torch.save(torch.load("encoder.pkl", weights_only=False).state_dict(), "encoder.pth")`.
    """

    name = "dvae_official"
    encoders = frozenset({"dvae"})

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return "encoder.blocks.input.w" in self.halves(state)

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        state = self.halves(state)
        hidden_dim, in_chans = state["encoder.blocks.input.w"].shape[:2]
        blocks = depth_of(part_of(state, "encoder.blocks."), "group_1")
        encoder = {
            "type": "dvae",
            "vocab_size": len(state["encoder.blocks.output.conv.w"]),
            "hidden_dim": hidden_dim,
            "blocks_per_group": blocks,
        }
        decoder: dict[str, Any] = {"type": "dvae_decoder", "hidden_dim": hidden_dim, "blocks_per_group": blocks}
        if "decoder.blocks.input.w" in state:
            decoder |= {
                "hidden_dim": state["decoder.blocks.output.conv.w"].shape[1],
                "init_dim": len(state["decoder.blocks.input.w"]),
            }
        return {
            "views": {
                "type": "image",
                "img_size": Guess(112, "half of BEiT's 224"),
                "mean": [0.0] * in_chans,
                "std": [1.0] * in_chans,
            },
            "masker": {"type": "none"},
            "encoder": encoder,
            "target": {"type": "dvae_pixels"},
            "decoder": decoder,
            "loss": {"type": "dvae_elbo"},
        }

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        imported = {}
        for name, tensor in self.halves(state).items():
            part, _, inner = name.partition(".blocks.")
            if part in PARTS:
                imported[PARTS[part] + inner[:-2] + SUFFIXES.get(inner[-2:], inner[-2:])] = tensor
        return imported

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both halves, the decoder if the run has DALL-E's."""
        exported = {}
        for part, prefix in PARTS.items():
            for name, tensor in part_of(state, prefix).items():
                exported[f"{part}.blocks.{name}".replace(".weight", ".w").replace(".bias", ".b")] = tensor
        return exported

    def halves(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names with `encoder.` or `decoder.` in front, whether the file holds one half or both."""
        if "blocks.input.w" not in state:
            return state
        part = "encoder" if state["blocks.input.w"].shape[-1] == 7 else "decoder"
        return {f"{part}.{name}": tensor for name, tensor in state.items()}


class MMPretrainDalleCheckpoint(ReadByOfficialNames, DalleCheckpoint):
    """The tokenizer inside a checkpoint of mmpretrain's BEiT. Read with `--layout`, never written."""

    name = "dvae_mmpretrain"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return False  # the file is recognised as the model that it holds beside the tokenizer

    def official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return part_of(state, "target_generator.")
