"""Our BEiT against numbers that the official implementation computed (microsoft/unilm 768a3c8, folder beit)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_beit import BEiTEncoder
from mim_plugin_beit.checkpoints import OfficialCheckpoint, our_name
from parity.harness import (
    OUTPUT_TOLERANCE,
    Case,
    cases,
    check_features_for_fine_tuning,
    check_gradients,
    check_known_decay_groups,
    check_optimizer_steps,
    check_rules,
    check_weights,
    curve_per_iteration,
    fine_tuning_rules,
    imported_case,
    named,
    of_committed_cases,
    read,
    read_json,
    relative,
    small_encoder,
    warmup_epochs,
)
from torch import nn

from mim_framework.assembly.preflight import make_step
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Masked
from mim_framework.runtime.optim import OptimSection

CASES = cases("beit_*.safetensors")
SCHEDULES = read_json("beit_schedule.json")
LAYER_DECAY = read_json("beit_layer_decay.json")

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    tensors, metadata = read(request.param)
    config = metadata["config"]
    case = imported_case(
        request.param,
        tmp_path,
        our_names=OfficialCheckpoint().import_state,
        options={"encoder.num_heads": config["num_heads"]},
        changes={
            "masker": {"num_hidden": config["num_mask_patches"], "min_num_patches": 4},
            "views": {"second_size": config["second_size"]},
        },
    )
    official = tensors["input/mask"]
    grid = Grid(tuple(official.shape[1:]))
    mask = Mask(official.flatten(1).bool(), grid, max_hidden=config["num_mask_patches"])
    mask.validate()
    views = {"x": case.images, "token_ids": tensors["input/token_ids"].flatten(1)}
    case.mask_with(Masked({"x": mask}, views), make_step(case.model.recipe, torch.arange(config["batch_size"])))
    return case


@of_committed_cases
def test_official_cases_are_committed():
    assert {path.stem for path in CASES} >= {"beit_a", "beit_b"}


def test_imported_weights_are_those_of_the_file_and_exported_again(case: Case):
    check_weights(case, OfficialCheckpoint(), computed=["relative_position_index"])


def test_latents_and_logits_are_those_of_the_official_code(case: Case):
    encoder, decoder = case.model.objective.encoder, case.model.objective.heads["main"].decoder
    latent = encoder(case.images, case.mask, Ask(layers=frozenset(range(encoder.spec.depth))))
    tokens = torch.cat([latent.prefix, latent.tokens], dim=1)
    assert relative(tokens, case.tensors["out/latent"]) < OUTPUT_TOLERANCE
    for name, official in named(case.tensors, "mid").items():
        if name.startswith("blocks."):
            assert relative(latent.layers[int(name.split(".")[1])][:1], official) < OUTPUT_TOLERANCE, name
        elif name == "rel_pos_bias":
            assert relative(encoder.rel_pos_bias()[0], official) < OUTPUT_TOLERANCE
            assert torch.equal(
                encoder.rel_pos_bias.relative_position_index,
                case.tensors["param/rel_pos_bias.relative_position_index"],
            )
    pred = decoder(latent, case.mask)
    hidden = case.mask.where.gather(1, pred.ids)
    assert not bool(hidden.all())  # rows that hide fewer are filled up
    assert relative(pred.values[hidden], case.tensors["out/logits"]) < OUTPUT_TOLERANCE
    ids = case.masked.views["token_ids"].gather(1, pred.ids)
    assert torch.equal(ids[hidden], case.tensors["out/labels"])


def test_loss_and_accuracy_are_those_of_the_official_code(case: Case):
    official = case.tensors["out/loss"].item()
    assert abs(case.loss().item() - official) < OUTPUT_TOLERANCE * official
    right = (case.tensors["out/logits"].argmax(1) == case.tensors["out/labels"]).float().mean()
    assert case.outcome().metrics["heads.main.loss/accuracy"].item() == pytest.approx(right.item())


def test_gradients_are_those_of_the_official_code(case: Case):
    check_gradients(case)


def test_three_optimizer_steps_end_at_the_official_weights(case: Case):
    check_optimizer_steps(case)


def test_features_for_fine_tuning_are_those_of_the_official_code(case: Case):
    check_features_for_fine_tuning(case)


@torch.no_grad()
@pytest.mark.parametrize("fault", ["norm eps", "tanh GELU", "mask elsewhere", "mean per image"])
def test_a_wrong_implementation_would_be_found(case: Case, fault: str):
    encoder, decoder = case.model.objective.encoder, case.model.objective.heads["main"].decoder
    for module in encoder.modules():
        if fault == "norm eps" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    mask = Mask(case.mask.hidden.roll(1, 1), case.mask.grid) if fault == "mask elsewhere" else case.mask
    latent = encoder(case.images, mask)
    if fault == "mean per image":
        logits = decoder.head(latent.tokens).transpose(1, 2)
        every = nn.functional.cross_entropy(logits, case.masked.views["token_ids"], reduction="none")
        per_image = (every * mask.hidden).sum(1) / mask.hidden.sum(1)
        official = case.tensors["out/loss"].item()
        assert abs(per_image.mean().item() - official) > 5 * OUTPUT_TOLERANCE * official
        return
    tokens = torch.cat([latent.prefix, latent.tokens], dim=1)
    assert relative(tokens, case.tensors["out/latent"]) > 5 * OUTPUT_TOLERANCE


# --- the recipe around the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SCHEDULES["schedules"])))
def test_learning_rate_and_weight_decay_of_every_iteration_are_the_official_ones(number: int):
    official = SCHEDULES["schedules"][number]
    setting = official["setting"]
    decay: Any = setting["weight_decay"]
    if setting["weight_decay_end"] is not None:
        decay = {"shape": "cosine", "from": decay, "to": setting["weight_decay_end"]}
    section = OptimSection(
        lr=setting["lr"], min_lr=setting["min_lr"], warmup_epochs=warmup_epochs(setting), warmup_lr=0.0,
        warmup_inclusive=True, weight_decay=decay,
    )  # fmt: skip
    rates = curve_per_iteration(section.lr_curve(total_batch_size=1), setting)
    assert rates == pytest.approx(official["lr_per_iteration"], rel=1e-12)
    decays = curve_per_iteration(section.weight_decay, setting)
    assert decays == pytest.approx(official["weight_decay_per_iteration"], rel=1e-12)


def test_decay_groups_of_pre_training_are_exactly_the_official_ones(case: Case):
    official = SCHEDULES["pretrain_param_groups"]["beit"]
    known = {our_name(name): True for name in official["weight_decay_keys"]}
    known |= {our_name(name): False for name in official["no_weight_decay"]}
    check_known_decay_groups(case, known, at_least=20)


@pytest.mark.parametrize("number", range(len(LAYER_DECAY["cases"])))
def test_layer_decay_is_exactly_the_official_one(number: int):
    official = LAYER_DECAY["cases"][number]
    shared, per_block = official["use_shared_rel_pos_bias"], official["use_rel_pos_bias"]
    encoder = small_encoder(
        BEiTEncoder, embed_dim=16, num_heads=2, depth=official["depth"], layer_scale=official["init_values"],
        position="learned", relative_bias="shared" if shared else "per_block" if per_block else "none",
        decay_bias_tables=not official["disable_weight_decay_on_rel_pos_bias"],
    )  # fmt: skip
    check_rules(fine_tuning_rules(encoder, official), official)
    layers = {name: key["layer_id"] for name, key in official["keys"].items()}
    assert {name: encoder.layer_of(name) for name in layers} == layers
