"""Plain modules and functions for methods: no config, no component. Public; imported when a name is first used."""

from __future__ import annotations

from mim_framework.base.lazy import module_of_names, on_demand

_HOME = {
    "blocks": ["Block", "NORM_EPS", "drop_path_ramp", "run_blocks"],
    "drop_path": ["DropPath", "replace_drop_path"],
    "attention": ["Attention", "attend", "check_heads", "split_heads"],
    "attentive": [
        "AIMPooling", "AttentiveHead", "CAEPooling", "EfficientPooling", "HeadName", "VJEPAPooling", "attentive_head",
    ],
    "patches": ["PatchEmbed", "normalize_patches", "patch_grid", "patchify", "shown", "sides", "unpatchify"],
    "positions": [
        "sincos_position_table", "RelativePositionBias", "relative_position_index", "relative_position_table",
        "look_up_bias",
    ],
    "masking": ["gather_tokens", "paste", "put_mask_token", "mask_from_noise", "hide_smallest", "cell_grid"],
    "init": ["FAR", "ONE_STD", "trunc_normal", "init_linear", "xavier_if_linear", "rescale_by_depth"],
    "images": ["Renormalize"],
    "codes": ["perplexity", "usage_picture"],
}  # fmt: skip
_MODULE_OF = module_of_names(_HOME)

__all__ = [*_MODULE_OF]
__getattr__ = on_demand(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted(__all__)
