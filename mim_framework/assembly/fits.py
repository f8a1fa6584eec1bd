"""Which parts of a recipe fit together: rules over what they publish."""

from __future__ import annotations

from mim_framework.contract.specs import EncoderSpec, MaskerSpec


def refusal(mask: MaskerSpec, encoder: EncoderSpec) -> str:
    """Why an encoder cannot work under the masks of a masker, or nothing."""
    accepts = encoder.accepts
    if not mask.num_hidden:
        return ""
    if mask.mixes:
        return "" if "mixed" in accepts else "the masker mixes images, which the encoder cannot tell apart"
    if not accepts & {"equal", "varies"}:
        if "mixed" in accepts:
            return "the encoder takes mixed images only, the masker leaves gaps"
        return "the encoder takes no masks; use masker 'none' or another encoder"
    if not mask.equal and "varies" not in accepts:
        return "rows that hide different numbers, the encoder needs equal ones"
    if mask.equal and "equal" not in accepts:
        return "the encoder needs rows that hide different numbers"
    return ""
