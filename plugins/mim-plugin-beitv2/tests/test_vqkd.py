"""VQ-KD as a user runs it: what encoder and decoder promise, and runs on ranks, resumed and under bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_beitv2 import VQKDEncoder
from mim_plugin_beitv2.codebook import nearest_codes
from tiny import RECIPE
from torch import Tensor, nn
from torch.nn.functional import normalize

from mim_framework import Ask, Grid, Mask, Specs, ViewSpec, hookimpl
from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.assembly.opened import load_run
from mim_framework.assembly.preflight import make_step, preflight
from mim_framework.base.errors import RecipeError
from mim_framework.checkpoints import checkpoint
from mim_framework.commands.check import report
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.trainer import train

torch.set_num_threads(1)  # ranks are forked; the suite's conftest says it too, unless the plugin is tested alone

SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
ENCODER = {"type": "vqkd", **SIZES, "num_codes": 24, "code_dim": 4}
DECODER = {"type": "vqkd_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2}
RECIPE_OF_VQKD = {
    **RECIPE,
    "views": {"type": "image", "img_size": 16, "mean": [0.0] * 3, "std": [1.0] * 3},
    "masker": "none",
    "encoder": ENCODER,
    "target": "pixels",
    "decoder": DECODER,
    "loss": "cosine",
}
SGD = "optim={type: momentum, lr: 0.05, shape: constant, weight_decay: 0, options: {momentum: 0.0}}"
"""Adam would turn the rounding of a gradient that is zero into a step of full size."""
GRID = Grid((4, 4))
EVERYTHING = Ask(aux=frozenset({"ids", "features"}))


def recipe_of(**changes: Any) -> Recipe:
    return Recipe.model_validate({**RECIPE_OF_VQKD, **changes})


def run(folder: Path, *overrides: str, registry: RegistryWith | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "recipe_in.yaml"
    file.write_text(json.dumps(RECIPE_OF_VQKD))
    registry = registry or RegistryWith()
    return train(load_recipe(file, [f"output_dir={folder}", "train.steps=3", *overrides], registry), registry)


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    return checkpoint.find_latest(run_dir / "checkpoints").tensors("model")


def encoder_of(view: ViewSpec | None = None, **options: Any) -> VQKDEncoder:
    torch.manual_seed(0)
    view = view or ViewSpec("x", size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    config = VQKDEncoder.Config(**{**{k: v for k, v in ENCODER.items() if k != "type"}, **options})
    return VQKDEncoder(config, Specs(views={"x": view}))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# --- the encoder -----------------------------------------------------------------------------------------------------


def test_tokens_are_codes_and_ids_their_numbers(images: Tensor):
    encoder = encoder_of().eval()
    latent = encoder(images, Mask.none(3, GRID), EVERYTHING)
    assert latent.tokens.shape == (3, 16, 4)
    assert latent.aux["features"].shape == (3, 16, 16)
    assert torch.allclose(latent.tokens, encoder.codebook.codes[latent.aux["ids"]], atol=1e-6)
    assert encoder.spec.num_classes == 24
    assert not encoder(images, Mask.none(3, GRID)).aux


def test_gradients_pass_the_codes_straight_to_the_vectors(images: Tensor):
    encoder = encoder_of()
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    encoder.task_layer.register_forward_hook(keep)
    latent = encoder(images, Mask.none(3, GRID))
    weights = torch.randn(latent.tokens.shape, generator=torch.Generator().manual_seed(2))
    (latent.tokens * weights).sum().backward()
    raw = seen[0].detach().requires_grad_()
    (normalize(raw, dim=-1) * weights).sum().backward()
    assert torch.allclose(seen[0].grad, raw.grad, atol=1e-6)


def test_commitment_is_the_squared_distance_from_the_codes_and_pulls_at_the_vectors_alone(images: Tensor):
    encoder = encoder_of(beta=2.0)
    latent = encoder(images, Mask.none(3, GRID), EVERYTHING)
    vectors = encoder.vectors(latent.aux["features"])
    distance = (encoder.codebook.codes[latent.aux["ids"]] - vectors).square().mean()
    assert latent.losses.keys() == {"commitment"}
    assert latent.losses["commitment"].item() == pytest.approx(2 * distance.item())
    assert not encoder.codebook.codes.requires_grad
    assert not encoder.eval()(images, Mask.none(3, GRID)).losses


def test_the_view_may_come_in_any_normalisation(images: Tensor):
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    view = ViewSpec("x", size=(16, 16), mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    plain, other, unknown = encoder_of(), encoder_of(view), encoder_of(ViewSpec("x", size=(16, 16)))
    normalised = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    wanted = plain(images, Mask.none(3, GRID), EVERYTHING).aux["features"]
    assert torch.allclose(other(normalised, Mask.none(3, GRID), EVERYTHING).aux["features"], wanted, atol=1e-5)
    assert torch.equal(unknown(images, Mask.none(3, GRID), EVERYTHING).aux["features"], wanted)
    assert torch.allclose(plain.to_signed(images), 2 * images - 1)


def test_a_dark_batch_is_not_taken_for_bytes(images: Tensor):
    """Official code decides by the maximum of a batch."""
    encoder = encoder_of().eval()
    batch = torch.cat([images[:1] / 300, images[1:]])
    together = encoder(batch, Mask.none(3, GRID), EVERYTHING).aux["features"]
    assert torch.allclose(encoder(batch[:1], Mask.none(1, GRID), EVERYTHING).aux["features"], together[:1], atol=1e-5)


def test_initial_weights_are_the_official_ones():
    encoder = encoder_of(embed_dim=192, depth=3)
    blocks, bound = encoder.vit.blocks, 1 / (3 * 4 * 4) ** 0.5
    assert blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for number, block in enumerate(blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.05)
    assert encoder.task_layer[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert blocks[0].attn.qkv.weight.abs().max() > 0.04  # cut at two, not at one standard deviation
    patch_embed = encoder.vit.patch_embed.proj
    assert patch_embed.weight.abs().max().item() == pytest.approx(bound, rel=0.01)  # PyTorch's default
    assert patch_embed.bias.abs().max() > 0
    biases = [p for name, p in encoder.named_parameters() if name.endswith("bias") and "patch_embed" not in name]
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoder": {**ENCODER, "patch_size": 5}}, "image size 16x16 is not a multiple of patch_size 5"),
        ({"encoder": {**ENCODER, "num_heads": 3}}, "embed_dim 16 is not a multiple of num_heads 3"),
        ({"masker": {"type": "random"}}, "masker 'random' and encoder 'vqkd' do not fit: the encoder takes no masks"),
        ({"target": {"type": "pixels", "patch_size": 8}}, "'vqkd_decoder': target grid 2x2, encoder grid 4x4"),
        (
            {"encoder": {"type": "mae_vit", **SIZES}, "masker": {"type": "random"}},
            "decoder 'vqkd_decoder' needs an encoder with a token at every position",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], text: str):
    with pytest.raises(RecipeError, match=text):
        build_model(recipe_of(**changes), RegistryWith())


def test_the_decoder_takes_any_encoder_with_a_token_everywhere():
    model = build_model(recipe_of(encoder={"type": "vit", **SIZES}, masker="random"), RegistryWith())
    preflight(model, torch.device("cpu"))


def test_the_recommended_tokenizer_is_counted_without_weights_and_has_the_official_size():
    recipe = load_recipe("beit_v2_vqkd", ["data.source=digits", "train.device=cpu"], RegistryWith())
    with torch.device("meta"):
        model = build_model(recipe, RegistryWith(), with_weights=False)
    assert sum(p.numel() for p in model.objective.parameters()) == 108_829_216
    assert model.specs.teacher("clip").dim == 512
    assert model.specs.teacher("clip").mean == (0.48145466, 0.4578275, 0.40821073)
    assert "GiB" in report(recipe, RegistryWith())


def test_the_preflight_leaves_no_trace():
    model = build_model(recipe_of(encoder={**ENCODER, "revive_after": 1}), RegistryWith())
    before = {name: buffer.clone() for name, buffer in model.objective.named_buffers()}
    preflight(model, torch.device("cpu"))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.objective.named_buffers())
    assert "encoder.codebook.sums" in before


# --- one step --------------------------------------------------------------------------------------------------------


def steps_of(model: Any, num_steps: int) -> None:
    """Training steps on made-up images."""
    optimizer = build_optimizers(model.recipe, model.objective, 2)["main"]
    batch = model.views.example(2)
    for index in range(num_steps):
        step = make_step(model.recipe, torch.arange(2), index=index)
        for component in model.objective.components():
            component.begin_step(step)
        sum(model.objective(step, model.views.prepare(step, batch)).losses.values()).backward()
        for component in model.objective.components():
            component.before_step(step)
        optimizer.schedule(step)
        optimizer.step()
        for component in model.objective.components():
            component.after_step(step)
        model.objective.zero_grad()


def test_little_use_of_the_codes_is_said_once(caplog: pytest.LogCaptureFixture):
    model = build_model(recipe_of(encoder={**ENCODER, "num_codes": 8, "warn_usage": 0.5, "decay": 1}), RegistryWith())
    encoder = model.objective.encoder
    encoder.codebook.codes.copy_(encoder.codebook.codes[:1].expand(8, -1))  # the first of equal codes takes all
    assert encoder.metrics() == {}
    for _ in range(2):
        steps_of(model, 1)
        metrics = encoder.metrics()
    assert metrics["codebook_usage"].item() == 0.125
    assert metrics["perplexity"].item() == pytest.approx(1.0)
    assert caplog.text.count("1 of 8 codes are in use, a share below warn_usage 0.5. Fewer num_codes") == 1
    assert encoder.pictures()["codebook_usage"].shape[0] == 1
    assert encoder.metrics() == {}


def test_a_few_vectors_are_no_reason_to_warn(caplog: pytest.LogCaptureFixture):
    model = build_model(recipe_of(encoder={**ENCODER, "num_codes": 9, "warn_usage": 0.5}), RegistryWith())
    model.objective.encoder.codebook.codes.copy_(model.objective.encoder.codebook.codes[:1].expand(9, -1))
    steps_of(model, 1)  # 32 vectors
    model.objective.encoder.metrics()
    assert caplog.text == ""


def test_unused_codes_come_back_if_asked_for():
    usage = []
    for revive_after in (None, 2):
        options = {**ENCODER, "num_codes": 16, "kmeans_init": False, "revive_after": revive_after}
        model = build_model(recipe_of(encoder=options), RegistryWith())
        book = model.objective.encoder.codebook
        book.codes.copy_(book.codes[:1].expand(16, -1))
        steps_of(model, 6)
        usage.append((book.window > 0).sum().item())
    assert usage[0] < 4
    assert usage[1] > 8


# --- runs ------------------------------------------------------------------------------------------------------------


class Watch:
    """The codes with which the first step is made."""

    @hookimpl
    def mim_run_started(self, run):
        encoder = run.model.objective.encoder
        assert encoder.codebook.initted.item() == 0
        encoder.vit.blocks[0].register_forward_hook(lambda *_: self.look(encoder))

    def look(self, encoder: VQKDEncoder) -> None:
        if encoder.training and not hasattr(self, "codes"):
            self.codes = encoder.codebook.codes.clone()


def test_codes_are_placed_by_k_means_over_the_images_of_the_first_step(tmp_path: Path):
    watch, registry = Watch(), RegistryWith()
    registry._manager.register(watch)
    run_dir = run(tmp_path, "train.steps=1", "train.total_batch_size=16", registry=registry)
    assert weights_of(run_dir)["encoder.codebook.initted"].item() == 1
    first = lines_of(run_dir)[0]
    assert first["encoder/codebook_usage"] == 1  # of samples every center has one
    assert first["encoder/perplexity"] > 12
    untouched = build_model(recipe_of(), RegistryWith()).objective.encoder.codebook.codes
    assert not torch.equal(watch.codes, untouched)


def test_codes_of_a_checkpoint_are_not_placed_anew(tmp_path: Path):
    first = run(tmp_path / "first")
    again = run(tmp_path / "again", f"init={first}", "train.steps=1", "optim.lr=1e-9", "encoder.decay=1")
    codes = "encoder.codebook.codes"
    assert torch.allclose(weights_of(again)[codes], weights_of(first)[codes], atol=1e-6)


@pytest.mark.parametrize("options", [(), ("encoder.revive_after=1",)], ids=["plain", "revival"])
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_with_accumulation_learn_what_one_learns(tmp_path: Path, mode: str, options: tuple[str, ...]):
    alone = run(tmp_path / "alone", SGD, *options)
    overrides = (SGD, f"train.distributed={mode}", "train.batch_size=2", *options)
    run_ranks(lambda rank: run(tmp_path / mode, *overrides))
    together = tmp_path / mode / alone.name
    names = ("loss", "loss/commitment", "encoder/codebook_usage", "encoder/perplexity")
    for ours, theirs in zip(lines_of(together), lines_of(alone), strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-5)
    weights = weights_of(together)
    for name, tensor in weights_of(alone).items():
        assert torch.allclose(weights[name].float(), tensor.float(), atol=2e-6), name


def test_all_ranks_hold_the_same_codes(tmp_path: Path):
    """Officially each rank begins with codes of its own."""

    def codes_of(rank: int) -> Tensor:
        codes: list[Tensor] = []

        class Look:
            @hookimpl
            def mim_run_finished(self, run):
                codes.append(run.model.objective.encoder.codebook.codes.clone())

        registry = RegistryWith()
        registry._manager.register(Look())
        run(tmp_path, registry=registry)
        return codes[0]

    first, second = run_ranks(codes_of)
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", [(), ("encoder.revive_after=1",)], ids=["plain", "revival"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, options: tuple[str, ...]):
    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            if path.name.endswith("2"):
                raise KeyboardInterrupt

    straight = run(tmp_path / "straight", "train.steps=4", *options)
    registry = RegistryWith()
    registry._manager.register(Crash())
    changes = ("train.steps=4", "checkpoint.every_steps=1", *options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", *changes, registry=registry)
    resumed = run(tmp_path / "resumed", *changes)
    assert [line["loss"] for line in lines_of(resumed)] == [line["loss"] for line in lines_of(straight)]
    weights = weights_of(resumed)
    assert {"encoder.codebook.codes", "encoder.codebook.initted"} <= weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(straight).items())


def test_bfloat16_stays_near_float32(tmp_path: Path):
    full = [line["loss"] for line in lines_of(run(tmp_path / "full"))]
    half = [line["loss"] for line in lines_of(run(tmp_path / "half", "train.precision=bfloat16"))]
    assert half == pytest.approx(full, rel=2e-2)
    assert half != full


def test_a_loaded_run_gives_ids_of_trained_codes(tmp_path: Path):
    loaded = load_run(run(tmp_path))
    encoder = loaded.objective.encoder.eval()
    views = loaded.views.prepare(None, loaded.views.example(2))
    with torch.no_grad():
        latent = encoder(views["x"], Mask.none(2, GRID), EVERYTHING)
    vectors = encoder.vectors(latent.aux["features"])
    assert torch.equal(latent.aux["ids"], nearest_codes(vectors, encoder.codebook.codes))
    assert not any(isinstance(module, nn.Identity) for module in encoder.vit.children())
