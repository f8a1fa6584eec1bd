"""A run's classifier in timm's layout, beside its encoder. Start at `with_classifier`."""

from __future__ import annotations

import torch
from torch import Tensor

from mim_framework.builtins.classification import Classifier
from mim_framework.contract.components import Objective

VIT = "blocks.0.attn.proj.weight"
"""What timm's plain vision transformers have, and no hierarchical model."""


def classifier_of(objective: Objective) -> Classifier | None:
    """The classifier of the only head, if it has one."""
    decoders = [head.decoder for head in objective.heads.values()]
    return decoders[0] if len(decoders) == 1 and isinstance(decoders[0], Classifier) else None


def with_classifier(exported: dict[str, Tensor], classifier: Classifier) -> dict[str, Tensor]:
    """An encoder in timm's layout -> the same with `head`, and `fc_norm` in the place of `norm` where it is its own.

    A batch norm becomes part of the linear layer, with its running statistics.

    Raises:
        ValueError: if timm has no place for it.
    """
    if VIT not in exported or (classifier.config.norm == "encoder" and "norm.weight" not in exported):
        raise ValueError("timm's place for a classifier is known for vision transformers with a last norm")
    weight, bias = classifier.head.weight.detach(), classifier.head.bias.detach()
    if isinstance(norm := classifier.batch_norm, torch.nn.BatchNorm1d):
        weight = weight / (norm.running_var + norm.eps).sqrt()
        bias = bias - weight @ norm.running_mean
    found = dict(exported)
    if classifier.config.norm == "new":
        found = {name: tensor for name, tensor in exported.items() if name not in ("norm.weight", "norm.bias")}
        found |= {f"fc_norm.{name}": tensor.detach() for name, tensor in classifier.fc_norm.named_parameters()}
    return {**found, "head.weight": weight, "head.bias": bias}


def timm_options(classifier: Classifier) -> str:
    """The arguments of `timm.create_model` with which the file loads."""
    pool = "avg" if classifier.config.pool == "mean" else "token"
    own = classifier.config.norm == "new"
    return f'num_classes={classifier.head.out_features}, global_pool="{pool}", fc_norm={own}'
