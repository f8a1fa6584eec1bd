"""Targets that more than one method predicts: pixels, and the features of a teacher."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import layer_norm

from mim_framework.base.section import Section
from mim_framework.builtins.vit import PatchSize
from mim_framework.contract.components import Target
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Masked, Pred
from mim_framework.contract.specs import Specs, TargetSpec
from mim_framework.contract.step import Step
from mim_framework.data.companions import VIEW_OF_IDS
from mim_framework.data.labels import LABEL
from mim_framework.nn.masking import gather_tokens, paste
from mim_framework.nn.patches import normalize_patches, patch_grid, patchify, sides, unpatchify


class PixelTarget(Target):
    """The pixels of each patch of the clean view, (row, column, channel) inside a patch (He et al. 2021)."""

    name = "pixels"

    class Config(Section):
        norm_pix_loss: bool = False
        """Normalise every patch by its own mean and standard deviation."""
        patch_size: PatchSize | None = None
        """Side of a predicted patch in pixels, or one for each axis; the encoder's output stride by default."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view = specs.view(self.view)
        grid = patch_grid(view.img_size, self.config.patch_size or specs.encoder.stride)
        self.patch_size = sides(self.config.patch_size or specs.encoder.stride, len(grid.shape))
        layout = (*self.patch_size, view.in_chans)
        self.spec = TargetSpec("dense", prod(layout), grid, layout)

    def forward(self, step: Step, masked: Masked) -> Pred:
        """Values at the predicted positions only, where the mask allows it."""
        mask = masked.masks[self.view].at(self.spec.grid)
        ids, patches = mask.ids_predict, patchify(masked.clean(self.view), self.patch_size)
        patches = mask.per_set(patches) if ids is None else gather_tokens(patches, ids)
        return Pred(normalize_patches(patches)[0] if self.config.norm_pix_loss else patches, self.spec.grid, ids)

    def reconstruct(self, pred: Pred, mask: Mask, view: Tensor) -> Tensor:
        """(B, C, H, W): predicted patches, de-normalised by each true patch, pasted over the visible image."""
        mask = mask.at(self.spec.grid)
        patches = patchify(view, self.patch_size)
        true = patches if pred.ids is None else gather_tokens(patches, pred.ids)
        values = pred.values.to(patches.dtype)
        if self.config.norm_pix_loss:
            _, mean, std = normalize_patches(true)
            values = values * std + mean
        return unpatchify(paste(values, pred.ids, patches, mask), self.patch_size, self.spec.grid)


class FeatureTarget(Target):
    """A teacher's tokens, of its last layer or of others, optionally layer-normalised (EVA, I-JEPA, data2vec)."""

    name = "features"

    class Config(Section):
        teacher: str
        """Name of the teacher in the recipe's `teachers`."""
        normalize: bool = True
        """Layer-normalise each token without learned parameters."""
        layers: tuple[int, ...] = ()
        """Blocks whose output is taken, from 0, or negative from the end; none for what the teacher ends with."""
        average: bool = True
        """The mean of several layers, each normalised by itself if `normalize` (data2vec); false puts their channels
        side by side."""
        pool: Literal["none", "mean", "cls"] = "none"
        """One vector of the whole image instead: the mean of its tokens, or the class token."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c, teacher = self.config, specs.teacher(self.config.teacher)
        self.seen = specs.teacher_view(c.teacher)
        self.layers = tuple(teacher.depth + i if i < 0 else i for i in c.layers)
        if c.pool == "cls" and not teacher.num_prefix_tokens:
            raise ValueError(
                f"target 'features': pool=cls, but teacher '{c.teacher}' has no class token; use pool=mean"
            )
        shapes = {teacher.layers.get(i, (teacher.dim, teacher.grid)) for i in self.layers}
        if len(shapes) > 1:
            raise ValueError(f"target 'features': the layers {list(c.layers)} of '{c.teacher}' differ in width or grid")
        dim, grid = shapes.pop() if shapes else (teacher.dim, teacher.grid)
        width = dim if c.average or not self.layers else dim * len(self.layers)
        self.spec = TargetSpec("dense", width, grid if c.pool == "none" else Grid(()))

    def teacher_asks(self) -> dict[str, Ask]:
        return {self.config.teacher: Ask(layers=frozenset(self.layers))} if self.layers else {}

    def forward(self, step: Step, masked: Masked) -> Tensor:
        """(B, N, dim), or (B, 1, dim) of whole images."""
        latent = step.teacher(self.config.teacher, masked.clean(self.seen))
        if not self.layers:
            return self.finished(latent.tokens, latent.prefix)
        num_prefix_tokens = 0 if latent.prefix is None else latent.prefix.shape[1]
        found = [latent.layers[i] for i in self.layers]
        parts = [self.finished(x[:, num_prefix_tokens:], x[:, :num_prefix_tokens]) for x in found]
        return torch.stack(parts).mean(0) if self.config.average else torch.cat(parts, dim=-1)

    def finished(self, tokens: Tensor, prefix: Tensor | None) -> Tensor:
        """One layer's tokens (B, N, D) and prefix (B, P, D), pooled and normalised, in float32."""
        pool = self.config.pool
        if pool != "none":
            tokens = prefix[:, :1] if pool == "cls" else tokens.mean(1, keepdim=True)
        tokens = tokens.float()
        return layer_norm(tokens, tokens.shape[-1:]) if self.config.normalize else tokens


class TokenTarget(Target):
    """Token ids of a frozen tokenizer (BEiT, BEiT v2): computed in every step, or those that `mim tokenize` wrote."""

    name = "token_ids"

    class Config(Section):
        teacher: str = "tokenizer"
        """Name of the tokenizer in the recipe's `teachers`; that of the recipe's key `tokenizer` by default."""
        vocab_size: int | None = Field(None, gt=0)
        """Number of classes that the tokenizer must have, as `mim import` writes it for a model; null for any."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        name, vocab_size = self.config.teacher, self.config.vocab_size
        self.seen: str | None = None
        if VIEW_OF_IDS in specs.views:
            found = specs.view(VIEW_OF_IDS)
        elif name in specs.teachers:
            found = specs.teacher(name)
            self.seen = specs.teacher_view(name)
        elif vocab_size is not None:  # enough to build the model around it
            self.spec = TargetSpec("ids", vocab_size, specs.encoder.grid)
            return
        else:
            raise ValueError(self.lacking())
        if found.num_classes is None or found.grid is None:
            raise ValueError(f"target 'token_ids': teacher '{name}' is no tokenizer, its encoder gives no ids")
        if vocab_size not in (None, found.num_classes):
            raise ValueError(
                f"target 'token_ids': the tokenizer has {found.num_classes} classes, vocab_size says {vocab_size}"
            )
        self.spec = TargetSpec("ids", found.num_classes, found.grid)

    def lacking(self) -> str:
        """What to do about a tokenizer that is not there."""
        return (
            f"target 'token_ids' needs a teacher '{self.config.teacher}': give tokenizer=RUN, a run that trained one "
            "or a folder that `mim import` wrote; or data.tokens=FOLDER, which `mim tokenize` wrote"
        )

    def teacher_asks(self) -> dict[str, Ask]:
        return {} if self.seen is None else {self.config.teacher: Ask(aux=frozenset({"ids"}))}

    def forward(self, step: Step, masked: Masked) -> Tensor:
        """(B, N) int64"""
        if VIEW_OF_IDS in masked.views:
            return masked.views[VIEW_OF_IDS]
        if self.seen is None:
            raise ValueError(self.lacking())
        return step.teacher(self.config.teacher, masked.clean(self.seen)).aux["ids"]


class LabelTarget(Target):
    """The class of each image, or the probabilities of all classes where the views mix labels or smooth them."""

    name = "labels"
    needs_labels = True

    class Config(Section):
        num_classes: int | None = Field(None, gt=0)
        """Number of classes that the source must have; null for any. Needed only to build a model without its data."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        labels, wanted = specs.view(LABEL), self.config.num_classes
        num_classes = labels.num_classes or wanted
        if num_classes is None:
            raise ValueError("target 'labels': data.source is not there to tell its classes; give target.num_classes")
        if wanted not in (None, num_classes):
            raise ValueError(f"target 'labels': data.source has {num_classes} classes, num_classes says {wanted}")
        self.spec = TargetSpec("probs" if labels.shape else "ids", num_classes, Grid(()))

    def forward(self, step: Step, masked: Masked) -> Tensor:
        """(B, 1) int64 or (B, 1, num_classes) float32"""
        if LABEL not in masked.views:
            raise ValueError(f"the batch has no view '{LABEL}'; `prepare` of the views must hand on what it mixes")
        return masked.views[LABEL].unsqueeze(1)
