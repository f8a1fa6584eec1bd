"""Our VQ-KD against numbers that the official implementation computed (microsoft/unilm 768a3c8, folder beit2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_beitv2.checkpoints import UNUSED, OfficialVQKDCheckpoint, flat, our_name
from mim_plugin_beitv2.codebook import counts_and_sums, directions, spherical_k_means
from parity.harness import (
    OUTPUT_TOLERANCE,
    Case,
    cases,
    check_gradients,
    check_known_decay_groups,
    check_optimizer_steps,
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
from torch.nn.functional import mse_loss, normalize

from mim_framework.assembly.preflight import make_step
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Masked
from mim_framework.contract.step import Step
from mim_framework.runtime.optim import OptimSection

CASES = cases("vqkd_*.safetensors")
SCHEDULES = read_json("beit_schedule.json")
CODE_TOLERANCE = 1e-6  # absolute
EVERYTHING = Ask(aux=frozenset({"ids", "features"}))

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


def our_names(values: dict[str, Any]) -> dict[str, Any]:
    places = {name: our_name(name) for name in values}
    return {
        ours: flat(ours, values[name]) if isinstance(values[name], Tensor) else values[name]
        for name, ours in places.items()
        if ours is not None
    }


class FeaturesOfFile(nn.Module):
    """In place of the target: what stands for the teacher's output."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, step: Step, masked: Masked) -> Tensor:
        return self.features


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    tensors, metadata = read(request.param)
    config = metadata["config"]
    teacher = {"type": "vit", "patch_size": config["patch_size"], "embed_dim": config["decoder_out_dim"], "depth": 1}
    case = imported_case(
        request.param,
        tmp_path,
        our_names=our_names,
        options={
            "encoder.num_heads": config["encoder_num_heads"],
            "decoder.num_heads": config["decoder_num_heads"],
            "teachers.teacher": {"encoder": {**teacher, "num_heads": 2}, "random": True},
        },
        changes={"encoder": {"decay": config["decay"], "beta": config["beta"]}},
    )
    grid = case.model.specs.encoder.grid
    mask = Mask.none(config["batch_size"], grid)
    masked = Masked({"x": mask.predicting(~mask.hidden)}, {"x": case.images})
    case.mask_with(masked, make_step(case.model.recipe, torch.arange(config["batch_size"])))
    case.model.objective.heads["main"].target = FeaturesOfFile(tensors["input/teacher_features"])
    return case


def as_map(tokens: Tensor, case: Case) -> Tensor:
    """(B, N, C) -> (B, C, h, w), as the file has codes."""
    return tokens.transpose(1, 2).unflatten(2, case.model.specs.encoder.grid.shape)


@of_committed_cases
def test_official_cases_are_committed():
    assert {path.stem for path in CASES} >= {"vqkd_a", "vqkd_b"}


def test_imported_weights_are_those_of_the_file_and_exported_again(case: Case):
    state = case.model.objective.state_dict()
    weights = case.group("param")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    exported = OfficialVQKDCheckpoint().export_state(state)
    official = named(case.tensors, "param")
    assert exported.keys() == official.keys()  # for a strict load
    assert all(exported[name].shape == official[name].shape for name in UNUSED)
    assert all(torch.equal(exported[name], official[name]) for name in official.keys() - set(UNUSED))


def test_latents_codes_and_reconstructions_are_those_of_the_official_code(case: Case):
    encoder, decoder = case.model.objective.encoder, case.model.objective.heads["main"].decoder
    seen: dict[str, Tensor] = {}
    for side, vit in (("encoder", encoder.vit), ("decoder", decoder.vit)):
        modules = {"patch_embed": vit.patch_embed, **{f"blocks.{i}": block for i, block in enumerate(vit.blocks)}}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda _, __, out, name=f"{side}.{name}": seen.update({name: out[0] if isinstance(out, tuple) else out})
            )
    decoder.vit.register_forward_hook(lambda _, __, out: seen.update(decoder_tokens=out))
    latent = encoder(case.images, case.mask, EVERYTHING)
    pred = decoder(latent, case.mask)
    official = case.tensors
    middle = named(official, "mid")
    assert middle.keys() <= seen.keys()
    for name, tensor in middle.items():
        assert relative(seen[name][:1], tensor) < OUTPUT_TOLERANCE, name
    assert relative(latent.aux["features"], official["out/encoder_tokens"]) < OUTPUT_TOLERANCE
    to_codes = as_map(encoder.task_layer(latent.aux["features"]), case)
    assert relative(to_codes, official["out/to_quantizer"]) < OUTPUT_TOLERANCE
    assert torch.equal(latent.aux["ids"], official["out/token_ids"])
    assert relative(as_map(latent.tokens, case), official["out/quantized"]) < OUTPUT_TOLERANCE
    assert relative(seen["decoder_tokens"], official["out/decoder_tokens"]) < OUTPUT_TOLERANCE
    assert relative(pred.values, official["out/rec"]) < OUTPUT_TOLERANCE


def test_both_losses_are_those_of_the_official_code(case: Case):
    losses = case.losses()
    for name, official in (("main", "rec_loss"), ("commitment", "quant_loss")):
        assert losses[name].item() == pytest.approx(case.tensors[f"out/{official}"].item(), rel=OUTPUT_TOLERANCE)
    assert case.loss().item() == pytest.approx(case.tensors["out/loss"].item(), rel=OUTPUT_TOLERANCE)


def test_gradients_are_those_of_the_official_code(case: Case):
    check_gradients(case)


def test_three_optimizer_steps_with_the_codebook_end_at_the_official_weights(case: Case):
    assert {"step1/quantize.embedding.weight", "step3/quantize.embedding.weight"} <= case.tensors.keys()
    check_optimizer_steps(case, weight_decay=1e-4)
    codes = case.model.objective.encoder.codebook.codes
    assert (codes - case.tensors["step3/quantize.embedding.weight"]).abs().max() < CODE_TOLERANCE


def test_a_step_moves_the_used_codes_to_where_the_official_code_does(case: Case):
    encoder = case.model.objective.encoder
    before = encoder.codebook.codes.clone()
    assert torch.equal(before, case.tensors["out/codebook_before"])
    case.losses()
    assert torch.equal(encoder.codebook.codes, before)  # a forward pass only counts
    encoder.before_step(case.step)
    encoder.after_step(case.step)
    after = case.tensors["out/codebook_after"]
    assert (encoder.codebook.codes - after).abs().max() < CODE_TOLERANCE
    used = torch.zeros(len(before), dtype=torch.bool).index_fill_(0, case.tensors["out/token_ids"].flatten(), True)
    assert (~used).any()
    assert torch.equal(encoder.codebook.codes[~used], before[~used])


def test_nothing_moves_in_eval_mode(case: Case):
    objective = case.model.objective.eval()
    before = {name: tensor.clone() for name, tensor in (*objective.named_buffers(), *objective.named_parameters())}
    latent = objective.encoder(case.images, case.mask, EVERYTHING)
    losses = case.losses()
    assert torch.equal(latent.aux["ids"], case.tensors["extra/eval_token_ids"])
    vectors = objective.encoder.vectors(latent.aux["features"])
    commitment = objective.encoder.config.beta * mse_loss(vectors, objective.encoder.codebook.codes[latent.aux["ids"]])
    total = sum(losses.values()) + commitment
    assert losses.keys() == {"main"}
    assert total.item() == pytest.approx(case.tensors["extra/eval_loss"].item(), rel=OUTPUT_TOLERANCE)
    objective.encoder.before_step(case.step)
    objective.encoder.after_step(case.step)
    for name, tensor in (*objective.named_buffers(), *objective.named_parameters()):
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_k_means_finds_the_centres_of_the_official_code(path: Path):
    tensors, _ = read(path)
    samples = tensors["extra/kmeans_samples"]
    centers, counts = spherical_k_means(samples, samples[tensors["extra/kmeans_start_indices"]])
    assert torch.equal(counts.long(), tensors["extra/kmeans_bins"].long())
    assert (centers - tensors["extra/kmeans_means"]).abs().max() < CODE_TOLERANCE
    none, _ = spherical_k_means(samples, samples[tensors["extra/kmeans_start_indices"]], num_iterations=0)
    assert (none - tensors["extra/kmeans_means"]).abs().max() > 5 * CODE_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("fault", ["norm eps", "tanh GELU", "no tanh", "off by one token", "images in [0, 1]"])
def test_a_wrong_encoder_would_be_found(case: Case, fault: str):
    encoder = case.model.objective.encoder
    images = case.images
    for module in encoder.modules():
        if fault == "norm eps" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    if fault == "no tanh":
        encoder.task_layer[1] = nn.GELU()
    if fault == "images in [0, 1]":
        images = (images + 1) / 2
    latent = encoder(images, case.mask, EVERYTHING)
    to_codes = as_map(encoder.task_layer(latent.aux["features"]), case)
    if fault == "off by one token":
        to_codes = as_map(encoder.task_layer(latent.aux["features"].roll(1, 1)), case)
    assert relative(to_codes, case.tensors["out/to_quantizer"]) > 5 * OUTPUT_TOLERANCE


@pytest.mark.parametrize("fault", ["weighted by count", "sum of all", "no normalisation", "unused ones forgotten"])
def test_a_wrong_update_of_the_codebook_would_be_found(case: Case, fault: str):
    config, official = case.config, case.tensors
    before, ids = official["out/codebook_before"], official["out/token_ids"].flatten()
    vectors = normalize(official["out/to_quantizer"].flatten(2).transpose(1, 2), dim=-1).flatten(0, 1)
    counts, sums = counts_and_sums(vectors, ids, len(before))
    decay = config["decay"]
    means = directions(counts, sums, otherwise=before)
    right = normalize(decay * before + (1 - decay) * means, dim=-1)
    assert (right - official["out/codebook_after"]).abs().max() < CODE_TOLERANCE
    wrong = {
        "weighted by count": normalize(decay * before + (1 - decay) * sums, dim=-1),
        "sum of all": normalize(decay * before + (1 - decay) * sums / counts.sum(), dim=-1),
        "no normalisation": decay * before + (1 - decay) * sums / counts.clamp(min=1)[:, None],
        "unused ones forgotten": decay * before + (1 - decay) * torch.where(counts[:, None] > 0, means, 0),
    }[fault]
    assert (wrong - official["out/codebook_after"]).abs().max() > 5 * CODE_TOLERANCE


# --- the recipe around the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SCHEDULES["schedules"])))
def test_the_learning_rate_of_every_iteration_is_the_official_one(number: int):
    official = SCHEDULES["schedules"][number]
    setting = official["setting"]
    section = OptimSection(
        base_lr=setting["lr"] / 4, lr_per_images=128, min_lr=setting["min_lr"], warmup_epochs=warmup_epochs(setting),
        warmup_inclusive=True,
    )  # fmt: skip
    rates = curve_per_iteration(section.lr_curve(total_batch_size=512), setting)
    assert rates == pytest.approx(official["lr_per_iteration"], rel=1e-12)


def test_decay_groups_are_exactly_the_official_ones(case: Case):
    official = SCHEDULES["pretrain_param_groups"]["vqkd"]
    known = {our_name(name): True for name in official["weight_decay_keys"]}
    known |= {our_name(name): False for name in official["no_weight_decay"]}
    check_known_decay_groups(case, known, at_least=30)
