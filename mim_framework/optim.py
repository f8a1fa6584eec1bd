"""Optimizers: which parameters they hold, which of those decay, and the learning rate at every step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from mim_framework.config import Section
from mim_framework.records import Step
from mim_framework.schedule import Curve, Schedule


class OptimSection(Section):
    """One optimizer with its learning rate, schedule and clipping."""

    type: str = "adamw"
    """`adamw` (torch, fused) or any name of `timm.optim.list_optimizers()`: lamb, lars, lion, muon, sgd, ..."""
    base_lr: float | None = Field(None, gt=0)
    """Learning rate per `lr_per_images` images of the total batch: lr = base_lr * total_batch_size / lr_per_images."""
    lr_per_images: int = Field(256, gt=0)
    """Images to which `base_lr` refers."""
    lr: float | None = Field(None, gt=0)
    """Learning rate itself, instead of `base_lr`."""
    shape: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """Form of the schedule after the warm-up."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs of linear warm-up."""
    warmup_lr: float = Field(0.0, ge=0)
    """Learning rate at step 0 when there is a warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end."""
    milestones: tuple[float, ...] = ()
    """Epochs at which a `step` schedule multiplies the rate by `gamma`."""
    gamma: float = Field(0.1, gt=0)
    """Factor at each milestone."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments of Adam-like optimizers."""
    eps: float = Field(1e-8, gt=0)
    """Term in the denominator of Adam-like optimizers."""
    weight_decay: Schedule = 0.05
    """Decoupled weight decay; 1-D parameters, biases and what the components exempt do not decay."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest total gradient norm; larger gradients are scaled down."""
    parameters: tuple[str, ...] = ("*",)
    """Patterns of parameter names, for example `masker.*`. With several optimizers each parameter needs exactly one."""
    options: dict[str, Any] = {}
    """Further keyword arguments of a timm optimizer."""

    @model_validator(mode="after")
    def _one_rate(self) -> OptimSection:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give the learning rate as 'lr' or as 'base_lr', one of the two")
        return self

    def peak_lr(self, total_batch_size: int) -> float:
        """Learning rate after the warm-up."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * total_batch_size / self.lr_per_images

    def lr_curve(self, total_batch_size: int) -> Curve:
        """The learning rate over the run."""
        return Curve(
            shape=self.shape,
            start=self.peak_lr(total_batch_size),
            end=self.min_lr,
            warmup_epochs=self.warmup_epochs,
            warmup_from=self.warmup_lr,
            milestones=self.milestones,
            gamma=self.gamma,
        )


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    no_weight_decay: Iterable[str] = (),
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups by decay and learning-rate scale, in order of first appearance.

    No decay for 1-D parameters, for names that end in `.bias` and for those listed. A group holds `params`, their
    `names`, `decay` (bool) and `lr_scale`.
    """
    exempt = set(no_weight_decay)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
        key = (decay, lr_scale(name))
        group = groups.setdefault(key, {"params": [], "names": [], "decay": decay, "lr_scale": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layer_decay_scale(layer_decay: float, layer_id: int, num_layers: int) -> float:
    """Factor on the learning rate of a layer when fine-tuning: 1 for the last layer id, `num_layers` (BEiT, MAE)."""
    return layer_decay ** (num_layers - layer_id)


def transformer_layer_id(name: str, depth: int) -> int:
    """Layer id of a ViT parameter: 0 for embeddings and tokens, i + 1 for `blocks.i`, depth + 1 for the rest (MAE)."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name.startswith(("patch_embed", "cls_token", "pos_embed", "mask_token")) else depth + 1


class Optimizer:
    """A torch optimizer that follows its recipe: sets rate and decay for a step, clips, steps."""

    def __init__(
        self,
        name: str,
        section: OptimSection,
        parameters: list[tuple[str, nn.Parameter]],
        no_weight_decay: Iterable[str],
        total_batch_size: int,
    ) -> None:
        self.name, self.section = name, section
        self.lr_curve = section.lr_curve(total_batch_size)
        groups = parameter_groups(parameters, no_weight_decay)
        self.parameter_names = [name for group in groups for name in group["names"]]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = _create(section, groups)
        self.lr = 0.0

    def schedule(self, step: Step) -> None:
        """Set the learning rate and the weight decay that are in force during this step."""
        self.lr = step.value(self.lr_curve)
        weight_decay = step.value(self.section.weight_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decay"] else 0.0

    def clip(self) -> torch.Tensor:
        """Clip the gradients if the recipe says so; returns their total norm before, a 0-dim tensor."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.section.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.section.clip_grad_norm, norm)
        return norm

    def step(self) -> None:
        self.optimizer.step()


def _create(section: OptimSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    lr = section.peak_lr(1)
    if section.type == "adamw":
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=lr, betas=section.betas, eps=section.eps, fused=fused, **section.options)
    import timm.optim

    known = timm.optim.list_optimizers()
    if section.type not in known:
        raise ValueError(f"optim.type '{section.type}' is unknown; use adamw or one of timm's: {', '.join(known)}")
    arguments: dict[str, Any] = {"opt": section.type, "lr": lr, "eps": section.eps, "betas": section.betas}
    defaults = timm.optim.get_optimizer_info(section.type)
    if not defaults.has_betas:
        arguments.pop("betas")
    if not defaults.has_eps:
        arguments.pop("eps")
    return timm.optim.create_optimizer_v2(groups, **arguments, **section.options)


def assign(
    sections: dict[str, OptimSection], parameters: list[tuple[str, nn.Parameter]]
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters of each named optimizer.

    Raises:
        ValueError: if a parameter matches no optimizer or several, or an optimizer matches no parameter.
    """
    chosen: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in sections}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        owners = [key for key, section in sections.items() if any(fnmatch(name, pattern) for pattern in section.parameters)]
        if len(owners) != 1:
            found = f"{len(owners)} optimizers ({', '.join(owners)})" if owners else "no optimizer"
            raise ValueError(f"parameter '{name}' matches {found}; give each optimizer its own 'parameters' patterns")
        chosen[owners[0]].append((name, parameter))
    for key, found in chosen.items():
        if not found:
            patterns = ", ".join(sections[key].parameters)
            raise ValueError(f"optimizer '{key}' matches no trainable parameter (patterns: {patterns})")
    return chosen
