"""The JSON schema of recipes, with every installed component."""

from __future__ import annotations

import json
from typing import Any

from mim_framework.contract.hooks import HOOK_OF_KIND
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """JSON schema of a recipe; every slot lists the installed components and their options. Imports all plugins."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    slots: dict[str, Any] = {}
    of_evaluations = definitions["EvaluationChoice"]["properties"]
    own_keys = {"evaluation": {name: each for name, each in of_evaluations.items() if name not in ("type", "options")}}
    for kind in HOOK_OF_KIND:
        if kind == "checkpoint_format":
            continue
        branches: list[dict[str, Any]] = []
        for name, cls in sorted(registry.classes(kind).items()):
            label = f"{kind}.{name.replace(':', '.')}"
            component = cls.Config.model_json_schema(ref_template=f"#/$defs/{label}.{{model}}")
            definitions |= {f"{label}.{inner}": value for inner, value in component.pop("$defs", {}).items()}
            help_text = (cls.__doc__ or "").partition("\n")[0]
            component |= {"title": name, "description": help_text, "required": ["type", *component.get("required", [])]}
            options = component.get("properties", {})
            own = own_keys.get(kind, {})
            component["properties"] = {"type": {"const": name}, **own, **options, **own}
            definitions[label] = component
            if component["required"] == ["type"]:
                branches.append({"const": name, "description": help_text})
            branches.append({"$ref": f"#/$defs/{label}"})
        slots[kind] = {"anyOf": branches}
    _fill_slots(schema, slots)
    evaluate = schema["properties"]["evaluate"]
    described = {each: evaluate[each] for each in ("description", "default")}
    several = {"type": "array", "items": slots["evaluation"]}
    schema["properties"]["evaluate"] = {**described, "anyOf": [several, {"type": "null"}]}
    for name in ("Choice", "EvaluationChoice", "SourceChoice"):
        definitions.pop(name, None)
    return schema


def _fill_slots(schema: Any, slots: dict[str, Any]) -> None:
    """Replace the reference to `Choice` in every property that is named after a kind of component, or of its type."""
    for node in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _fill_slots(node, slots)
    properties = schema.get("properties", {}) if isinstance(schema, dict) else {}
    named = {name: (slot, "#/$defs/Choice") for name, slot in slots.items()}
    elsewhere = dict.fromkeys(properties, (slots["source"], "#/$defs/SourceChoice"))
    for name, (slot, reference) in (elsewhere | named).items():
        field = properties.get(name)
        if field is not None and reference in json.dumps(field):
            nullable = [{"type": "null"}] if {"type": "null"} in field.get("anyOf", ()) else []
            described = {each: field[each] for each in ("description", "default") if each in field}
            properties[name] = {**described, "anyOf": [*slot["anyOf"], *nullable]}
