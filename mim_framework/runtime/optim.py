"""Optimizers: which parameters they hold, which of those decay, and the learning rate at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from mim_framework.base.errors import did_you_mean
from mim_framework.base.schedule import Curve, Schedule, extremes
from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder
from mim_framework.contract.step import Step
from mim_framework.runtime.lars import LARS
from mim_framework.runtime.sharding import local, whole


class MultiplierSection(Section):
    """Factors on the learning rate and the weight decay of some parameters."""

    parameters: tuple[str, ...] = Field(min_length=1)
    """Patterns of parameter names, for example `encoder.*.bias`; each must match one of this optimizer's."""
    lr: float = Field(1.0, ge=0)
    """Factor on the learning rate."""
    weight_decay: float = Field(1.0, ge=0)
    """Factor on the weight decay; what is exempt from decay stays so."""


class OptimSection(Section):
    """One optimizer with its learning rate, schedule and clipping."""

    type: str = "adamw"
    """`adamw` (torch, fused), `lars_mocov3` (that of official linear probes: no trust ratio and no decay of biases), or
    a name of `timm.optim.list_optimizers()`: lamb, lars, lion, muon, sgd, ... `lamb` clips the gradients of all its
    parameters to norm 1 itself: `options: {max_grad_norm: 5}` changes that, null ends it."""
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
    per_epoch: bool = False
    """The rate at the start of an epoch is that of all its steps (linear probes of DINO and BEiT)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    """Decay of the moments of Adam-like optimizers; the optimizer's own by default, (0.9, 0.999) for adamw."""
    eps: float | None = Field(None, gt=0)
    """Term in the denominator of Adam-like optimizers; the optimizer's own by default, 1e-8 for adamw."""
    weight_decay: Schedule = 0.05
    """Decoupled weight decay; 1-D parameters, biases and what the components exempt do not decay."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor on the learning rate from one layer of the encoder to the one before it, for fine-tuning: a parameter of
    layer i of n (`Encoder.layer_of`) has the rate times layer_decay ** (n - 1 - i), what is no encoder has 1."""
    layer_decay_of: Literal["rate", "peak"] = "rate"
    """What `layer_decay` and the factors of `multipliers` scale: the rate of every step, so that `min_lr` is scaled too
    (MAE, BEiT), or only the peak, so that the warm-up begins and the run ends at one rate for all (SimMIM)."""
    multipliers: tuple[MultiplierSection, ...] = ()
    """Factors for parameters by name, for example `[{parameters: ["*.bias"], lr: 2.0, weight_decay: 0.0}]`. All that
    match a parameter are multiplied, also with `layer_decay`; their order does not matter."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest total gradient norm; larger gradients are scaled down."""
    clip_grad_norm_per_parameter: float | None = Field(None, gt=0)
    """Largest gradient norm of a single parameter: each is scaled down by itself (DINO, iBOT)."""
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
        if self.clip_grad_norm is not None and self.clip_grad_norm_per_parameter is not None:
            raise ValueError(
                "'clip_grad_norm' and 'clip_grad_norm_per_parameter' exclude each other; keep the second if the "
                "official code clips every parameter by itself (DINO, iBOT), else the first"
            )
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
            per_epoch=self.per_epoch,
        )

    def factors(self, name: str, layers_above: int = 0) -> tuple[float, float]:
        """Factors on the learning rate and on the weight decay of a parameter below so many layers of its encoder."""
        matching = [each for each in self.multipliers if _matches(name, each.parameters)]
        lr = prod(each.lr for each in matching)
        if self.layer_decay is not None:
            lr *= self.layer_decay**layers_above
        return float(lr), float(prod(each.weight_decay for each in matching))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _has_end(shape: str) -> bool:
    return shape in ("cosine", "linear")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    no_weight_decay: Iterable[str] = (),
    factors: Callable[[str], tuple[float, float]] = lambda name: (1.0, 1.0),
) -> list[dict[str, Any]]:
    """Optimizer groups by the factors on learning rate and weight decay, in order of first appearance.

    No decay for 1-D parameters, for names that end in `.bias` and for those listed. A group holds `params`, their
    `names`, `lr_scale`, `decay_scale`, and `decay` (bool).
    """
    exempt = set(no_weight_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        lr_scale, decay_scale = factors(name)
        if parameter.ndim <= 1 or name.endswith(".bias") or name in exempt:
            decay_scale = 0.0
        scales = {"lr_scale": lr_scale, "decay_scale": decay_scale, "decay": decay_scale > 0}
        group = groups.setdefault((lr_scale, decay_scale), {"params": [], "names": [], **scales})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layers_above(objective: nn.Module) -> dict[str, int]:
    """How many layers of its encoder stand above each trainable parameter of one, by the parameter's full name.

    An encoder speaks for all modules inside it, others included.

    Raises:
        ValueError: if an encoder names no blocks, or answers with a layer that it does not have.
    """
    above: dict[str, int] = {}
    for path, encoder in objective.named_modules():
        if not isinstance(encoder, Encoder):
            continue
        trainable = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        num_layers = encoder.num_layers
        if trainable and num_layers <= 2:
            raise ValueError(f"layer_decay: encoder '{encoder.name}' has no layers, it names no `repeated_blocks`")
        for name in trainable:
            layer = encoder.layer_of(name)
            if not 0 <= layer < num_layers:
                text = f"layer_of('{name}') is {layer}, of {num_layers} layers"
                raise ValueError(f"layer_decay: encoder '{encoder.name}' answers that {text}")
            above.setdefault(f"{path}.{name}" if path else name, num_layers - 1 - layer)
    return above


class Optimizer:
    """A torch optimizer that follows its recipe: sets rate and decay for a step, clips, steps."""

    def __init__(
        self,
        name: str,
        section: OptimSection,
        parameters: list[tuple[str, nn.Parameter]],
        no_weight_decay: Iterable[str],
        total_batch_size: int,
        layers_above: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            layers_above: what the function of that name gives; needed with `layer_decay`.

        Raises:
            ValueError: if there is no such optimizer, it does not take its arguments, there are no parameters, or an
                option concerns none of them.
        """
        if not parameters:
            raise ValueError(f"matches no trainable parameter (patterns: {', '.join(section.parameters)})")
        above = layers_above or {}
        _check_reach(section, [name for name, parameter in parameters if parameter.requires_grad], above)
        self.name, self.section = name, section
        self.lr_curve = section.lr_curve(total_batch_size)
        factors = lambda name: section.factors(name, above.get(name, 0))  # noqa: E731
        groups = parameter_groups(parameters, no_weight_decay, factors)
        self.parameter_names = [name for group in groups for name in group["names"]]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = _create(section, groups, section.peak_lr(total_batch_size))
        self.lr = 0.0

    def schedule(self, step: Step) -> None:
        """Set the learning rate and the weight decay that are in force during this step."""
        self.lr = step.value(self.lr_curve)
        weight_decay = step.value(self.section.weight_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr_of(step, group["lr_scale"])
            group["weight_decay"] = weight_decay * group["decay_scale"]

    def _lr_of(self, step: Step, scale: float) -> float:
        if self.section.layer_decay_of == "rate":
            return self.lr * scale
        return step.value(self.lr_curve.model_copy(update={"start": self.lr_curve.start * scale}))

    def clip(self) -> torch.Tensor:
        """Clip the gradients if the recipe says so; returns their total norm before, a 0-dim tensor."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not gradients:  # torch would answer on the CPU
            return torch.zeros((), device=self.parameters[0].device)
        norm = _norm(gradients)
        if self.section.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.section.clip_grad_norm, norm)
        if self.section.clip_grad_norm_per_parameter is not None:
            _clip_each(gradients, self.section.clip_grad_norm_per_parameter)
        return norm

    def step(self) -> None:
        self.optimizer.step()


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The common norm of gradients that may be sharded, whole on every rank."""
    return whole(torch.nn.utils.get_total_norm(gradients))


def _clip_each(gradients: list[torch.Tensor], max_norm: float) -> None:
    """As DINO's `clip_gradients`, without waiting for the device: a factor of 1 changes no bit."""
    for gradient in gradients:
        local(gradient).mul_((max_norm / (_norm([gradient]) + 1e-6)).clamp(max=1.0))


def _check_reach(section: OptimSection, names: list[str], layers_above: Mapping[str, int]) -> None:
    """
    Raises:
        ValueError: if an option concerns no parameter.
    """
    if section.layer_decay is not None and layers_above.keys().isdisjoint(names):
        raise ValueError(f"layer_decay {section.layer_decay:g} concerns no parameter: none belongs to an encoder")
    for number, multiplier in enumerate(section.multipliers):
        for pattern in multiplier.parameters:
            if not any(fnmatch(name, pattern) for name in names):
                near = did_you_mean(pattern, names) or f", the first are {', '.join(names[:3])}"
                raise ValueError(f"multipliers.{number}: pattern '{pattern}' matches no parameter{near}")


def _create(section: OptimSection, groups: list[dict[str, Any]], peak_lr: float) -> torch.optim.Optimizer:
    import timm.optim

    if section.type == "lars_mocov3":
        return _lars(section, groups, peak_lr)
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


def _lars(section: OptimSection, groups: list[dict[str, Any]], peak_lr: float) -> LARS:
    for name in ("betas", "eps"):
        if getattr(section, name) is not None:
            raise ValueError(f"'lars_mocov3' takes no {name}, got {getattr(section, name)}")
    try:
        return LARS(groups, lr=peak_lr, **section.options)
    except TypeError as error:
        raise ValueError(f"'lars_mocov3' cannot be made: {error}") from error


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
        owners = [key for key, section in sections.items() if _matches(name, section.parameters)]
        if len(owners) != 1:
            found = f"{len(owners)} optimizers ({', '.join(owners)})" if owners else "no optimizer"
            raise ValueError(f"parameter '{name}' matches {found}; give each optimizer its own 'parameters' patterns")
        chosen[owners[0]].append((name, parameter))
    return chosen
