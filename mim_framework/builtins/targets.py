"""Targets that more than one method predicts: pixels, and the features of a teacher."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn.functional import layer_norm

from mim_framework.base.section import Section
from mim_framework.contract.components import Target
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Masked, Pred
from mim_framework.contract.specs import Specs, TargetSpec
from mim_framework.contract.step import Step
from mim_framework.data.companions import VIEW_OF_IDS
from mim_framework.data.labels import LABEL
from mim_framework.nn.masking import gather_tokens, paste
from mim_framework.nn.patches import normalize_patches, patch_grid, patchify, unpatchify


class PixelTarget(Target):
    """The pixels of each patch of the clean view, (row, column, channel) inside a patch (He et al. 2021)."""

    name = "pixels"

    class Config(Section):
        norm_pix_loss: bool = False
        """Normalise every patch by its own mean and standard deviation."""
        patch_size: int | None = Field(None, gt=0)
        """Side of a predicted patch in pixels; the encoder's output stride by default."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view = specs.view("x")
        self.patch_size = self.config.patch_size or specs.encoder.stride
        grid = patch_grid(view.img_size, self.patch_size)
        self.spec = TargetSpec("dense", self.patch_size**2 * view.in_chans, grid)

    def forward(self, step: Step, masked: Masked) -> Pred:
        """Values at the predicted positions only, where the mask allows it."""
        ids = masked.masks["x"].at(self.spec.grid).ids_predict
        patches = patchify(masked.clean("x"), self.patch_size)
        if ids is not None:
            patches = gather_tokens(patches, ids)
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
    """A teacher's tokens, optionally layer-normalised (EVA, I-JEPA, data2vec-style)."""

    name = "features"

    class Config(Section):
        teacher: str
        """Name of the teacher in the recipe's `teachers`."""
        normalize: bool = True
        """Layer-normalise each token without learned parameters."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        teacher = specs.teacher(self.config.teacher)
        self.view = specs.teacher_view(self.config.teacher)
        self.spec = TargetSpec("dense", teacher.dim, teacher.grid)

    def forward(self, step: Step, masked: Masked) -> Tensor:
        tokens = step.teacher(self.config.teacher, masked.clean(self.view)).tokens.float()
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
        self.view: str | None = None
        if VIEW_OF_IDS in specs.views:
            found = specs.view(VIEW_OF_IDS)
        elif name in specs.teachers:
            found = specs.teacher(name)
            self.view = specs.teacher_view(name)
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
        return {} if self.view is None else {self.config.teacher: Ask(aux=frozenset({"ids"}))}

    def forward(self, step: Step, masked: Masked) -> Tensor:
        """(B, N) int64"""
        if VIEW_OF_IDS in masked.views:
            return masked.views[VIEW_OF_IDS]
        if self.view is None:
            raise ValueError(self.lacking())
        return step.teacher(self.config.teacher, masked.clean(self.view)).aux["ids"]


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
