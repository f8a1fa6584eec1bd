"""Our MixMIM against numbers that the official implementation computed (Sense-X/MixMIM, 2b2f5a9a, with timm 0.4.12).

Every `mixmim_*.safetensors` in `MIM_PARITY_DIR` is one case; by default those committed beside this file.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_mixmim import MixEncoder, MixMasker
from mim_plugin_mixmim.checkpoints import COMPUTED, OfficialCheckpoint
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
)
from torch import Tensor, nn

from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.preflight import make_step
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent, Masked
from mim_framework.nn import hide_smallest
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

CASES = cases("mixmim_*.safetensors")


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """The official pairing, i with B - 1 - i, and the file's mask; mixed by our masker's own arithmetic."""
    config = read(request.param)[1]["config"]
    case = imported_case(
        request.param,
        tmp_path,
        our_names=OfficialCheckpoint().import_state,
        options={"decoder.num_heads": config["decoder_num_heads"]},
        changes={
            "masker": {"mask_ratio": config["mask_ratio"]},
            "target": {"norm_pix_loss": config["norm_pix_loss"]},
        },
    )
    masker = case.model.objective.masker
    assert isinstance(masker, MixMasker)
    grid, count = masker.spec.grid, config["batch_size"]
    hidden = hide_smallest(case.tensors["input/noise"][0], masker.num_hidden).expand(count, -1)
    partner = torch.arange(count).flip(0)
    mask = Mask(
        hidden, grid, predict=torch.ones_like(hidden), equal=True, shared=True,
        num_hidden=masker.num_hidden, partner=partner,
    )  # fmt: skip
    pixels = mask.at(Grid(tuple(case.images.shape[2:]))).hidden.unflatten(1, case.images.shape[2:])[:, None]
    mixed = torch.where(pixels, case.images[partner], case.images)
    step = make_step(case.model.recipe, torch.arange(count))
    case.mask_with(Masked({"x": mask}, {"x": mixed}, originals={"x": case.images}), step)
    return case


def mixed(case: Case) -> Tensor:
    return case.masked.views["x"]


def wanted_pred(case: Case) -> Tensor:
    """Of the official (2B, N, C) the half that counts: own rows where hidden, else what rode in the partner's."""
    own, riding = case.tensors["out/pred"].chunk(2)
    return torch.where(case.mask.hidden[..., None], own, riding.flip(0))


@of_committed_cases
def test_official_cases_are_committed():
    assert CASES


def test_the_mask_is_exact_on_the_first_and_the_last_grid(case: Case):
    case.mask.validate()
    first = case.model.objective.encoder.layers[0].grid
    for mask, official in ((case.mask, "out/mask"), (case.mask.at(first), "out/mask_s1")):
        assert torch.equal(mask.hidden[:1].float(), case.tensors[official][..., 0])


def test_imported_weights_are_bitwise_those_of_the_file_and_exported_ones_too(case: Case):
    state, weights = case.model.objective.state_dict(), case.group("param")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    fresh = build_model(case.model.recipe, Registry(), with_weights=False).objective.state_dict()
    for table in ("encoder.absolute_pos_embed", "heads.main.decoder.decoder_pos_embed"):
        assert torch.equal(fresh[table], weights[table])

    official, exported = named(case.tensors, "param"), OfficialCheckpoint().export_state(state)
    assert any(name.endswith(COMPUTED) for name in official)
    assert exported.keys() == official.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in official.items())


@torch.no_grad()
def test_latents_and_predictions_are_those_of_the_official_code(case: Case):
    objective = case.model.objective
    encoder, decoder = objective.encoder, objective.heads["main"].decoder
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, args, out: seen.update({name: out})

    encoder.patch_embed.register_forward_hook(keep("patch_embed"))
    decoder.decoder_embed.register_forward_hook(keep("decoder_embed"))
    for i, (stage, following) in enumerate(pairwise(encoder.layers)):
        stage.downsample.register_forward_hook(
            lambda module, args, out, i=i, following=following: seen.update(
                {f"layers.{i}": following.from_windows(out)}
            )
        )
    for i, block in enumerate(decoder.repeated_blocks()):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({f"decoder_blocks.{i}": out[:, 0]}))

    count = encoder.spec.depth
    latent = encoder(mixed(case), case.mask, Ask(layers=frozenset(range(count))))
    assert relative(latent.tokens, case.tensors["out/latent"]) < OUTPUT_TOLERANCE
    seen |= {"layers.0.blocks.0": latent.layers[0], f"layers.{len(encoder.layers) - 1}": latent.layers[count - 1]}
    pred = decoder(latent, case.mask)
    assert pred.ids is None
    assert relative(pred.values, wanted_pred(case)) < OUTPUT_TOLERANCE

    middle = named(case.tensors, "mid")
    assert middle.keys() <= seen.keys()
    last = f"decoder_blocks.{len(decoder.repeated_blocks()) - 1}"
    for name, official in middle.items():
        if name == "patch_embed":  # official: before the images are mixed
            own = ~case.mask.at(encoder.layers[0].grid).hidden[:1]
            assert relative(seen[name][:1][own], official[own]) < OUTPUT_TOLERANCE
        elif name == last:  # ours finishes one branch at each position
            own = case.mask.hidden[:1]
            assert relative(seen[name][:1][own], official[own]) < OUTPUT_TOLERANCE
        else:
            assert relative(seen[name][:1], official) < OUTPUT_TOLERANCE, name


@torch.no_grad()
def test_loss_and_target_are_those_of_the_official_code(case: Case):
    official = case.tensors["out/loss"]
    assert abs(case.loss().item() - official.item()) < OUTPUT_TOLERANCE * official.item()
    target = case.model.objective.heads["main"].target(case.step, case.masked)
    assert target.ids is None
    if "out/target" in case.tensors:
        assert relative(target.values, case.tensors["out/target"]) < OUTPUT_TOLERANCE


def test_gradients_are_those_of_the_official_code(case: Case):
    check_gradients(case)


def test_three_optimizer_steps_end_at_the_official_weights(case: Case):
    """Mask token and bias tables decay, as officially: no component exempts anything."""
    assert not exempt_names(case.model.objective)
    check_optimizer_steps(case)


@torch.no_grad()
def test_features_for_fine_tuning_are_those_of_the_official_code(case: Case):
    encoder = case.model.objective.encoder.eval()
    latent = encoder(case.images, Mask.none(len(case.images), encoder.spec.grid))
    assert relative(latent.pooled(), case.tensors["extra/finetune_pooled"]) < OUTPUT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "fault", ["norm eps 1e-6", "tanh GELU", "rows before columns", "transposed biases", "images see each other"]
)
def test_a_wrong_implementation_would_be_found(case: Case, fault: str):
    objective = case.model.objective
    encoder, mask = objective.encoder, case.mask
    for module in objective.modules():
        if fault == "norm eps 1e-6" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
        if fault == "transposed biases" and hasattr(module, "relative_position_bias_table"):
            table = module.relative_position_bias_table
            side = 2 * module.window - 1
            table.copy_(table.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1).clone())
    if fault == "rows before columns":
        encoder.absolute_pos_embed.copy_(encoder.absolute_pos_embed.roll(encoder.config.embed_dim // 2, dims=-1))
    seen = Mask.none(len(case.images), mask.grid) if fault == "images see each other" else mask
    latent: Latent = encoder(mixed(case), seen)
    pred = objective.heads["main"].decoder(latent, mask)
    assert relative(pred.values, wanted_pred(case)) > 5 * OUTPUT_TOLERANCE


@torch.no_grad()
def test_the_complementary_mask_has_the_same_loss(case: Case):
    """A property of the method: the rows of a pair exchange their parts."""
    loss = case.loss()
    mask = case.mask.complement().predicting(case.mask.predict)
    mix = mixed(case)[case.mask.partner]
    case.mask_with(Masked({"x": mask}, {"x": mix}, originals={"x": case.images}), case.step)
    assert abs(case.loss() - loss) < OUTPUT_TOLERANCE * loss


@pytest.mark.parametrize(
    "official", read_json("mixmim_layer_decay.json")["cases"], ids=lambda case: str(case["depths"])
)
def test_layer_decay_is_exactly_the_official_one(official: dict[str, Any]):
    """Officially the head is slowed once too, which a multiplier can say."""
    sizes = {"depths": official["depths"], "num_heads": (1, 2, 4, 8), "window_size": (2, 2, 2, 1)}
    encoder = small_encoder(MixEncoder, embed_dim=8, **sizes)
    slow_head = [{"parameters": ["head.*"], "lr": official["layer_decay"]}]
    check_rules(fine_tuning_rules(encoder, official, multipliers=slow_head), official)


def test_the_schedule_is_that_of_mae():
    """Files of MAE's schedule hold for both (util/lr_sched.py is the same); here that the recipe asks for it."""
    optim, mae = (load_recipe(name, [], Registry()).optim for name in ("mixmim", "mae"))
    assert optim == mae
    assert optim.peak_lr(2048) == pytest.approx(1.2e-3)
