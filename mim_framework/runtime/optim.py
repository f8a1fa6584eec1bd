"""Optimizers: which parameters they hold, which of those decay, and the learning rate at every step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from mim_framework.base.errors import did_you_mean
from mim_framework.base.schedule import Curve, Schedule, extremes
from mim_framework.base.section import Section
from mim_framework.contract.step import Step


class OptimSection(Section):
    """One optimizer with its learning rate, schedule and clipping."""

    type: str = "adamw"
    """`adamw` (torch, fused) or a name of `timm.optim.list_optimizers()`: lamb, lars, lion, muon, sgd, ... `lamb` clips
    the gradients of all its parameters to norm 1 itself: `options: {max_grad_norm: 5}` changes that, null ends it."""
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
    """Learning rate at the end; not for `constant` and `step`."""
    milestones: tuple[float, ...] = ()
    """Epochs at which a `step` schedule multiplies the rate by `gamma`."""
    gamma: float = Field(0.1, gt=0)
    """Factor at each milestone."""
    counted_from: Literal["warmup_end", "run_start"] = "warmup_end"
    """Where a cosine or line begins. From `run_start` the warm-up hides its first part, and the rate jumps down when
    the warm-up ends (timm's cosine schedule, SimMIM)."""
    warmup_inclusive: bool = False
    """The last step of the warm-up already has the full rate, and so has the next one (mmengine, BEiT)."""
    lag_steps: float = Field(0.0, ge=0)
    """Steps by which the rate trails. 1 where the official loop sets it after a step from that step's own number, so
    that the first two steps share a rate (SimMIM)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    """Decay of the moments of Adam-like optimizers; the optimizer's own by default, (0.9, 0.999) for adamw."""
    eps: float | None = Field(None, gt=0)
    """Term in the denominator of Adam-like optimizers; the optimizer's own by default, 1e-8 for adamw."""
    weight_decay: Schedule = 0.05
    """Decoupled weight decay; 1-D parameters, biases and what the components exempt do not decay."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest total gradient norm; larger gradients are scaled down."""
    parameters: tuple[str, ...] = ("*",)
    """Patterns of parameter names, for example `masker.*`. With several optimizers each parameter needs exactly one."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the optimizer's class, for example `{momentum: 0.95}` for muon."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimSection:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give the learning rate as 'lr' or as 'base_lr', one of the two")
        if self.min_lr and not _has_end(self.shape):
            raise ValueError(f"a {self.shape} schedule takes no 'min_lr', it does not move there")
        if min(extremes(self.weight_decay)) < 0:
            raise ValueError("'weight_decay' must not be negative")
        if own := sorted(self.options.keys() & {"lr", "weight_decay", "betas", "eps"}):
            raise ValueError(f"'{own[0]}' is a key of this section; write it here and not in 'options'")
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
            end=self.min_lr if _has_end(self.shape) else None,
            warmup_epochs=self.warmup_epochs,
            warmup_from=self.warmup_lr,
            milestones=self.milestones,
            gamma=self.gamma,
            counted_from=self.counted_from,
            warmup_inclusive=self.warmup_inclusive,
            lag_steps=self.lag_steps,
        )


def _has_end(shape: str) -> bool:
    return shape in ("cosine", "linear")


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
        """
        Raises:
            ValueError: if there is no such optimizer, it does not take its arguments, or there are no parameters.
        """
        if not parameters:
            raise ValueError(f"matches no trainable parameter (patterns: {', '.join(section.parameters)})")
        self.name, self.section = name, section
        self.lr_curve = section.lr_curve(total_batch_size)
        groups = parameter_groups(parameters, no_weight_decay)
        self.parameter_names = [name for group in groups for name in group["names"]]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = _create(section, groups, section.peak_lr(total_batch_size))
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
        if not gradients:  # torch would answer on the CPU
            return torch.zeros((), device=self.parameters[0].device)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.section.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.section.clip_grad_norm, norm)
        return norm

    def step(self) -> None:
        self.optimizer.step()


def _create(section: OptimSection, groups: list[dict[str, Any]], peak_lr: float) -> torch.optim.Optimizer:
    import timm.optim

    known = timm.optim.list_optimizers()
    if section.type not in known:
        some = "adamw, lamb, lars, lion, muon, sgd"
        raise ValueError(f"no optimizer type '{section.type}' (some are {some}){did_you_mean(section.type, known)}")
    info = timm.optim.get_optimizer_info(section.type)
    if info.second_order or section.type.startswith("kron"):
        raise ValueError(
            f"type '{section.type}' is not supported: it needs second derivatives or cannot be resumed exactly"
        )
    own = {name: getattr(section, name) for name in ("betas", "eps") if getattr(section, name) is not None}
    if "betas" in own and (not info.has_betas or len(own["betas"]) != info.num_betas):
        raise ValueError(
            f"'{section.type}' takes {info.num_betas if info.has_betas else 'no'} betas, got {own['betas']}"
        )
    if "eps" in own and not info.has_eps:
        raise ValueError(f"'{section.type}' takes no eps, got {own['eps']}")
    try:
        if section.type == "adamw":
            fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
            return torch.optim.AdamW(groups, lr=peak_lr, **{"fused": fused, **own, **section.options})
        return timm.optim.create_optimizer_v2(groups, opt=section.type, lr=peak_lr, **own, **section.options)
    except Exception as error:  # a class takes what arguments it likes, and may need a library or a device
        raise ValueError(f"'{section.type}' cannot be made: {type(error).__name__}: {error}") from error


def assign(
    sections: dict[str, OptimSection], parameters: list[tuple[str, nn.Parameter]]
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters of each named optimizer.

    Raises:
        ValueError: if a parameter matches no optimizer or several.
    """
    chosen: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in sections}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        owners = [
            key for key, section in sections.items() if any(fnmatch(name, pattern) for pattern in section.parameters)
        ]
        if len(owners) != 1:
            found = f"{len(owners)} optimizers ({', '.join(owners)})" if owners else "no optimizer"
            raise ValueError(f"parameter '{name}' matches {found}; give each optimizer its own 'parameters' patterns")
        chosen[owners[0]].append((name, parameter))
    return chosen
