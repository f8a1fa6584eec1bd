"""What every comparison with official numbers shares: reading a case, building our model of it, comparing.

A case is one safetensors file: of the folder `MIM_PARITY_DIR`, if that is set, or of those committed, which lie with
their plugins. Tolerances are stated here once; relative ones refer to the largest value of the tensor.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clean_install import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mim_framework.assembly.builder import Model, build_model, exempt_names
from mim_framework.base.schedule import Curve, epoch_of, value_at
from mim_framework.contract.components import CheckpointFormat, Encoder
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Masked, Outcome, Views
from mim_framework.contract.specs import Specs, ViewSpec
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.convert import import_checkpoint
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import Optimizer, OptimSection, layers_above, parameter_groups

COMMITTED = [
    *ROOT.glob("plugins/*/tests/parity/data"),
    *(ROOT / "tests" / room / "parity" / "data" for room in ("builtins", "evaluate")),
]
GIVEN = [Path(os.environ["MIM_PARITY_DIR"])] if os.environ.get("MIM_PARITY_DIR") else []

of_committed_cases = pytest.mark.skipif(bool(GIVEN), reason="MIM_PARITY_DIR may hold any of the cases, or none")

OUTPUT_TOLERANCE = 2e-6  # relative
GRADIENT_TOLERANCE = 1e-5  # relative
PARAMETER_TOLERANCE = 1e-5  # absolute, after 1 and 3 optimizer steps


def cases(pattern: str) -> list[Path]:
    """The files of official numbers with such a name. A test that is parametrized with none of them is skipped."""
    return sorted(path for folder in GIVEN or COMMITTED for path in folder.glob(pattern))


def relative(ours: Tensor, official: Tensor) -> float:
    assert ours.shape == official.shape
    return ((ours.detach() - official).abs().max() / official.abs().max()).item()


def tokens_of(out: Any) -> Tensor:
    """Of a block, which may hand out query, key and value beside them."""
    return out[0] if isinstance(out, tuple) else out


def named(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries `prefix/NAME` by NAME."""
    prefix += "/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@cache
def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    parsed = {name: json.loads(metadata[name]) for name in ("config", "optimizer", "grad_l2_norms")}
    return load_file(path), metadata | parsed


def read_json(name: str) -> dict[str, Any]:
    """Facts of the official code that belong to no case: of `MIM_PARITY_DIR`, or as committed if it lacks the file."""
    [file, *_] = [folder / name for folder in (*GIVEN, *COMMITTED) if (folder / name).exists()]
    return json.loads(file.read_text())


class Given(nn.Module):
    """In place of the masker: what a case was masked with, whatever the step."""

    def __init__(self, masked: Masked) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, step: Step, views: Views) -> Masked:
        return self.masked


@dataclass
class Case:
    """A file of official numbers, and our model with its weights."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    model: Model
    our_names: Callable[[dict[str, Any]], dict[str, Any]]
    """Values by official name -> by the name in our objective. Only tensors may change."""
    step: Step | None = None
    masked: Masked | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.metadata["config"]

    @property
    def images(self) -> Tensor:
        return self.tensors["input/images"]

    @property
    def mask(self) -> Mask:
        return self.masked.masks["x"]

    def mask_with(self, masked: Masked, step: Step) -> None:
        """Every step of the case sees this mask."""
        self.masked, self.step = masked, step
        self.model.objective.masker = Given(masked)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors `prefix/NAME` by the name they have in our model."""
        return self.our_names(named(self.tensors, prefix))

    def outcome(self) -> Outcome:
        return Outcome.of(self.model.objective(self.step, {"x": self.images}))

    def losses(self) -> dict[str, Tensor]:
        return self.outcome().losses

    def loss(self) -> Tensor:
        return sum(self.losses().values())


def imported_case(
    path: Path,
    tmp_path: Path,
    *,
    our_names: Callable[[dict[str, Any]], dict[str, Any]],
    options: Mapping[str, Any],
    changes: Mapping[str, Mapping[str, Any]],
    container: str = "model",
    expected_unexpected: Iterable[str] = (),
) -> Case:
    """The weights go the way of a user: an official training checkpoint, `mim import`, a recipe with `init`.

    Args:
        options: what no tensor tells, as for `import_checkpoint`.
        changes: options of slots that the case sets, by slot.
        container: the key under which the official training checkpoint holds its weights.
        expected_unexpected: names that the file holds and our model has no place for.
    """
    tensors, metadata = read(path)
    config = metadata["config"]
    torch.save({container: named(tensors, "param"), "epoch": 1, "args": Namespace(**config)}, tmp_path / "official.pth")
    report = import_checkpoint(tmp_path / "official.pth", tmp_path / "imported", options=options)
    assert not report.missing
    assert report.unexpected.keys() == set(expected_unexpected)
    assert not report.resized

    slots = yaml.safe_load((tmp_path / "imported" / "slots.yaml").read_text())
    for slot, changed in changes.items():
        slots[slot] = slots.get(slot, {}) | dict(changed)
    rest = {
        "name": "parity",
        "data": {"source": {"type": "folder", "root": str(tmp_path)}},
        "optim": {"lr": 1e-3},
        "train": {"total_batch_size": config["batch_size"], "steps": 3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(slots | rest))
    registry = Registry()
    model = build_model(load_recipe(tmp_path / "recipe.yaml", [], registry), registry)
    return Case(tensors, metadata, model, our_names)


def check_weights(case: Case, layout: CheckpointFormat, *, computed: Iterable[str] = ()) -> None:
    """Imported weights are those of the file, and go out again; `computed`: last parts of names that we leave out."""
    state, weights = case.model.objective.state_dict(), case.group("param")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    exported, official = layout.export_state(state), named(case.tensors, "param")
    assert all(torch.equal(exported[name], official[name]) for name in exported)
    assert {name.rpartition(".")[2] for name in official.keys() - exported.keys()} <= set(computed)


@torch.no_grad()
def check_features_for_fine_tuning(case: Case) -> None:
    """Class token, and the mean of patch tokens that a new norm follows, of BEiT's fine-tuning model."""
    encoder = case.model.objective.encoder.eval()
    last = encoder.spec.depth - 1
    nothing = Mask.none(len(case.images), encoder.spec.grid)
    latent = encoder(case.images, nothing, Ask(layers=frozenset({last})))
    assert relative(latent.prefix[:, 0], case.tensors["extra/finetune_cls"]) < OUTPUT_TOLERANCE
    pooled = layer_norm(latent.layers[last][:, 1:].mean(1), (encoder.spec.dim,), eps=1e-6)
    assert relative(pooled, case.tensors["extra/finetune_pooled"]) < OUTPUT_TOLERANCE


def check_known_decay_groups(case: Case, known: Mapping[str, bool], *, at_least: int) -> None:
    """Whether parameters decay, of those that our model and the official one of another size have in common."""
    objective = case.model.objective
    groups = parameter_groups(objective.named_parameters(), exempt_names(objective))
    ours = {name: group["decay"] for group in groups for name in group["names"]}
    assert ours.keys() == {name for name, _ in objective.named_parameters()}
    compared = known.keys() & ours.keys()
    assert len(compared) > at_least
    assert {name: ours[name] for name in compared} == {name: known[name] for name in compared}


class FineTuning(nn.Module):
    """An encoder with the norm and the classifier that follow it in official fine-tuning, under the names of these."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc_norm = nn.LayerNorm(encoder.spec.dim)
        self.head = nn.Linear(encoder.spec.dim, 10)


def small_encoder(cls: type[Encoder], **options: Any) -> Encoder:
    """On images of 32 pixels in patches of 4."""
    return cls(cls.Config(patch_size=4, **options), Specs(views={"x": ViewSpec("x", size=(32, 32))}))


def fine_tuning_rules(encoder: Encoder, official: Mapping[str, Any], **optim: Any) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter, at epoch 1.25 of 4; a constant rate of 1 unless told.

    By the name inside the encoder.
    """
    defaults = {"lr": 1.0, "shape": "constant"} | {key: official[key] for key in ("layer_decay", "weight_decay")}
    section, model = OptimSection(**{**defaults, **optim}), FineTuning(encoder)
    parameters, exempt = list(model.named_parameters()), exempt_names(model)
    optimizer = Optimizer("main", section, parameters, exempt, 1, layers_above(model))
    optimizer.schedule(Step(0, 1, 1.25, 4, torch.arange(1), 0, World()))
    return {
        name.removeprefix("encoder."): (group["lr"], group["weight_decay"])
        for group in optimizer.optimizer.param_groups
        for name in group["names"]
    }


def check_rules(
    ours: Mapping[str, tuple[float, float]],
    official: Mapping[str, Any],
    *,
    rate: str = "lr_scale",
    rename: Callable[[str], str] = lambda name: name,
    only_official: Collection[str] = (),
) -> None:
    """Rate and decay are those of all official `keys` but of `only_official`, which are no parameters of ours.

    Ours may have a mask token besides, and the norm of the other kind of pooling.
    """
    wanted = {rename(name): (key[rate], key["weight_decay"]) for name, key in official["keys"].items()}
    assert wanted.keys() - ours.keys() == set(only_official)
    assert {name: ours[name] for name in wanted.keys() & ours.keys()} == {
        name: wanted[name] for name in wanted.keys() & ours.keys()
    }
    assert {name.split(".")[0] for name in ours.keys() - wanted.keys()} <= {"mask_token", "norm", "fc_norm"}


def curve_per_iteration(curve: Curve | float, setting: Mapping[str, Any]) -> list[float]:
    """The values of a schedule at every iteration of a run of BEiT's official code."""
    per_epoch = setting["iters_per_epoch"]
    epochs = [epoch_of(index, per_epoch) for index in range(setting["epochs"] * per_epoch)]
    return [value_at(curve, epoch, setting["epochs"], per_epoch) for epoch in epochs]


def warmup_epochs(setting: Mapping[str, Any]) -> float:
    """`warmup_steps` replaces the epochs in BEiT's official code, if there are any."""
    if setting["warmup_epochs"] > 0 and setting["warmup_steps"] > 0:
        return setting["warmup_steps"] / setting["iters_per_epoch"]
    return setting["warmup_epochs"]


def check_gradients(case: Case) -> None:
    """Of every parameter: the gradient where the file holds it, and its norm."""
    case.loss().backward()
    ours = {name: parameter.grad for name, parameter in case.model.objective.named_parameters()}
    for name, official in case.group("grad").items():
        assert relative(ours[name], official) < GRADIENT_TOLERANCE, name
    for name, official in case.group("gradslice").items():
        assert relative(ours[name][: len(official)], official) < GRADIENT_TOLERANCE, name
    norms = case.our_names(case.metadata["grad_l2_norms"])
    assert ours.keys() == norms.keys()
    for name, norm in norms.items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=GRADIENT_TOLERANCE), name


def check_optimizer_steps(case: Case, *, weight_decay: float = 0.05) -> None:
    """Which parameters decay, three steps of the official recipe at a constant rate, losses and gradient norms."""
    official = case.metadata["optimizer"]
    section = OptimSection(
        lr=official.get("lr", 1e-3), shape="constant", betas=official["betas"], eps=official["eps"],
        weight_decay=weight_decay, clip_grad_norm=official["clip_grad_norm"],
    )  # fmt: skip
    objective = case.model.objective
    parameters = list(objective.named_parameters())
    optimizer = Optimizer("main", section, parameters, exempt_names(objective), total_batch_size=1)
    decayed = {name for group in optimizer.optimizer.param_groups if group["decay"] for name in group["names"]}
    assert decayed == case.our_names(dict.fromkeys(official["groups"]["decay"])).keys()

    losses, norms = [], []
    for done in (1, 2, 3):
        loss = case.loss()
        loss.backward()
        optimizer.schedule(case.step)
        norms.append(optimizer.clip().item())
        for component in objective.components():
            component.before_step(case.step)
        optimizer.step()
        for component in objective.components():
            component.after_step(case.step)
        objective.zero_grad()
        losses.append(loss.item())
        state = objective.state_dict()
        for name, tensor in case.group(f"step{done}").items():
            assert (state[name] - tensor).abs().max() < PARAMETER_TOLERANCE, f"{name} after step {done}"
    losses.append(case.loss().item())
    assert losses == pytest.approx(case.tensors["step/losses"].tolist(), rel=1e-5)
    assert norms == pytest.approx(case.tensors["step/grad_norms"].tolist(), rel=1e-5)
