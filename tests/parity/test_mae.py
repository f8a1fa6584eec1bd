"""Our MAE against numbers that the official implementation computed (facebookresearch/mae, efb2a806, with timm 0.3.2).

Every `mae_*.safetensors` in `MIM_PARITY_DIR` is one case; by default those committed beside this file.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mim_plugin_mae.checkpoints import OfficialCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mim_framework.build import Model, build_model, make_step
from mim_framework.builtins.maskers import mask_from_noise
from mim_framework.convert import import_checkpoint
from mim_framework.functional import sincos_position_table
from mim_framework.optim import Optimizer, OptimSection, layer_decay_scale, parameter_groups, transformer_layer_id
from mim_framework.plugins import Registry
from mim_framework.recipe import load_recipe
from mim_framework.records import Ask, Grid, Mask, Masked, Step
from mim_framework.schedule import Curve, value_at

FOLDER = Path(os.environ.get("MIM_PARITY_DIR", Path(__file__).parent / "data"))
CASES = sorted(FOLDER.glob("mae_*.safetensors"))

OUTPUT_TOLERANCE = 2e-6  # relative to the largest value of the tensor
GRADIENT_TOLERANCE = 1e-5  # the same
PARAMETER_TOLERANCE = 1e-5  # absolute, after 1 and 3 optimizer steps

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


class GivenMask(nn.Module):
    """In place of the masker: the mask of the case, whatever the step."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, step: Step, views: dict[str, Tensor]) -> Masked:
        return Masked({"x": self.mask}, views)


@dataclass
class Case:
    """A file of official numbers, and our model with its weights and its mask."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    model: Model
    mask: Mask
    step: Step

    @property
    def images(self) -> Tensor:
        return self.tensors["input/images"]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors `prefix/NAME` by the name they have in our model."""
        return our_names(
            {key.removeprefix(prefix + "/"): t for key, t in self.tensors.items() if key.startswith(prefix + "/")}
        )

    def loss(self) -> Tensor:
        return self.model.objective(self.step, {"x": self.images})["main"]


def our_names(values: dict[str, Any]) -> dict[str, Any]:
    return OfficialCheckpoint().import_state(values)


def official_names(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    prefix += "/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def relative(ours: Tensor, official: Tensor) -> float:
    assert ours.shape == official.shape
    return ((ours.detach() - official).abs().max() / official.abs().max()).item()


@cache
def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    parsed = {name: json.loads(metadata[name]) for name in ("config", "optimizer", "grad_l2_norms")}
    return load_file(path), metadata | parsed


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """The weights go the way of a user: an official training checkpoint, `mim import`, a recipe with `init`."""
    tensors, metadata = read(request.param)
    config = metadata["config"]
    torch.save(
        {"model": official_names(tensors, "param"), "epoch": 1, "args": Namespace(**config)}, tmp_path / "official.pth"
    )
    heads = {"encoder.num_heads": config["num_heads"], "decoder.num_heads": config["decoder_num_heads"]}
    report = import_checkpoint(tmp_path / "official.pth", tmp_path / "imported", options=heads)
    assert not report.missing
    assert not report.unexpected
    assert not report.resized

    slots = yaml.safe_load((tmp_path / "imported" / "slots.yaml").read_text())
    slots["masker"] |= {"mask_ratio": config["mask_ratio"]}
    slots["target"] |= {"norm_pix_loss": config["norm_pix_loss"]}
    rest = {
        "name": "parity",
        "data": {"source": {"type": "folder", "root": str(tmp_path)}},
        "optim": {"lr": 1e-3},
        "train": {"total_batch_size": config["batch_size"], "steps": 3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(slots | rest))
    registry = Registry()
    model = build_model(load_recipe(tmp_path / "recipe.yaml", [], registry), registry)
    masker = model.objective.masker
    mask = mask_from_noise(tensors["input/noise"], masker.num_keep, masker.spec.grid)
    model.objective.masker = GivenMask(mask)
    step = make_step(model.recipe, torch.arange(config["batch_size"]))
    return Case(tensors, metadata, model, mask, step)


def test_there_are_cases():
    assert CASES, f"no mae_*.safetensors in {FOLDER}"


def test_mask_and_ids_are_exact(case: Case):
    assert torch.equal(case.mask.hidden.float(), case.tensors["out/mask"])
    assert torch.equal(case.mask.ids_restore, case.tensors["out/ids_restore"])
    case.mask.validate()


def test_imported_weights_are_bitwise_those_of_the_file_position_tables_included(case: Case):
    state = case.model.objective.state_dict()
    weights = case.group("param")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    fresh = build_model(case.model.recipe, Registry(), with_weights=False).objective.state_dict()
    for table in ("encoder.pos_embed", "heads.main.decoder.decoder_pos_embed"):
        assert torch.equal(fresh[table], weights[table])


def test_outputs(case: Case):
    objective = case.model.objective
    head = objective.heads["main"]
    depth = objective.encoder.spec.depth
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(head.decoder.repeated_blocks()):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({f"decoder_blocks.{i}": out}))
    head.decoder.decoder_embed.register_forward_hook(lambda module, args, out: seen.update(decoder_embed=out))

    latent = objective.encoder(case.images, case.mask, Ask(layers=frozenset(range(depth))))
    assert latent.prefix is not None
    sequence = torch.cat([latent.prefix, latent.tokens], dim=1)
    assert relative(sequence, case.tensors["out/latent"]) < OUTPUT_TOLERANCE
    seen |= {f"blocks.{i}": layer for i, layer in latent.layers.items()}
    seen["patch_embed"] = objective.encoder.embed(case.images, None) - objective.encoder.pos_embed[:, 1:]

    everywhere = case.mask.predicting(torch.ones_like(case.mask.hidden))
    pred = head.decoder(latent, everywhere)
    assert pred.ids is None
    assert relative(pred.values, case.tensors["out/pred"]) < OUTPUT_TOLERANCE
    middle = official_names(case.tensors, "mid")
    assert middle.keys() <= seen.keys()
    for name, tensor in middle.items():
        assert relative(seen[name][:1], tensor) < OUTPUT_TOLERANCE, name

    target = head.target(case.step, Masked({"x": everywhere}, {"x": case.images}))
    if "out/target" in case.tensors:
        assert relative(target.values, case.tensors["out/target"]) < OUTPUT_TOLERANCE


def test_loss_and_predictions_at_hidden_positions_only_are_those_at_all(case: Case):
    objective = case.model.objective
    head = objective.heads["main"]
    official = case.tensors["out/loss"]
    loss = case.loss()
    assert abs(loss.item() - official.item()) < OUTPUT_TOLERANCE * official.item()

    latent = objective.encoder(case.images, case.mask)
    hidden_only = head.decoder(latent, case.mask)
    everywhere = head.decoder(latent, case.mask.predicting(torch.ones_like(case.mask.hidden)))
    assert hidden_only.values.shape[1] == case.mask.num_hidden
    assert relative(hidden_only.values, everywhere.at(case.mask.ids_hidden)) < OUTPUT_TOLERANCE
    target = head.target(case.step, Masked({"x": case.mask}, {"x": case.images}))
    from_all = head.loss(everywhere, target, case.mask, latent)
    assert abs(from_all.item() - loss.item()) < OUTPUT_TOLERANCE * loss.item()


def test_gradients(case: Case):
    case.loss().backward()
    ours = {name: parameter.grad for name, parameter in case.model.objective.named_parameters()}
    for name, official in case.group("grad").items():
        assert relative(ours[name], official) < GRADIENT_TOLERANCE, name
    for name, official in case.group("gradslice").items():
        assert relative(ours[name][: len(official)], official) < GRADIENT_TOLERANCE, name
    norms = our_names(case.metadata["grad_l2_norms"])
    assert ours.keys() == norms.keys()
    for name, norm in norms.items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=GRADIENT_TOLERANCE), name


def test_optimizer_steps(case: Case):
    official = case.metadata["optimizer"]
    section = OptimSection(
        lr=1e-3, shape="constant", betas=official["betas"], eps=official["eps"], weight_decay=0.05,
        clip_grad_norm=official["clip_grad_norm"],
    )  # fmt: skip
    objective = case.model.objective
    exempt = [name for part in objective.components() for name in part.no_weight_decay()]
    assert exempt == []
    optimizer = Optimizer("main", section, list(objective.named_parameters()), exempt, total_batch_size=1)
    decayed = {name for group in optimizer.optimizer.param_groups if group["decay"] for name in group["names"]}
    assert decayed == our_names(dict.fromkeys(official["groups"]["decay"])).keys()

    losses, norms = [], []
    for done in (1, 2, 3):
        loss = case.loss()
        loss.backward()
        optimizer.schedule(case.step)
        norms.append(optimizer.clip().item())
        optimizer.step()
        objective.zero_grad()
        losses.append(loss.item())
        state = objective.state_dict()
        for name, tensor in case.group(f"step{done}").items():
            assert (state[name] - tensor).abs().max() < PARAMETER_TOLERANCE, f"{name} after step {done}"
    losses.append(case.loss().item())
    assert losses == pytest.approx(case.tensors["step/losses"].tolist(), rel=1e-5)
    assert norms == pytest.approx(case.tensors["step/grad_norms"].tolist(), rel=1e-5)


@torch.no_grad()
def test_features_for_fine_tuning(case: Case):
    encoder = case.model.objective.encoder.eval()
    last = encoder.spec.depth - 1
    latent = encoder(case.images, Mask.none(len(case.images), encoder.spec.grid), Ask(layers=frozenset({last})))
    assert latent.ids is None
    pooled = latent.layers[last][:, 1:].mean(1)
    pooled = layer_norm(pooled, pooled.shape[-1:], eps=1e-6)
    assert relative(pooled, case.tensors["extra/finetune_pooled"]) < OUTPUT_TOLERANCE
    assert latent.prefix is not None
    assert relative(latent.prefix[:, 0], case.tensors["extra/finetune_cls"]) < OUTPUT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("fault", ["norm eps 1e-5", "tanh GELU", "rows before columns"])
def test_a_wrong_implementation_would_be_found(case: Case, fault: str):
    objective = case.model.objective
    for module in objective.modules():
        if fault == "norm eps 1e-5" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    if fault == "rows before columns":
        objective.encoder.pos_embed.copy_(objective.encoder.pos_embed.roll(objective.encoder.spec.dim // 2, dims=-1))
    latent = objective.encoder(case.images, case.mask)
    pred = objective.heads["main"].decoder(latent, case.mask.predicting(torch.ones_like(case.mask.hidden)))
    assert relative(pred.values, case.tensors["out/pred"]) > 5 * OUTPUT_TOLERANCE


def test_learning_rate_of_every_iteration_is_exact():
    for schedule in json.loads((FOLDER / "mae_schedule.json").read_text())["schedules"]:
        setting = schedule["setting"]
        section = OptimSection(
            base_lr=setting["blr"], warmup_epochs=setting["warmup_epochs"], min_lr=setting["min_lr"]
        )  # fmt: skip
        curve = section.lr_curve(setting["effective_batch_size"])
        per_epoch, accum = setting["iters_per_epoch"], setting["accum_iter"]
        rates = []
        for iteration in range(setting["epochs"] * per_epoch):
            index = iteration - iteration % accum  # the micro-steps of an update share the rate of its first
            epoch = (index % per_epoch) / per_epoch + index // per_epoch
            rates.append(value_at(curve, epoch, setting["epochs"]))
        assert rates == schedule["lr_per_iteration"]


def test_decay_groups_of_pre_training_are_exact():
    groups = json.loads((FOLDER / "mae_schedule.json").read_text())["pretrain_param_groups"]
    named = {name: nn.Parameter(torch.zeros(1)) for name in groups["no_weight_decay"]}
    named |= {name: nn.Parameter(torch.zeros(1, 1)) for name in groups["weight_decay_keys"]}
    found = {group["decay"]: set(group["names"]) for group in parameter_groups(named.items())}
    assert found == {True: set(groups["weight_decay_keys"]), False: set(groups["no_weight_decay"])}


@pytest.mark.parametrize("official", json.loads((FOLDER / "mae_layer_decay.json").read_text())["cases"])
def test_layer_decay_is_exact(official: dict[str, Any]):
    depth, decay = official["depth"], official["layer_decay"]
    curve = Curve(start=1e-3, end=1e-6, warmup_epochs=1)
    named = {
        name: nn.Parameter(torch.zeros(1) if name.endswith(".bias") or "norm" in name else torch.zeros(1, 1))
        for name in official["keys"]
    }
    groups = parameter_groups(
        named.items(),
        no_weight_decay=["cls_token", "pos_embed"],
        lr_scale=lambda name: layer_decay_scale(decay, transformer_layer_id(name, depth), depth + 1),
    )
    ours = {
        name: {
            "lr_scale": group["lr_scale"],
            "weight_decay": official["weight_decay"] if group["decay"] else 0.0,
            "lr_at_epoch_1.25": value_at(curve, 1.25, 4) * group["lr_scale"],
            "layer_id": transformer_layer_id(name, depth),
        }
        for group in groups
        for name in group["names"]
    }
    assert ours == official["keys"]


def test_position_table_has_the_column_in_its_first_half():
    table = sincos_position_table(8, Grid((2, 2)))
    assert table[1].tolist() == pytest.approx([0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1], abs=1e-6)
