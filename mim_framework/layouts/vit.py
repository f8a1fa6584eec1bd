"""What the layouts of BEiT-like checkpoints share (`builtins/vit.py`): sizes read from tensors, names of timm."""

from __future__ import annotations

from collections.abc import Collection
from math import isqrt
from typing import Any

from torch import Tensor

from mim_framework.layouts.guesses import guessed_heads
from mim_framework.layouts.names import depth_of

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "attn.relative_position_bias_table"
HEADS_OF_WIDTH = {768: 12, 1024: 16}


def vit_options(state: dict[str, Tensor]) -> tuple[int | None, dict[str, Any]]:
    """Image size (None if no tensor tells it) and options of a `BEiTViT` for an encoder's tensors, without prefix.

    The number of heads follows from a bias table, else it is guessed; the initial layer scale is in no tensor.
    """
    patch_size, dim = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    table = state.get(SHARED_TABLE, state.get(f"blocks.0.{OWN_TABLE}"))
    positions = state.get("pos_embed")
    side = None
    if positions is not None:
        side = isqrt(positions.shape[1] - 1)
    elif table is not None:
        side = (isqrt(len(table) - 3) + 1) // 2
    options = {
        "patch_size": patch_size,
        "embed_dim": dim,
        "depth": depth_of(state),
        "num_heads": guessed_heads(HEADS_OF_WIDTH, dim) if table is None else table.shape[1],
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / dim,
        "position": "none" if positions is None else "learned",
        "relative_bias": "shared" if SHARED_TABLE in state else "none" if table is None else "per_block",
        "layer_scale": 0.1 if "blocks.0.gamma_1" in state else 0.0,
    }
    return side and side * patch_size, options


def to_timm_beit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's tensors, names without prefix -> timm's `Beit`: the shared bias table copied into every block.

    Raises:
        ValueError: if timm's model has no place for what the encoder has.
    """
    if "blocks.0.attn.qkv.bias" in state:
        raise ValueError("there the key has no bias, in this run it has one (qkv_bias: full)")
    kept = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    table = kept.pop(SHARED_TABLE, None)
    if table is not None:
        kept |= {f"blocks.{i}.{OWN_TABLE}": table.clone() for i in range(depth_of(state))}
    return kept


def with_shared_table(
    found: dict[str, Tensor], wanted: Collection[str], encoder: str = "encoder."
) -> dict[str, Tensor]:
    """One bias table in the place of those of all blocks, if the model shares one and all of them agree.

    The inverse of what `to_timm_beit` does to a shared table.
    """
    own = [name for name in found if name.endswith(OWN_TABLE)]
    if encoder + SHARED_TABLE not in wanted or not own or any(not found[name].equal(found[own[0]]) for name in own):
        return found
    kept = {name: tensor for name, tensor in found.items() if name not in own}
    return kept | {encoder + SHARED_TABLE: found[own[0]]}
