"""The base of every recipe section: typed, bounded, frozen, and closed to unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator

from mim_framework.base.paths import local_path, path_or_url

PathOrURL = Annotated[str, AfterValidator(path_or_url)]
"""Option: a local path or an fsspec URL."""
LocalPath = Annotated[str, AfterValidator(local_path)]
"""Option: a path on this machine."""


class Section(BaseModel):
    """One section of a recipe. The text under a field is its help; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class AliasedSection(Section):
    """A section with a key, such as `from` or `copy`, that is no good name for a field in Python."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)


class Choice(Section):
    """A component chosen by name with its options inline: `{type: random, mask_ratio: 0.75}`, or just `random`.

    `type` may be `package:name` where two installed packages offer the same name. The options are validated against the
    component's own `Config` by the registry.
    """

    kind: ClassVar[str] = ""
    """Kind of the component; empty where the key in the recipe is its name."""

    type: str = Field(min_length=1)
    """Name of the component."""
    options: dict[str, Any] = {}
    """Its options, written beside `type`."""

    @classmethod
    def own_keys(cls) -> list[str]:
        """Keys beside `type` and with it that are no options of the component."""
        return [name for name in cls.model_fields if name != "options"]

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"type": value}
        if isinstance(value, dict):
            own = {key: value[key] for key in cls.own_keys() if key in value}
            return {"type": "", **own, "options": {key: each for key, each in value.items() if key not in own}}
        return value

    @model_serializer
    def _inline_options(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in self.own_keys()}, **self.options}
