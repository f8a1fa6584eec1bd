"""The dVAE by hand: its likelihood, its divergence, its relaxed codes, what it logs, and checkpoints in and out."""

from __future__ import annotations

import logging
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mim_plugin_beit import dvae
from mim_plugin_beit.dvae import (
    DalleDecoder,
    DalleEncoder,
    DVAEPixels,
    ELBOLoss,
    PixelDistribution,
    gumbel_noise,
    logit_laplace_nll,
    map_pixels,
    unmap_pixels,
)
from mim_plugin_beit.dvae_checkpoints import DalleCheckpoint, MMPretrainDalleCheckpoint
from torch import Tensor

from mim_framework import Grid, Latent, Mask, Masked, Pred, PredSpec, Specs, Step, ViewSpec
from mim_framework.assembly.builder import build_model
from mim_framework.base.errors import CheckpointError, RecipeError
from mim_framework.contract.world import World
from mim_framework.convert import import_checkpoint
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

GRID = Grid((2, 2))
UNIT = ViewSpec("x", size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
SMALL = {"hidden_dim": 4, "blocks_per_group": 1}
TWO_SAMPLES = Step(index=0, total=10, epoch=0.0, epochs=1.0, positions=torch.tensor([5, 9]), seed=0, world=World())


def encoder(view: ViewSpec = UNIT, **options: Any) -> DalleEncoder:
    return DalleEncoder(DalleEncoder.Config(**{**SMALL, "vocab_size": 8, **options}), Specs(views={"x": view}))


def decoder(**options: Any) -> DalleDecoder:
    specs = Specs(views={"x": UNIT}, encoder=encoder().spec)
    return DalleDecoder(DalleDecoder.Config(**{**SMALL, "init_dim": 4, **options}), specs)


def elbo(**options: Any) -> ELBOLoss:
    specs = Specs(views={"x": UNIT}, encoder=encoder().spec, pred=decoder().spec)
    return ELBOLoss(ELBOLoss.Config(**options), specs)


# --- likelihood and divergence ---------------------------------------------------------------------------------------


def test_pixels_are_squeezed_and_come_back():
    assert map_pixels(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert unmap_pixels(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_the_likelihood_of_a_grey_pixel_by_hand():
    """At 0.5 the logit is 0, and the density is 1 / (2 b x (1 - x)) exp(-|mean| / b) with x (1 - x) = 1/4."""
    mean, scale = torch.tensor(0.6), torch.tensor(0.3)
    density = 1 / (2 * 0.3 * 0.25) * math.exp(-0.6 / 0.3)
    assert float(logit_laplace_nll(torch.tensor(0.5), mean, scale.log())) == pytest.approx(-math.log(density), abs=1e-6)


def test_the_likelihood_is_a_density():
    pixels = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]
    density = (-logit_laplace_nll(pixels, torch.tensor(0.4), torch.tensor(0.5).log())).exp()
    assert float(torch.trapezoid(density, pixels)) == pytest.approx(1, abs=1e-3)


def losses(logits: Tensor, **options: Any) -> tuple[float, ELBOLoss]:
    """The bound for these logits (1, 4, 8), with a perfect mean and scale 1 for grey images."""
    loss = elbo(likelihood="mse", **options)
    pred = PixelDistribution(torch.zeros(1, 4, 192), GRID, log_scales=torch.zeros(1, 4, 192))
    target = Pred(torch.full((1, 4, 192), 0.5), GRID)
    return float(loss(pred, target, Mask.none(1, GRID), Latent(logits, GRID)).loss), loss


def test_the_divergence_is_zero_for_uniform_codes_and_log_v_for_certain_ones():
    certain = torch.zeros(1, 4, 8)
    certain[..., 3] = 1e4
    assert losses(torch.zeros(1, 4, 8), kl_weight=2.0)[0] == pytest.approx(0, abs=1e-6)
    assert losses(certain, kl_weight=2.0)[0] == pytest.approx(2 * math.log(8))
    half = torch.zeros(1, 4, 8)
    half[..., :4] = 1e4  # four codes alike: ln 8 - ln 4
    assert losses(half, kl_weight=1.0)[0] == pytest.approx(math.log(2))


def test_the_weight_of_the_divergence_follows_its_schedule():
    loss = elbo(kl_weight={"shape": "linear", "from": 0.0, "to": 1.0})
    assert loss.kl_weight == 0
    loss.begin_step(replace(TWO_SAMPLES, epoch=0.5))
    assert loss.kl_weight == pytest.approx(0.5)


# --- relaxed codes ---------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_sample(monkeypatch: pytest.MonkeyPatch):
    noise = gumbel_noise(TWO_SAMPLES, (4, 8))
    alone = gumbel_noise(replace(TWO_SAMPLES, positions=torch.tensor([9])), (4, 8))
    assert torch.equal(noise[1:], alone)
    assert not torch.equal(noise[0], noise[1])
    monkeypatch.setattr(dvae, "NOISE_CHUNK", 1)  # a row at a time
    assert torch.equal(gumbel_noise(TWO_SAMPLES, (4, 8)), noise)


def test_noise_is_gumbel():
    """Mean: Euler's constant, variance: pi^2 / 6; the standard error of 2^18 numbers is below 0.003 and 0.01."""
    noise = gumbel_noise(replace(TWO_SAMPLES, positions=torch.arange(4)), (2**16,))
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.012)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)


def test_codes_sum_to_one_and_are_one_hot_when_cold():
    warm, cold = decoder(temperature=1.0), decoder(temperature=0.001)
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    codes = {}
    for name, each in {"warm": warm, "cold": cold}.items():
        each.begin_step(TWO_SAMPLES)
        codes[name] = each.relaxed_codes(logits)
        assert torch.allclose(codes[name].sum(-1), torch.ones(2, 4))
    assert codes["cold"].amax(-1).min() > 0.999
    assert codes["warm"].amax(-1).max() < 0.999
    likeliest = (logits + gumbel_noise(TWO_SAMPLES, (4, 8))).argmax(-1)
    assert torch.equal(codes["cold"].argmax(-1), likeliest)


def test_straight_through_is_one_hot_with_the_gradient_of_the_relaxed_codes():
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for straight_through in (False, True):
        each = decoder(straight_through=straight_through)
        each.begin_step(TWO_SAMPLES)
        leaf = logits.clone().requires_grad_()
        codes = each.relaxed_codes(leaf)
        (codes * weights).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(codes.detach().unique(), torch.tensor([0.0, 1.0]))
    assert torch.allclose(*gradients)


def test_in_evaluation_a_code_is_the_likeliest_one_without_noise():
    each = decoder().eval()
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), 8) * 1e4
    mask = Mask.none(2, GRID)
    with torch.no_grad():
        assert torch.equal(each(Latent(logits, GRID), mask).values, each(Latent(one_hot, GRID), mask).values)


def test_a_decoder_that_was_not_told_of_the_batch_says_so():
    each = decoder()
    with pytest.raises(ValueError, match=r"'dvae_decoder' in training needs begin_step\(step\)"):
        each.relaxed_codes(torch.zeros(2, 4, 8))
    each.begin_step(TWO_SAMPLES)
    with pytest.raises(ValueError, match="needs begin_step"):
        each.relaxed_codes(torch.zeros(3, 4, 8))


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_an_image_of_other_than_whole_tokens_is_refused():
    with pytest.raises(ValueError, match="image size 16x20 is not a multiple of 8"):
        encoder(replace(UNIT, size=(16, 20)))


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match=r"view 'x' does not tell its normalisation.*mean=\(0, 0, 0\)"):
        encoder(replace(UNIT, mean=None, std=None))


def test_the_decoder_wants_an_encoder_with_a_vocabulary():
    specs = Specs(views={"x": UNIT}, encoder=replace(encoder().spec, num_classes=None))
    with pytest.raises(ValueError, match="tokens of width 8 and no vocabulary; use encoder 'dvae'"):
        DalleDecoder(DalleDecoder.Config(), specs)


def test_the_loss_wants_a_distribution_of_pixels():
    specs = Specs(views={"x": UNIT}, encoder=encoder().spec, pred=PredSpec("dense", 192, GRID))
    with pytest.raises(ValueError, match="needs the distribution of pixels that decoder 'dvae_decoder' gives"):
        ELBOLoss(ELBOLoss.Config(), specs)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DalleDecoder.Config, {"temperature": 0}, "'temperature' must stay above 0, got 0"),
        (
            DalleDecoder.Config,
            {"temperature": {"shape": "linear", "from": 1.0, "to": -0.5}},
            "'temperature' must stay above 0, got -0.5",
        ),
        (ELBOLoss.Config, {"kl_weight": -1}, "'kl_weight' must not be negative, got -1"),
    ],
)
def test_impossible_schedules_are_refused(config: type, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**options)


# --- pixels in and out -----------------------------------------------------------------------------------------------


def test_any_normalisation_gives_the_same_target_and_comes_back():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    view = replace(UNIT, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    mean, std = (torch.tensor(each)[:, None, None] for each in (view.mean, view.std))
    mask = Mask.none(2, GRID)
    plain, normalised = (DVAEPixels(DVAEPixels.Config(), Specs({"x": v}, encoder=encoder().spec)) for v in (UNIT, view))
    target = plain(TWO_SAMPLES, Masked({"x": mask}, {"x": images}))
    same = normalised(TWO_SAMPLES, Masked({"x": mask}, {"x": (images - mean) / std}))
    assert torch.allclose(same.values, target.values, atol=1e-6)
    perfect = PixelDistribution(target.values.logit(), GRID)
    assert torch.allclose(plain.reconstruct(perfect, mask, images), images, atol=1e-5)
    assert torch.allclose(normalised.reconstruct(perfect, mask, images), (images - mean) / std, atol=1e-4)


# --- what is logged --------------------------------------------------------------------------------------------------


def test_usage_and_perplexity_by_hand():
    """Half of the positions say code 0, the others code 1: two of eight codes, perplexity 2."""
    logits = torch.full((1, 4, 8), -1e4)
    logits[0, :2, 0] = logits[0, 2:, 1] = 1e4
    _, loss = losses(logits)
    loss.before_step(TWO_SAMPLES)
    found = loss.metrics()
    assert float(found["usage"]) == 0.25
    assert float(found["perplexity"]) == pytest.approx(2)
    assert float(found["token_perplexity"]) == pytest.approx(2)
    _, loss = losses(torch.zeros(1, 4, 8))
    loss.before_step(TWO_SAMPLES)
    found = loss.metrics()
    assert float(found["perplexity"]) == pytest.approx(8)
    assert float(found["token_perplexity"]) == pytest.approx(1)


def test_what_is_counted_begins_anew_after_a_line():
    logits = torch.full((1, 4, 8), -1e4)
    logits[..., 0] = 1e4
    _, loss = losses(logits)
    for _ in range(3):
        loss.observe(logits, logits.softmax(-1))
        loss.before_step(TWO_SAMPLES)
    assert loss.counts[0].tolist() == [16, 0, 0, 0, 0, 0, 0, 0]
    loss.metrics()
    loss.observe(logits, logits.softmax(-1))
    loss.before_step(TWO_SAMPLES)
    assert loss.counts[0, 0] == 4


def test_a_collapsed_vocabulary_is_warned_of_once_and_not_at_the_start(caplog: pytest.LogCaptureFixture):
    logits = torch.full((2, 4, 8), -1e4)
    logits[..., 0] = 1e4
    loss = elbo(min_usage=0.2)
    with caplog.at_level(logging.WARNING):
        for index in (0, 5, 9):
            loss.observe(logits, logits.softmax(-1))
            loss.before_step(replace(TWO_SAMPLES, index=index))
            loss.metrics()
            assert len(caplog.messages) == (index > 0)
    assert caplog.messages[0].startswith("only 12.5% of the 8 codes are in use (min_usage is 0.2)")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    content = {
        "name": "dvae",
        "data": {"source": "digits"},
        "views": {"type": "image", "img_size": 16, "mean": [0.0] * 3, "std": [1.0] * 3},
        "masker": "none",
        "encoder": {"type": "dvae", "vocab_size": 8, **SMALL},
        "target": "dvae_pixels",
        "decoder": {"type": "dvae_decoder", "init_dim": 12, "hidden_dim": 8, "blocks_per_group": 1},
        "loss": "dvae_elbo",
        "optim": {"lr": 0.1},
        "train": {"total_batch_size": 2, "steps": 1},
    }
    return build_model(Recipe.model_validate(content), Registry()).objective.state_dict()


def test_both_halves_go_out_and_come_back(state: dict[str, Tensor]):
    layout = DalleCheckpoint()
    official = layout.export_state(state)
    assert {"encoder.blocks.input.w", "decoder.blocks.group_4.block_1.res_path.conv_4.b"} <= official.keys()
    assert layout.recognises(official)
    imported = layout.import_state(official)
    assert imported.keys() == state.keys()
    assert all(torch.equal(imported[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_is_told_by_its_first_kernel(state: dict[str, Tensor], half: str):
    layout = DalleCheckpoint()
    official = layout.export_state(state)
    alone = {name.removeprefix(f"{half}."): tensor for name, tensor in official.items() if name.startswith(half)}
    assert layout.recognises(alone) == (half == "encoder")
    imported = layout.import_state(alone)
    assert imported
    assert all(torch.equal(state[name], tensor) for name, tensor in imported.items())


def test_import_makes_a_folder_that_a_second_stage_can_name(state: dict[str, Tensor], tmp_path: Path):
    official = DalleCheckpoint().export_state(state)
    torch.save(official, tmp_path / "dalle.pth")
    report = import_checkpoint(tmp_path / "dalle.pth", tmp_path / "dvae")
    assert not report.missing
    assert not report.unexpected
    slots = yaml.safe_load((tmp_path / "dvae" / "slots.yaml").read_text())
    assert slots["encoder"] == {"type": "dvae", "vocab_size": 8, **SMALL}
    assert (slots["decoder"]["init_dim"], slots["decoder"]["hidden_dim"]) == (12, 8)
    model = build_model(Recipe.model_validate(SECOND_STAGE | {"tokenizer": str(tmp_path / "dvae")}), Registry())
    assert model.specs.teacher("tokenizer").num_classes == 8
    weights = model.teachers["tokenizer"].part("encoder").state_dict()
    assert all(torch.equal(tensor, state[f"encoder.{name}"]) for name, tensor in weights.items())


SECOND_STAGE: dict[str, Any] = {
    "name": "beit",
    "data": {"source": "digits"},
    "views": {"type": "beit", "img_size": 16, "second_size": 16},
    "masker": {"type": "random", "mask_ratio": 0.5},
    "encoder": {"type": "beit", "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "target": "token_ids",
    "decoder": "linear",
    "loss": "cross_entropy",
    "optim": {"lr": 0.1},
    "train": {"total_batch_size": 2, "steps": 1},
}


def test_a_tokenizer_of_another_grid_is_refused_before_training(state: dict[str, Tensor], tmp_path: Path):
    torch.save(DalleCheckpoint().export_state(state), tmp_path / "dalle.pth")
    import_checkpoint(tmp_path / "dalle.pth", tmp_path / "dvae")
    views = {"type": "beit", "img_size": 16, "second_size": 32}
    content = SECOND_STAGE | {"tokenizer": str(tmp_path / "dvae"), "views": views}
    with pytest.raises(RecipeError, match=r"decoder 'linear': target grid 4x4, encoder grid 2x2"):
        build_model(Recipe.model_validate(content), Registry())


def test_the_tokenizer_inside_a_checkpoint_of_mmpretrain_is_read_when_asked_for(state: dict[str, Tensor]):
    layout = MMPretrainDalleCheckpoint()
    encoder = {
        f"target_generator.{name.removeprefix('encoder.')}": tensor
        for name, tensor in DalleCheckpoint().export_state(state).items()
        if name.startswith("encoder.")
    }
    foreign = {**encoder, "backbone.cls_token": torch.zeros(1)}
    assert not layout.recognises(foreign)
    imported = layout.import_state(foreign)
    assert all(torch.equal(imported[name], tensor) for name, tensor in state.items() if name.startswith("encoder."))
    assert layout.to_recipe(foreign)["encoder"]["vocab_size"] == 8


def test_the_pickled_module_of_openai_is_refused(tmp_path: Path):
    class Anything:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("code of a stranger",))

    for save in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        save(Anything(), tmp_path / "encoder.pkl")
        with pytest.raises(CheckpointError, match=r"encoder\.pkl"):
            import_checkpoint(tmp_path / "encoder.pkl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
