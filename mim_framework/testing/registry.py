"""Components of a test beside those of installed plugins."""

from __future__ import annotations

from typing import Any

from mim_framework.registry.registry import Registry


class RegistryWith(Registry):
    """The installed plugins and more classes, as if a plugin registered them; these win over their namesakes."""

    def __init__(self, *classes: type[Any]) -> None:
        super().__init__()
        self.extra = {(cls.kind, cls.name): cls for cls in classes}

    def find(self, kind: str, name: str) -> type[Any]:
        return self.extra.get((kind, name)) or super().find(kind, name)
