"""`data.eval_source`, and the option of `folder` that earlier versions had in its place."""

from __future__ import annotations

from typing import Any

import yaml

from mim_framework.recipe.evaluations import type_of


def of_former(data: dict[str, Any]) -> dict[str, Any] | None:
    """Take `data.source.eval_root` out of a recipe; what `data.eval_source` says in its place, or None.

    None also where it was written as null, or where `data.eval_source` stands beside it, which is an error by itself.
    """
    section = data.get("data")
    source = section.get("source") if isinstance(section, dict) else None
    if not isinstance(source, dict) or type_of(source) != "folder" or "eval_root" not in source:
        return None
    if source["eval_root"] is None:
        del source["eval_root"]
        return None
    if section.get("eval_source") is not None:
        return None
    root = source.pop("eval_root")
    section["eval_source"] = {**source, "root": root}
    return section["eval_source"]


def in_one_line(source: dict[str, Any]) -> str:
    """As an override would write it."""
    return f"data.eval_source={yaml.safe_dump(source, default_flow_style=True, sort_keys=False, width=1e6).strip()}"
