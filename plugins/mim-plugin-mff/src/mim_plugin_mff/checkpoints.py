"""Where MFF's weights are found in checkpoints of mmpretrain."""

from __future__ import annotations

from typing import Any

from mim_plugin_mae.checkpoints import MMPretrainCheckpoint as MAECheckpoint
from torch import Tensor

from mim_framework.layouts import Guess, part_of, renamed

FUSION = "backbone.proj_"
LEVELS_OF_MODEL = {(12, 6): [0, 2, 4, 6, 8, 11]}
"""(blocks, levels) -> which blocks they are, for the published models; no tensor tells it."""


class MMPretrainCheckpoint(MAECheckpoint):
    """open-mmlab/mmpretrain's MFF: its MAE and the fusion. Position tables are taken from the file, rows first."""

    name = "mff_mmpretrain"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return {"backbone.layers.0.attn.qkv.bias", "backbone.proj_weights"} <= state.keys()

    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        slots = super().to_recipe(_without_fusion(state))
        size = (slots["encoder"]["depth"], len(state["backbone.proj_weights"]))
        layers = LEVELS_OF_MODEL.get(size)
        guess = layers and Guess(layers, f"those of the published model of {size[0]} blocks and {size[1]} levels")
        objective = {"type": "mff", "layers": guess}
        return slots | {"views": slots["views"] | {"type": "resized_crop"}, "objective": objective}

    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return part_of(state, FUSION, "fusion.proj_") | super().import_state(_without_fusion(state))


def _without_fusion(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, (), leave_out=FUSION)
