"""Features kept on the disk between evaluations, each under a hash of all that they follow from. Start at `get`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mim_framework.base.errors import DataError
from mim_framework.base.files import replacing
from mim_framework.base.text import plain_logger, without_secrets
from mim_framework.contract.components import Encoder, Source, ViewBuilder
from mim_framework.data.file_systems import RemoteSection

logger = plain_logger(__name__)

FORMAT = 1
"""Version of the files; part of every key, so that those of another version are never read."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features, of any encoders and images. It is never trimmed: delete files or the folder at any time."""

    folder: Path

    def get(self, about: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Features (n, ...) and labels (n,) of what `about` says, on the CPU; None if they are not there or damaged."""
        path = self._path(about)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                x, y = file.get_tensor("x"), file.get_tensor("y")
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning(f"--cache: {path} is damaged ({error}); its features are extracted anew")
            return None
        if facts.get("sha256") != _hash_of({"x": x, "y": y}) or facts.get("about") != _text(about):
            logger.warning(f"--cache: {path} is damaged, it is not what was written; its features are extracted anew")
            return None
        return x, y

    def put(self, about: Mapping[str, Any], x: Tensor, y: Tensor) -> None:
        """
        Raises:
            DataError: if they cannot be written.
        """
        tensors = {"x": x.cpu().contiguous(), "y": y.cpu().contiguous()}
        path = self._path(about)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(tensors, temporary, {"about": _text(about), "sha256": _hash_of(tensors)})
        except (OSError, SafetensorError) as error:
            raise DataError(f"--cache {self.folder}: cannot write {path.name}: {error}") from error

    def size(self) -> tuple[int, int]:
        """Number of files, and their bytes."""
        sizes = [path.stat().st_size for path in self.folder.glob("*.safetensors")]
        return len(sizes), sum(sizes)

    def _path(self, about: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(_text(about).encode()).hexdigest()}.safetensors"


def about_encoder(encoder: Encoder, views: ViewBuilder, device: torch.device) -> dict[str, Any]:
    """What features follow from beside the images: weights, options of the encoder and of the views, and the device."""
    return {"weights": weights_hash(encoder), "encoder": _component(encoder), **about_views(views, device)}


def about_views(views: ViewBuilder, device: torch.device) -> dict[str, Any]:
    """What pixels follow from beside the images."""
    return {"views": _component(views), "device": device.type, "format": FORMAT}


def about_source(source: Source) -> dict[str, Any]:
    """A source as far as it can be told without reading images: its options, classes and identity."""
    options = _options(source)
    return {
        "source": source.name,
        "options": {key: value for key, value in options.items() if key not in RemoteSection.model_fields},
        "classes": None if source.classes is None else list(source.classes),
        **source.identity(),
    }


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of the state of a module, in the order of names."""
    return _hash_of(dict(sorted(module.state_dict().items())))


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        if values.numel():
            found.update(values.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _component(component: Encoder | ViewBuilder) -> dict[str, Any]:
    return {"type": component.name, **_options(component)}


def _options(component: Any) -> dict[str, Any]:
    config = getattr(component, "config", None)
    options = {} if config is None else config.model_dump(mode="json")
    return {key: without_secrets(value) if isinstance(value, str) else value for key, value in options.items()}


def _text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)
