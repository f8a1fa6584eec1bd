"""What comparisons of training protocols with official numbers share: `eval-linprobe_*` and `eval-finetune*`.

A case drives the objective, the optimizer and the mixing of a recipe, as the trainer does it, on given images, boxes
and shares. The weights are those of the file under our names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity.harness import named, relative
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.assembly.preflight import make_step
from mim_framework.base.section import Section
from mim_framework.contract.components import Objective, Source
from mim_framework.contract.records import Sample
from mim_framework.contract.step import Step
from mim_framework.data.labels import LABEL
from mim_framework.data.mixing import Mix, MixOfEach, smoothed
from mim_framework.evaluate.accuracy import hits
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

OUTPUT, FEATURES, GRADIENT, STEP, MIXED = 1e-5, 5e-6, 2e-5, 1e-5, 1e-6
"""The tolerances of README-evaluation.md: relative but for the last two."""


class Classes(Source):
    """A source of which only the number of classes is asked."""

    name = "classes"

    def __init__(self, number: int) -> None:
        super().__init__(Section())
        self.classes = [str(each) for each in range(number)]

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Sample:
        raise NotImplementedError


@cache
def read_protocol(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its metadata, of which those that are JSON are parsed."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), {key: json.loads(text) if text[:1] in "{[" else text for key, text in metadata.items()}


@dataclass
class Protocol:
    """A file of official numbers, and our model with its weights.

    `our_name`: official name of a parameter or statistic -> that in our objective, None for what we do not have.
    `shape`: changes the layout of an official tensor, by its official name, into ours.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    recipe: Recipe
    objective: Objective
    our_name: Callable[[str], str | None]
    batches: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return self.metadata["config"]

    @property
    def accum_steps(self) -> int:
        config = self.config
        return config.get("accum_iter") or config.get("update_freq") or config.get("accumulation_steps") or 1

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors `prefix/NAME` by the name they have in our model."""
        named_ours = {self.our_name(name): tensor for name, tensor in named(self.tensors, prefix).items()}
        return {name: tensor for name, tensor in named_ours.items() if name is not None}

    def excluded(self) -> dict[str, slice]:
        """Rows of our parameters whose true gradient is zero."""
        ranges = self.metadata.get("exclude", {})
        return {self.our_name(name): slice(*rows) for name, rows in ranges.items()}

    def compared(self, name: str, ours: Tensor, official: Tensor) -> tuple[Tensor, Tensor]:
        """Both without the rows that are excluded."""
        rows = self.excluded().get(name)
        if rows is None:
            return ours, official
        kept = torch.ones(len(ours), dtype=torch.bool)
        kept[rows] = False
        return ours[kept], official[kept]


def built(
    path: Path, tmp_path: Path, slots: Mapping[str, Any], our_name: Callable[[str], str | None], **optim: Any
) -> Protocol:
    """A case with the model of a recipe of these slots, and its weights in it; its optimizer's section is `optim`."""
    tensors, metadata = read_protocol(path)
    config = metadata["config"]
    rest = {
        "name": "protocol",
        "data": {"source": "digits"},
        "masker": "none",
        "objective": "classify",
        **({} if "heads" in slots else {"target": "labels"}),
        "optim": {**{key: config[key] for key in ("lr", "min_lr", "warmup_epochs") if key in config}, **optim},
        "train": {"total_batch_size": 2, "epochs": config["epochs"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**rest, **slots}))
    registry = Registry()
    recipe = load_recipe(tmp_path / "recipe.yaml", [], registry)
    model = build_model(recipe, registry, source=Classes(config["num_classes"]))
    case = Protocol(path, tensors, metadata, recipe, model.objective, our_name)
    state, weights = model.objective.state_dict(), case.group("param")
    assert weights.keys() <= state.keys()
    lacking = state.keys() - weights.keys()
    assert not [name for name, p in model.objective.named_parameters() if name in lacking and p.requires_grad]
    model.objective.load_state_dict(weights, strict=False)
    return case


def mixed(case: Protocol, number: int) -> tuple[Tensor, Tensor]:
    """Images and targets of a micro-batch as our mixing makes them of the official draw, in the official order.

    Our partners are neighbours, the official ones are as far from the end as an image is from the start.
    """
    images, labels = case.tensors["input/images"][number], case.tensors["input/labels"][number].long()
    config = case.config
    if "mix/lam" not in case.tensors:
        return images, labels
    batch = len(images)
    order = torch.tensor([each for pair in zip(range(batch // 2), range(batch - 1, -1, -1), strict=False)
                          for each in pair])  # fmt: skip
    draws = [
        Mix(share, (top, bottom), (left, right)) if cut else Mix(share)
        for share, cut, (top, bottom, left, right) in zip(
            case.tensors["mix/lam"][number].tolist(), case.tensors["mix/use_cutmix"][number].tolist(),
            case.tensors["mix/box"][number].tolist(), strict=True,
        )
    ]  # fmt: skip
    size = images.shape[-2:]
    mix = draws[0] if len(draws) == 1 else MixOfEach.of([draws[each] for each in order.tolist()], *size)
    back = order.argsort()
    ours = mix.images(images[order])[back]
    targets = mix.labels(labels[order], config["num_classes"], config["smoothing"])[back]
    return ours, targets


def targets_of(case: Protocol, labels: Tensor) -> Tensor:
    """Labels of an unmixed micro-batch with the smoothing of the views, if there is any."""
    smoothing = case.config.get("smoothing", 0.0)
    return smoothed(labels, case.config["num_classes"], smoothing) if labels.ndim == 1 and smoothing else labels


def check_mixing(case: Protocol) -> None:
    """Images and targets that our mixing makes are the official ones."""
    for number in range(len(case.tensors["mix/lam"])):
        images, targets = mixed(case, number)
        assert (images - case.tensors["mix/images"][number]).abs().max() <= MIXED
        assert (targets - case.tensors["mix/targets"][number]).abs().max() <= MIXED


def step_at(case: Protocol, index: int, steps_per_epoch: int, positions: int) -> Step:
    """An optimizer step of the official loop, counted from the start of the case."""
    config = case.config
    epoch = config.get("start_epoch", 0) + index / steps_per_epoch
    return make_step(
        case.recipe, torch.arange(positions), index=index, epoch=epoch, epochs=float(config["epochs"]),
        steps_per_epoch=steps_per_epoch,
    )  # fmt: skip


def run_protocol(case: Protocol, steps_per_epoch: int) -> dict[str, Any]:
    """All optimizer steps of a case, compared on the way; returns what was measured."""
    objective, accum = case.objective.train(), case.accum_steps
    [optimizer] = build_optimizers(case.recipe, objective, 1).values()
    [head] = objective.heads.values()
    seen: dict[str, Tensor] = {}
    head.decoder.head.register_forward_hook(lambda module, inputs, out: seen.update(features=inputs[0], logits=out))
    count = len(case.tensors["input/images"])
    found: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
    for index in range(count // accum):
        for number in range(index * accum, (index + 1) * accum):
            images, labels = mixed(case, number)
            step = step_at(case, index, steps_per_epoch, len(images))
            outcome = objective(step, {"x": images, LABEL: targets_of(case, labels)})
            loss = sum(outcome.losses.values())
            (loss / accum).backward()
            found["losses"].append(loss.item())
            if number == 0 and "out/features_first" in case.tensors:
                assert relative(seen["features"], case.tensors["out/features_first"]) < FEATURES
            assert relative(seen["logits"], case.tensors["out/logits"][number]) < OUTPUT, number
        if index == 0:
            check_first_gradients(case)
        optimizer.schedule(step)
        found["rates"].append(
            {n: g["lr"] for g in optimizer.optimizer.param_groups for n in g["names"]}
        )  # fmt: skip
        found["norms"].append(optimizer.clip().item())
        optimizer.step()
        for component in objective.components():
            component.after_step(step)
        objective.zero_grad()
        check_state(case, index + 1)
    return found


def check_first_gradients(case: Protocol) -> None:
    """Of the first step, before clipping."""
    ours = {name: parameter.grad for name, parameter in case.objective.named_parameters()}
    for name, official in {**case.group("grad"), **case.group("grad1")}.items():
        a, b = case.compared(name, ours[name], official)
        assert relative(a, b) < GRADIENT, name


def check_state(case: Protocol, done: int, absolute: Mapping[str, float] = {}) -> None:
    """Parameters and statistics after a step, where the file has them."""
    state = case.objective.state_dict()
    for name, official in case.group(f"step{done}").items():
        a, b = case.compared(name, state[name], official)
        if "running_" in name:
            assert relative(a, b) < OUTPUT, name
        else:
            limit = next((value for part, value in absolute.items() if part in name), STEP)
            assert (a - b).abs().max() <= limit, f"{name} after step {done}"


def check_rates(case: Protocol, rates: list[dict[str, float]]) -> None:
    """The rate of every parameter at every step is the official one, to the last bits of float64."""
    for ours, official in zip(rates, case.metadata["lr_per_step"], strict=True):
        wanted = {case.our_name(name): rate for name, rate in official.items()}
        assert wanted.keys() == ours.keys()
        assert ours == pytest.approx(wanted, rel=1e-12, abs=0)


def check_groups(case: Protocol) -> None:
    """Which parameters decay, and the scale of each one's rate."""
    [optimizer] = build_optimizers(case.recipe, case.objective, 1).values()
    ours = {n: (g["lr_scale"], g["decay"]) for g in optimizer.optimizer.param_groups for n in g["names"]}
    wanted = {
        case.our_name(name): (group["lr_scale"], group["weight_decay"] > 0)
        for group in case.metadata["param_groups"]
        for name in group["names"]
    }
    assert ours.keys() == wanted.keys()
    assert {name: decay for name, (_, decay) in ours.items()} == {name: decay for name, (_, decay) in wanted.items()}
    assert {name: scale for name, (scale, _) in ours.items()} == pytest.approx(
        {name: scale for name, (scale, _) in wanted.items()}, rel=1e-12
    )


@torch.no_grad()
def check_evaluation(case: Protocol) -> None:
    """Logits in evaluation mode after the last step, and the numbers of `accuracy` from them."""
    logits = case.objective.eval().logits({"x": case.tensors["input/eval_images"]})
    check_numbers(case, logits)


def check_numbers(case: Protocol, logits: Tensor) -> None:
    """Evaluation logits, and loss, top-1 and top-5 of them."""
    official, labels = case.metadata["eval"], case.tensors["input/eval_labels"].long()
    assert relative(logits, case.tensors["out/eval_logits"]) < OUTPUT
    assert cross_entropy(logits, labels).item() == pytest.approx(official["loss"], rel=OUTPUT)
    for k in (1, 5):
        assert 100 * hits(logits, labels, k).float().mean().item() == pytest.approx(official[f"acc{k}"], abs=1e-4)
