"""What a checkpoint of a run holds, to and from whole CPU tensors, whatever the number of ranks and the sharding.

Groups: `model` (names of the objective), `teachers`, `optimizer.NAME` (parameter name | state key), and `log`, what
components count since the last line of the log.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import Checkpoint
from mim_framework.contract.components import Component
from mim_framework.contract.world import World
from mim_framework.runtime.optim import Optimizer
from mim_framework.runtime.sharding import gather_full, like


def gather(
    objective: nn.Module, teachers: nn.Module, optimizers: dict[str, Optimizer], world: World
) -> dict[str, dict[str, Tensor]]:
    """All groups, whole, on rank 0. Every rank must call it."""
    groups = {
        "model": gather_full(objective.state_dict(), world),
        "teachers": gather_full(teachers.state_dict(), world),
        "log": gather_full(_counted_for_the_log(objective), world),
    }
    for name, optimizer in optimizers.items():
        groups[f"optimizer.{name}"] = gather_full(_optimizer_tensors(optimizer), world)
    return {name: tensors for name, tensors in groups.items() if tensors}


def restore(
    checkpoint: Checkpoint, objective: nn.Module, teachers: nn.Module, optimizers: dict[str, Optimizer]
) -> None:
    """The inverse, on every rank, for modules that are already wrapped or sharded.

    Raises:
        CheckpointError: if the checkpoint does not fit the model.
    """
    _restore_module(objective, checkpoint.tensors("model"), f"{checkpoint.path}: model")
    if teachers.state_dict():
        _restore_module(teachers, checkpoint.tensors("teachers"), f"{checkpoint.path}: teachers")
    for name, optimizer in optimizers.items():
        _restore_optimizer(optimizer, checkpoint.tensors(f"optimizer.{name}"))
    counted = checkpoint.tensors("log")
    for name, buffer in _counted_for_the_log(objective).items():
        if name in counted and counted[name].shape == buffer.shape:  # earlier versions have not kept them
            buffer.copy_(counted[name])


def _counted_for_the_log(objective: nn.Module) -> dict[str, Tensor]:
    """What components count since the last line of the log, by place."""
    return {
        f"{place}.{name}" if place else name: module.get_buffer(name)
        for place, module in objective.named_modules()
        if isinstance(module, Component)
        for name in module.counted_for_the_log
    }


def _restore_module(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    own = module.state_dict()
    if own.keys() != tensors.keys():
        differing = sorted(own.keys() ^ tensors.keys())
        raise CheckpointError(f"{where}: {len(differing)} names differ from the recipe's model, first '{differing[0]}'")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{where}: '{name}' is {tuple(tensor.shape)}, the recipe needs {tuple(own[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(like(tensor, tensors[name]))


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.optimizer.state
    return {
        f"{name}|{key}": value
        for name, parameter in zip(optimizer.parameter_names, optimizer.parameters, strict=True)
        for key, value in state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


_SET_BY_RECIPE = {
    *("lr", "weight_decay", "lr_scale", "decay_scale", "decay"),
    *("foreach", "fused", "capturable", "differentiable", "maximize"),
}
"""Entries of a parameter group that follow from the recipe, the step or the device."""


def scalars(optimizers: dict[str, Optimizer]) -> dict[str, int | float]:
    """Numbers that some optimizers keep besides tensors, by parameter or by group, for the checkpoint's JSON.

    Raises:
        CheckpointError: if an optimizer keeps something else, without which it could not be resumed.
    """
    found: dict[str, int | float] = {}
    for key, optimizer in optimizers.items():
        for name, parameter in zip(optimizer.parameter_names, optimizer.parameters, strict=True):
            for entry, value in optimizer.optimizer.state.get(parameter, {}).items():
                if isinstance(value, int | float):
                    found[f"{key}|{name}|{entry}"] = value
                elif value is not None and not isinstance(value, Tensor):
                    what = f"keeps '{entry}' as {type(value).__name__}, which cannot be saved"
                    raise CheckpointError(f"optimizer '{optimizer.section.type}' {what}")
        for number, group in enumerate(optimizer.optimizer.param_groups):
            for entry, value in group.items():
                if isinstance(value, Tensor) and value.ndim == 0:
                    value = value.item()
                if isinstance(value, int | float) and entry not in _SET_BY_RECIPE:
                    found[f"{key}|{_group(number)}|{entry}"] = value
    return found


_LIKE_THE_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"}
"""Entries of an optimizer's state that have the shape of their parameter; others may be factored."""


def restore_scalars(optimizers: dict[str, Optimizer], values: dict[str, int | float]) -> None:
    """Inverse of `scalars`; after `restore`.

    Raises:
        CheckpointError: if they belong to a parameter that the recipe's optimizer does not hold.
    """
    for path, value in values.items():
        key, _, rest = path.partition("|")
        name, _, entry = rest.partition("|")
        if key not in optimizers:
            raise CheckpointError(f"state of optimizer '{key}', which the recipe does not have")
        optimizer = optimizers[key]
        places: dict[str, dict[str, Any]] = {
            _group(number): group for number, group in enumerate(optimizer.optimizer.param_groups)
        }
        if name not in places and name not in optimizer.parameter_names:
            raise CheckpointError(f"optimizer state of '{name}', which the recipe's optimizer '{key}' does not hold")
        if name not in places:
            places[name] = optimizer.optimizer.state[optimizer.parameters[optimizer.parameter_names.index(name)]]
        places[name][entry] = value
    for optimizer in optimizers.values():  # makes tensors again of the numbers that it keeps as tensors
        optimizer.optimizer.load_state_dict(optimizer.optimizer.state_dict())


def _group(number: int) -> str:
    return f"group {number}"


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Through the optimizer's own `load_state_dict`, which knows on which device each entry belongs."""
    state: dict[int, dict[str, Tensor]] = {}
    number = {name: index for index, name in enumerate(optimizer.parameter_names)}
    for path, tensor in tensors.items():
        name, _, key = path.partition("|")
        if name not in number:
            text = f"optimizer state of '{name}', which the recipe's optimizer '{optimizer.name}' does not hold"
            raise CheckpointError(text)
        parameter = optimizer.parameters[number[name]]
        fits = tensor.shape == parameter.shape
        if key in _LIKE_THE_PARAMETER and tensor.ndim and not fits:
            sides = f"is {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}"
            raise CheckpointError(f"optimizer '{optimizer.name}': '{key}' of '{name}' {sides}")
        state.setdefault(number[name], {})[key] = like(parameter, tensor) if fits and tensor.ndim else tensor
    groups = optimizer.optimizer.state_dict()["param_groups"]
    optimizer.optimizer.load_state_dict({"state": state, "param_groups": groups})
