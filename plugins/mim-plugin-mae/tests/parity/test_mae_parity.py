"""Our MAE against numbers that the official implementation computed (facebookresearch/mae, efb2a806, with timm 0.3.2).

Every `mae_*.safetensors` in `MIM_PARITY_DIR` is one case; by default those committed beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_mae import MAEEncoder
from mim_plugin_mae.checkpoints import OfficialCheckpoint
from parity.harness import (
    OUTPUT_TOLERANCE,
    Case,
    cases,
    check_gradients,
    check_optimizer_steps,
    check_rules,
    fine_tuning_rules,
    imported_case,
    named,
    of_committed_cases,
    read,
    read_json,
    relative,
    small_encoder,
    tokens_of,
)
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.preflight import make_step
from mim_framework.base.schedule import value_at
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Masked
from mim_framework.nn.masking import mask_from_noise
from mim_framework.nn.positions import sincos_position_table
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import OptimSection, parameter_groups

CASES = cases("mae_*.safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    config = read(request.param)[1]["config"]
    case = imported_case(
        request.param,
        tmp_path,
        our_names=OfficialCheckpoint().import_state,
        options={"encoder.num_heads": config["num_heads"], "decoder.num_heads": config["decoder_num_heads"]},
        changes={
            "masker": {"mask_ratio": config["mask_ratio"]},
            "target": {"norm_pix_loss": config["norm_pix_loss"]},
        },
    )
    masker = case.model.objective.masker
    mask = mask_from_noise(case.tensors["input/noise"], masker.num_keep, masker.spec.grid)
    step = make_step(case.model.recipe, torch.arange(config["batch_size"]))
    case.mask_with(Masked({"x": mask}, {"x": case.images}), step)
    return case


@of_committed_cases
def test_official_cases_are_committed():
    assert CASES


def test_mask_and_ids_are_exactly_the_official_ones(case: Case):
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


def test_latents_and_predictions_are_those_of_the_official_code(case: Case):
    objective = case.model.objective
    head = objective.heads["main"]
    depth = objective.encoder.spec.depth
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(head.decoder.repeated_blocks()):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({f"decoder_blocks.{i}": tokens_of(out)}))
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
    middle = named(case.tensors, "mid")
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
    from_all = head.loss(everywhere, target, case.mask, latent).loss
    assert abs(from_all.item() - loss.item()) < OUTPUT_TOLERANCE * loss.item()


def test_gradients_are_those_of_the_official_code(case: Case):
    check_gradients(case)


def test_three_optimizer_steps_end_at_the_official_weights(case: Case):
    assert not exempt_names(case.model.objective)
    check_optimizer_steps(case)


@torch.no_grad()
def test_features_for_fine_tuning_are_those_of_the_official_code(case: Case):
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


def test_the_learning_rate_of_every_iteration_is_exactly_the_official_one():
    for schedule in read_json("mae_schedule.json")["schedules"]:
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


def test_decay_groups_of_pre_training_are_exactly_the_official_ones():
    groups = read_json("mae_schedule.json")["pretrain_param_groups"]
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in groups["no_weight_decay"]}
    parameters |= {name: nn.Parameter(torch.zeros(1, 1)) for name in groups["weight_decay_keys"]}
    found = {group["decay"]: set(group["names"]) for group in parameter_groups(parameters.items())}
    assert found == {True: set(groups["weight_decay_keys"]), False: set(groups["no_weight_decay"])}


@pytest.mark.parametrize("official", read_json("mae_layer_decay.json")["cases"])
def test_layer_decay_is_exactly_the_official_one(official: dict[str, Any]):
    """Unlike pre-training, the official fine-tuning exempts the class token; its positions train, ours are fixed."""
    encoder = small_encoder(MAEEncoder, embed_dim=16, num_heads=2, depth=official["depth"])
    exempt_token = [{"parameters": ["encoder.cls_token"], "weight_decay": 0.0}]
    ours = fine_tuning_rules(encoder, official, multipliers=exempt_token)
    check_rules(ours, official, only_official={"pos_embed"})
    schedule = {"lr": 1e-3, "min_lr": 1e-6, "warmup_epochs": 1, "shape": "cosine"}
    ours = fine_tuning_rules(encoder, official, multipliers=exempt_token, **schedule)
    check_rules(ours, official, rate="lr_at_epoch_1.25", only_official={"pos_embed"})
    layers = {name: key["layer_id"] for name, key in official["keys"].items()}
    assert {name: encoder.layer_of(name) for name in layers} == layers


def test_position_table_has_the_column_in_its_first_half():
    table = sincos_position_table(8, Grid((2, 2)))
    assert table[1].tolist() == pytest.approx([0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1], abs=1e-6)
