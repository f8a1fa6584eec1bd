"""Our MFF against numbers that the official implementation computed (open-mmlab/mmpretrain, ee7f2e88).

Every `mff_*.safetensors` in `MIM_PARITY_DIR` is one case; by default those committed beside this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mim_plugin_mff import MMPretrainCheckpoint
from parity.harness import (
    OUTPUT_TOLERANCE,
    Case,
    cases,
    check_gradients,
    check_optimizer_steps,
    imported_case,
    named,
    of_committed_cases,
    read,
    read_json,
    relative,
    tokens_of,
)
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.preflight import make_step
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent, Masked
from mim_framework.nn.masking import mask_from_noise
from mim_framework.nn.positions import sincos_position_table
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import OptimSection, parameter_groups

CASES = cases("mff_*.safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    config = read(request.param)[1]["config"]
    case = imported_case(
        request.param,
        tmp_path,
        our_names=MMPretrainCheckpoint().import_state,
        options={
            "encoder.num_heads": config["num_heads"],
            "decoder.num_heads": config["decoder_num_heads"],
            "objective.layers": config["out_indices"],
        },
        changes={
            "masker": {"mask_ratio": config["mask_ratio"]},
            "target": {"norm_pix_loss": config["norm_pix"]},
        },
        container="state_dict",
    )
    masker = case.model.objective.masker
    mask = mask_from_noise(case.tensors["input/noise"], masker.num_keep, masker.spec.grid)
    step = make_step(case.model.recipe, torch.arange(config["batch_size"]))
    case.mask_with(Masked({"x": mask}, {"x": case.images}), step)
    return case


def sequence(latent: Latent) -> Tensor:
    assert latent.prefix is not None
    return torch.cat([latent.prefix, latent.tokens], dim=1)


def everywhere(case: Case) -> Mask:
    return case.mask.predicting(torch.ones_like(case.mask.hidden))


@of_committed_cases
def test_official_cases_are_committed():
    assert CASES


def test_mask_and_ids_are_exactly_the_official_ones(case: Case):
    assert torch.equal(case.mask.hidden.float(), case.tensors["out/mask"])
    assert torch.equal(case.mask.ids_restore, case.tensors["out/ids_restore"])


def test_imported_weights_are_bitwise_those_of_the_file(case: Case):
    state = case.model.objective.state_dict()
    weights = case.group("param")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_the_position_tables_of_the_file_are_ours_with_rows_first(case: Case):
    weights, grid = case.group("param"), case.model.specs.encoder.grid
    fresh = build_model(case.model.recipe, Registry(), with_weights=False).objective.state_dict()
    for name in ("encoder.pos_embed", "heads.main.decoder.decoder_pos_embed"):
        table = sincos_position_table(weights[name].shape[-1], grid, row_first=True)
        assert torch.allclose(weights[name][0, 1:], table, atol=1e-6), name
        assert not torch.allclose(weights[name], fresh[name], atol=0.1), name


def test_fused_layers_and_predictions_are_those_of_the_official_code(case: Case):
    objective = case.model.objective
    head, blocks = objective.heads["main"], objective.encoder.spec.depth
    assert list(objective.layers) == case.config["out_indices"]
    assert relative(objective.fusion.weights(), case.tensors["out/fusion_weights"]) < OUTPUT_TOLERANCE
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(head.decoder.repeated_blocks()):
        name = f"neck.decoder_blocks.{i}"
        block.register_forward_hook(lambda module, args, out, name=name: seen.update({name: tokens_of(out)}))
    head.decoder.decoder_embed.register_forward_hook(lambda module, args, out: seen.update({"neck.decoder_embed": out}))

    layers = objective.encoder(case.images, case.mask, Ask(layers=frozenset(range(blocks)))).layers
    seen |= {f"backbone.layers.{i}": layer for i, layer in layers.items()}
    seen |= {
        f"backbone.proj_layers.{level}": projection(layers[objective.layers[level]])
        for level, projection in enumerate(objective.fusion.proj_layers)
    }
    seen["backbone.patch_embed"] = objective.encoder.embed(case.images, None) - objective.encoder.pos_embed[:, 1:]
    latent = objective.encode(Masked({"x": case.mask}, {"x": case.images}))
    assert latent.ids is case.mask.ids_keep
    assert relative(sequence(latent), case.tensors["out/latent"]) < OUTPUT_TOLERANCE

    pred = head.decoder(latent, everywhere(case))
    assert relative(pred.values, case.tensors["out/pred"]) < OUTPUT_TOLERANCE
    middle = named(case.tensors, "mid")
    assert middle.keys() <= seen.keys()
    for name, tensor in middle.items():
        assert relative(seen[name][:1], tensor) < OUTPUT_TOLERANCE, name

    if "out/target" in case.tensors:
        target = head.target(case.step, Masked({"x": everywhere(case)}, {"x": case.images}))
        assert relative(target.values, case.tensors["out/target"]) < OUTPUT_TOLERANCE


def test_the_loss_is_that_of_the_official_code(case: Case):
    official = case.tensors["out/loss"].item()
    assert case.loss().item() == pytest.approx(official, rel=OUTPUT_TOLERANCE)


def test_gradients_are_those_of_the_official_code(case: Case):
    check_gradients(case)


def test_three_optimizer_steps_end_at_the_official_weights(case: Case):
    tokens = {"encoder.cls_token", "heads.main.decoder.mask_token"}
    assert exempt_names(case.model.objective) == tokens
    check_optimizer_steps(case)


@torch.no_grad()
def test_features_for_fine_tuning_are_those_of_the_last_block_without_the_fusion(case: Case):
    encoder = case.model.objective.encoder.eval()
    last = encoder.spec.depth - 1
    latent = encoder(case.images, Mask.none(len(case.images), encoder.spec.grid), Ask(layers=frozenset({last})))
    pooled = latent.layers[last][:, 1:].mean(1)
    pooled = layer_norm(pooled, pooled.shape[-1:], eps=1e-6)
    assert relative(pooled, case.tensors["extra/finetune_pooled"]) < OUTPUT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "fault", ["norm eps 1e-5", "tanh GELU", "equal weights", "levels exchanged", "norm before the sum", "no fusion"]
)
def test_a_wrong_implementation_would_be_found(case: Case, fault: str):
    objective = case.model.objective
    for module in objective.modules():
        if fault == "norm eps 1e-5" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    fusion = objective.fusion
    if fault == "equal weights":
        fusion.proj_weights.fill_(1)
    if fault == "levels exchanged":
        fusion.proj_layers = nn.ModuleList(reversed(fusion.proj_layers))
    latent = objective.encode(Masked({"x": case.mask}, {"x": case.images}))
    if fault == "no fusion":
        latent = objective.encoder(case.images, case.mask)
    if fault == "norm before the sum":
        normed = [objective.encoder.final_norm(latent.layers[i]) for i in objective.layers]
        prefix, tokens = fusion(normed).split([1, latent.tokens.shape[1]], dim=1)
        latent = Latent(tokens, latent.grid, latent.ids, prefix)
    assert relative(sequence(latent), case.tensors["out/latent"]) > 5 * OUTPUT_TOLERANCE


def test_the_learning_rate_of_every_iteration_is_exactly_the_official_one():
    for schedule in read_json("mff_schedule.json")["schedules"]:
        setting = schedule["setting"]
        section = OptimSection(
            lr=setting["lr"], warmup_epochs=setting["warmup_epochs"], warmup_inclusive=True,
            warmup_lr=setting["start_factor"] * setting["lr"], min_lr=setting["eta_min"],
        )  # fmt: skip
        curve, per_epoch = section.lr_curve(256), setting["iters_per_epoch"]
        ours = [
            value_at(curve, epoch_of(index, per_epoch), setting["epochs"], per_epoch)
            for index in range(setting["epochs"] * per_epoch)
        ]
        assert ours == pytest.approx(schedule["lr_per_iteration"], rel=1e-12)


def test_weight_decay_groups_are_exactly_the_official_ones(case: Case):
    """For the model of the schedule file: three blocks, fused from three levels, one block in the decoder."""
    official = read_json("mff_schedule.json")["pretrain_param_groups"]
    recipe = case.model.recipe
    size = {"depth": 3, "embed_dim": 24, "num_heads": 2}
    decoder = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    changed = recipe.model_copy(
        update={
            "encoder": recipe.encoder.model_copy(update={"options": recipe.encoder.options | size}),
            "decoder": recipe.decoder.model_copy(update={"options": recipe.decoder.options | decoder}),
            "objective": recipe.objective.model_copy(update={"options": {"layers": [0, 1, 2]}}),
        }
    )
    objective = build_model(changed, Registry(), with_weights=False).objective
    groups = parameter_groups(objective.named_parameters(), exempt_names(objective))
    ours = {group["decay"]: set(group["names"]) for group in groups}
    rename = MMPretrainCheckpoint().import_state
    assert ours[True] == rename(dict.fromkeys(official["weight_decay_keys"])).keys()
    assert ours[False] == rename(dict.fromkeys(official["no_weight_decay"])).keys()
    assert rename(dict.fromkeys(official["fixed"])).keys() == dict(objective.named_buffers()).keys()
