"""Our BEiT v2 against numbers that the official implementation computed (microsoft/unilm 768a3c8, folder beit2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mim_plugin_beitv2.checkpoints import OfficialCheckpoint
from parity.harness import (
    OUTPUT_TOLERANCE,
    Case,
    cases,
    check_features_for_fine_tuning,
    check_gradients,
    check_known_decay_groups,
    check_optimizer_steps,
    check_weights,
    curve_per_iteration,
    imported_case,
    named,
    of_committed_cases,
    read,
    read_json,
    relative,
    warmup_epochs,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Latent, Masked
from mim_framework.convert import import_checkpoint
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import OptimSection

CASES = cases("beitv2_*.safetensors")
SCHEDULES = read_json("beit_schedule.json")

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


class BEiTv2Case(Case):
    def latents(self) -> tuple[Latent, Latent]:
        """Of the encoder, and of the blocks after it."""
        latent = self.model.objective.encode(Masked({"x": self.mask}, {"x": self.images}))
        return latent, self.model.objective.aggregate(latent)

    def logits(self, latent: Latent, stream: str) -> Tensor:
        """At the masked positions in raster order, which may be another order than ours."""
        objective = self.model.objective
        own = stream == "main_cls" and not objective.config.shared_head
        pred = (objective.cls_decoders["main"] if own else objective.heads["main"].decoder)(latent, self.mask)
        everywhere = torch.zeros(len(self.images), self.mask.grid.num_patches, pred.values.shape[-1])
        everywhere.scatter_(1, pred.ids[..., None].expand_as(pred.values), pred.values.detach())
        return everywhere[self.mask.hidden]


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> BEiTv2Case:
    tensors, metadata = read(request.param)
    config = metadata["config"]
    case = imported_case(
        request.param,
        tmp_path,
        our_names=OfficialCheckpoint().import_state,
        options={"encoder.num_heads": config["num_heads"], "objective.early_layers": config["early_layers"]},
        changes={"masker": {"num_hidden": config["num_mask_patches"], "min_num_patches": 4}},
        container="module",  # some published files are DeepSpeed's
    )
    case = BEiTv2Case(**vars(case))
    official = tensors["input/mask"]
    mask = Mask(official.flatten(1).bool(), Grid(tuple(official.shape[1:])), equal=True)
    mask.validate()
    assert mask.num_hidden == case.model.objective.masker.spec.num_hidden
    views = {"x": case.images, "token_ids": tensors["input/token_ids"].flatten(1)}
    case.mask_with(Masked({"x": mask}, views), make_step(case.model.recipe, torch.arange(config["batch_size"])))
    return case


@of_committed_cases
def test_official_cases_with_shared_and_own_heads_are_committed():
    assert {read(path)[1]["config"]["shared_lm_head"] for path in CASES} == {True, False}


def test_imported_weights_are_those_of_the_file_and_exported_again(case: BEiTv2Case):
    check_weights(case, OfficialCheckpoint(), computed=["relative_position_index"])


def test_latents_and_logits_of_both_streams_are_those_of_the_official_code(case: BEiTv2Case):
    objective, official = case.model.objective, case.tensors
    seen: dict[str, Tensor] = {}
    named_blocks = {f"blocks.{i}": block for i, block in enumerate(objective.encoder.blocks)}
    named_blocks |= {f"cls_pt_layers.{i}": block for i, block in enumerate(objective.cls_blocks)}
    for name, block in named_blocks.items():
        block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0]}))
    objective.encoder.patch_embed.register_forward_hook(lambda _, __, out: seen.update(patch_embed=out))
    if objective.encoder.rel_pos_bias is not None:
        objective.encoder.rel_pos_bias.register_forward_hook(lambda _, __, out: seen.update(rel_pos_bias=out[0]))
    latent, aggregated = case.latents()
    middle = named(official, "mid")
    assert middle.keys() <= seen.keys()
    for name, tensor in middle.items():
        ours = seen[name] if name == "rel_pos_bias" else seen[name][:1]
        assert relative(ours, tensor) < OUTPUT_TOLERANCE, name
    assert relative(latent.layers[objective.early][:, 1:], official["out/early_states"]) < OUTPUT_TOLERANCE
    for stream, ours, suffix in (("main", latent, ""), ("main_cls", aggregated, "_cls_pt")):
        tokens = torch.cat([ours.prefix, ours.tokens], dim=1)
        assert relative(tokens, official[f"out/latent{suffix}"]) < OUTPUT_TOLERANCE
        assert relative(case.logits(ours, stream), official[f"out/logits{suffix}"]) < OUTPUT_TOLERANCE
    assert torch.equal(case.masked.views["token_ids"][case.mask.hidden], official["out/labels"])


def test_both_losses_and_accuracies_are_those_of_the_official_code(case: BEiTv2Case):
    (losses, metrics, _), official = case.outcome(), case.tensors
    for stream, number, suffix in (("main", 1, ""), ("main_cls", 2, "_cls_pt")):
        assert losses[stream].item() == pytest.approx(official[f"out/loss_{number}"].item(), rel=OUTPUT_TOLERANCE)
        right = (official[f"out/logits{suffix}"].argmax(1) == official["out/labels"]).float().mean().item()
        assert metrics[f"heads.{stream}.loss/accuracy"].item() == pytest.approx(right)
    assert case.loss().item() == pytest.approx(official["out/loss"].item(), rel=OUTPUT_TOLERANCE)


def test_gradients_are_those_of_the_official_code(case: BEiTv2Case):
    check_gradients(case)


def test_three_optimizer_steps_end_at_the_official_weights(case: BEiTv2Case):
    check_optimizer_steps(case)


def test_the_tokenizer_of_the_file_gives_its_token_ids(case: BEiTv2Case, tmp_path: Path):
    """Imported as a user would, given as the recipe's `tokenizer`, with pixels that only differ in normalisation."""
    sizes = case.config["tokenizer"]
    torch.save({"model": named(case.tensors, "tokenizer")}, tmp_path / "vqkd.pth")
    teacher = {"type": "vit", "patch_size": sizes["patch_size"], "embed_dim": 16, "depth": 1, "num_heads": 2}
    options = {
        "encoder.num_heads": sizes["num_heads"],
        "decoder.num_heads": sizes["num_heads"],
        "teachers.teacher": {"encoder": teacher, "random": True},
    }
    report = import_checkpoint(tmp_path / "vqkd.pth", tmp_path / "vqkd", options=options)
    assert not report.missing
    assert not report.unexpected
    recipe = case.model.recipe
    views = recipe.views.model_copy(
        update={"options": recipe.views.options | {"second_size": case.config["second_size"]}}
    )
    recipe = recipe.model_copy(update={"tokenizer": str(tmp_path / "vqkd"), "views": views, "init": None})
    model = build_model(recipe, Registry())
    step = make_step(recipe, case.step.positions, teachers=model.teachers.session())
    images = {"x": case.images, "tokenizer": case.tensors["input/second_images"]}
    ids = model.objective.heads["main"].target(step, Masked({"x": case.mask}, images))
    assert torch.equal(ids, case.tensors["input/token_ids"].flatten(1))
    wrong = {**images, "tokenizer": images["tokenizer"] * 0.9}
    assert not torch.equal(model.objective.heads["main"].target(step, Masked({"x": case.mask}, wrong)), ids)


def test_features_for_fine_tuning_are_those_of_the_official_code(case: BEiTv2Case):
    check_features_for_fine_tuning(case)


FAULTS = ["norm eps", "tanh GELU", "late patches", "early class token", "normalised class token", "no bias", "no norm"]


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_aggregation_would_be_found(case: BEiTv2Case, fault: str):
    objective = case.model.objective
    for module in objective.modules():
        if fault == "norm eps" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    if fault == "no bias" and objective.encoder.rel_pos_bias is None:
        return
    latent = objective.encode(Masked({"x": case.mask}, {"x": case.images}))
    layers = dict(latent.layers)
    early, last = layers[objective.early], layers[objective.last]
    if fault == "late patches":
        layers[objective.early] = last
    if fault == "early class token":
        layers[objective.last] = early
    if fault == "normalised class token":
        layers[objective.last] = objective.encoder.final_norm(last)
    if fault == "no norm":
        objective.encoder.norm, objective.cls_norm = nn.Identity(), None
    aux = {} if fault == "no bias" else latent.aux
    aggregated = objective.aggregate(Latent(latent.tokens, latent.grid, layers=layers, aux=aux))
    tokens = torch.cat([aggregated.prefix, aggregated.tokens], dim=1)
    assert relative(tokens, case.tensors["out/latent_cls_pt"]) > 5 * OUTPUT_TOLERANCE


def test_a_wrong_sum_of_the_losses_would_be_found(case: BEiTv2Case):
    official = case.tensors
    first, second = (cross_entropy(official[f"out/logits{s}"], official["out/labels"]) for s in ("", "_cls_pt"))
    assert (first + second).item() == pytest.approx(official["out/loss"].item(), rel=OUTPUT_TOLERANCE)
    assert abs((first - second).item()) > 5 * OUTPUT_TOLERANCE * first


# --- the recipe around the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SCHEDULES["schedules"])))
def test_the_learning_rate_of_every_iteration_is_the_official_one(number: int):
    official = SCHEDULES["schedules"][number]
    setting = official["setting"]
    section = OptimSection(
        lr=setting["lr"], min_lr=setting["min_lr"], warmup_epochs=warmup_epochs(setting), warmup_inclusive=True
    )
    rates = curve_per_iteration(section.lr_curve(total_batch_size=1), setting)
    assert rates == pytest.approx(official["lr_per_iteration"], rel=1e-12)


def test_decay_groups_are_exactly_the_official_ones(case: BEiTv2Case):
    official = SCHEDULES["pretrain_param_groups"]["beitv2_cls_pt"]
    layout = OfficialCheckpoint()
    known = dict.fromkeys(layout.import_state(dict.fromkeys(official["weight_decay_keys"])), True)
    known |= dict.fromkeys(layout.import_state(dict.fromkeys(official["no_weight_decay"])), False)
    check_known_decay_groups(case, known, at_least=40)
