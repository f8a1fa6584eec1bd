"""Weights of other code bases under the names of ours: what checkpoint formats share. Public.

A name is imported when it is first used.
"""

from __future__ import annotations

from mim_framework.base.lazy import module_of_names, on_demand

_HOME = {
    "names": ["INSIDE_BLOCKS", "Renames", "ReadByOfficialNames", "renamed", "part_of", "depth_of"],
    "tables": ["resize_position_table", "resize_bias_table", "unfold_to_places"],
    "guesses": ["Guess", "guessed_heads"],
    "vit": ["vit_options", "to_timm_beit", "with_shared_table"],
}
_MODULE_OF = module_of_names(_HOME)

__all__ = [*_MODULE_OF]
__getattr__ = on_demand(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted(__all__)
