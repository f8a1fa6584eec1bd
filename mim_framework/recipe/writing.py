"""A recipe as YAML that reads back as the same recipe."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mim_framework.base.text import without_secrets
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.yaml import read_scalar


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; `load_recipe` reads the same recipe from it, but for secrets in URLs, which are left out."""
    optional = [name for name, field in Recipe.model_fields.items() if field.default is None]
    data = recipe.model_dump(mode="json", exclude={name for name in optional if getattr(recipe, name) is None})
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes what `read_scalar` would take for a number, and writes short lists in one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes Unicode's own line breaks unescaped, where a reader folds them into a space.
    text = without_secrets(text)
    plain = isinstance(read_scalar(text), str) and not re.search("[\x85\u2028\u2029]", text)
    style = None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
