"""Encoders from timm, unmasked: students of distillation, and above all frozen teachers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from pydantic import Field
from timm.models import group_parameters
from torch import Tensor, nn

from mim_framework.base.section import LocalPath, Section
from mim_framework.checkpoints.checkpoint import load_weights
from mim_framework.contract.components import Encoder
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec, Specs
from mim_framework.nn.drop_path import replace_drop_path

CLASSIFIER = "classifier of the recipe"
"""A name that no timm model knows."""


class TimmEncoder(Encoder):
    """Any timm model with a single-stride feature map, by name; it sees the whole image.

    A frozen one with published weights gets its images in the normalisation that timm states for these.
    """

    name = "timm"

    class Config(Section):
        model: str
        """A name that `timm.create_model` knows, for example `vit_base_patch16_224`."""
        pretrained: bool = False
        """Load timm's published weights (needs the internet or a filled cache)."""
        checkpoint: LocalPath | None = None
        """A local `.safetensors` file with weights under timm's names, instead of `pretrained`."""
        project: bool = False
        """Map the tokens by the weight of the model's last linear layer: those of CLIP into the space it shares with
        texts."""
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth."""
        view: str = "x"
        """The view it sees."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view = specs.view(self.config.view)
        if not timm.is_model(self.config.model):
            close = timm.list_models(f"*{self.config.model.split('_')[0]}*")[:5]
            raise ValueError(f"timm knows no model '{self.config.model}'; for example {', '.join(close)}")
        if self.config.pretrained and self.config.checkpoint is not None:
            raise ValueError(f"pretrained=true and checkpoint={self.config.checkpoint} exclude each other")
        self.img_size, self.in_chans = view.img_size, view.in_chans
        self._take(self._create(pretrained=False))
        stride = self.model.feature_info[-1]["reduction"]
        grid = Grid(tuple(size // stride for size in view.img_size))
        self.num_prefix_tokens = getattr(self.model, "num_prefix_tokens", 0)
        published = self.model.pretrained_cfg if self.config.pretrained or self.config.checkpoint else {}
        mean, std = (tuple(published[key]) if published.get(key) else None for key in ("mean", "std"))
        self.spec = EncoderSpec(
            dim=self.model.num_features if self.projection is None else self.projection.out_features,
            grid=grid,
            stride=stride,
            depth=len(getattr(self.model, "blocks", ())),
            num_heads=0,
            num_prefix_tokens=self.num_prefix_tokens,
            in_chans=view.in_chans,
            accepts=frozenset({"none"}),
            mean=mean if mean is not None and len(mean) == view.in_chans else None,
            std=std if std is not None and len(std) == view.in_chans else None,
        )

    @property
    def has_weights(self) -> bool:
        return self.config.pretrained or self.config.checkpoint is not None

    def load_published(self) -> None:
        """Weights of timm, or of the file in `checkpoint`.

        Raises:
            ValueError: if they cannot be had, or do not fit.
        """
        if not self.has_weights:
            return
        with torch.random.fork_rng(devices=[]):  # a model is drawn first, which is nobody else's business
            model = self._create(pretrained=self.config.pretrained)
        if self.config.checkpoint is not None:
            self._read(Path(self.config.checkpoint), model)
        self._take(model)

    def _create(self, *, pretrained: bool) -> nn.Module:
        options: dict[str, Any] = {"pretrained": pretrained, "in_chans": self.in_chans}
        if not self.config.project:
            options["num_classes"] = 0
        if self.config.drop_path_rate:
            options["drop_path_rate"] = self.config.drop_path_rate
        try:
            try:  # vision transformers take the image size, convolutional networks do not
                return timm.create_model(self.config.model, img_size=self.img_size, **options)
            except TypeError:
                return timm.create_model(self.config.model, **options)
        except Exception as error:  # of whichever library downloads
            if not pretrained:
                raise
            raise ValueError(
                f"timm cannot load the weights of '{self.config.model}' ({type(error).__name__}: {error}); "
                "fill its cache where there is internet and set HF_HOME to it, or use pretrained=false"
            ) from error

    def _take(self, model: nn.Module) -> None:
        """Keep a model, and of its last layer the weight alone if the tokens are to be projected."""
        replace_drop_path(model)
        self.model, self.projection, self._layers = model, None, None
        if not self.config.project:
            return
        head = model.get_classifier()
        if not isinstance(head, nn.Linear) or not isinstance(getattr(model, "fc_norm", None), nn.Identity):
            raise ValueError(
                f"project=true needs a vision transformer whose tokens enter a linear layer as they are, such as "
                f"vit_base_patch16_clip_quickgelu_224; '{self.config.model}' is none"
            )
        self.projection = nn.Linear(head.in_features, head.out_features, bias=False)
        self.projection.weight = head.weight
        model.reset_classifier(0)

    def _read(self, path: Path, model: nn.Module) -> None:
        if path.suffix != ".safetensors" or not path.is_file():
            what = "does not exist" if not path.is_file() else "is no .safetensors file, and nothing else is read"
            raise ValueError(f"checkpoint {path} {what}; save timm's state dict by safetensors.torch.save_file")
        own, found = model.state_dict(), load_weights(path)
        head = model.pretrained_cfg.get("classifier") or "head"
        found = {name: tensor for name, tensor in found.items() if name in own or not name.startswith(f"{head}.")}
        wrong = [name for name in sorted(own.keys() | found.keys()) if _shape(own, name) != _shape(found, name)]
        if wrong:
            some = ", ".join(f"{name} {_shape(found, name)}, needed {_shape(own, name)}" for name in wrong[:3])
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"checkpoint {path} does not fit timm's '{self.config.model}': {some}{more}")
        model.load_state_dict(found)

    def no_weight_decay(self) -> list[str]:
        """What timm exempts."""
        named = getattr(self.model, "no_weight_decay", tuple)()
        return [f"model.{name}" for name in named]

    @property
    def num_layers(self) -> int:
        """As many as timm tells apart in the model with its classifier: for a vision transformer, its depth + 2."""
        return 1 + self._timm_layers()[CLASSIFIER]

    def layer_of(self, name: str) -> int:
        """timm's own layers, by the model's `group_matcher`; a projection is in the last, as a classifier is."""
        layers = self._timm_layers()
        return layers.get(name.removeprefix("model."), layers[CLASSIFIER])

    def _timm_layers(self) -> dict[str, int]:
        """The layer of every parameter by timm's name, and of a classifier, which the model itself lacks."""
        if self._layers is None:  # asked for once per parameter
            named = [*self.model.named_parameters(), (CLASSIFIER, None)]
            whole = SimpleNamespace(named_parameters=lambda: named)
            self._layers = group_parameters(whole, self.model.group_matcher(coarse=False), reverse=True)
        return self._layers

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        features = self.model.forward_features(view)
        if self.projection is not None:
            features = self.projection(features)
        prefix = None
        if features.ndim == 3:
            tokens = features[:, self.num_prefix_tokens :]
            prefix = features[:, : self.num_prefix_tokens] if self.num_prefix_tokens else None
        else:
            channels_last = features.shape[-1] == self.spec.dim and features.shape[1] != self.spec.dim
            tokens = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        if tokens.shape[1] != self.spec.grid.num_patches:
            raise ValueError(self._no_grid(tokens.shape[1]))
        return Latent(tokens, self.spec.grid, prefix=prefix)

    def _no_grid(self, num_tokens: int) -> str:
        size, stride = ("x".join(map(str, sizes)) for sizes in (self.img_size, self.spec.stride))
        divided = all(pixels % side == 0 for pixels, side in zip(self.img_size, self.spec.stride, strict=True))
        why = "it lays them out in a way of its own" if divided else "another size may do"
        return (
            f"timm's '{self.config.model}' gives {num_tokens} tokens of an image of {size} pixels, which are no grid "
            f"of {self.spec.grid} tokens of {stride} pixels; {why}"
        )


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
