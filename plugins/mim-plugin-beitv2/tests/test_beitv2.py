"""Patch aggregation: what it adds to masked prediction, what it refuses, and runs of both stages."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_beitv2 import PatchAggregation
from parity.protocols import Classes
from safetensors.torch import save_file
from tiny import RECIPE
from torch import Tensor, nn

from mim_framework import Mask, Masked, Outcome, hookimpl
from mim_framework.assembly.builder import Model, build_model
from mim_framework.assembly.opened import load_run
from mim_framework.assembly.preflight import make_step, preflight
from mim_framework.base.errors import RecipeError
from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.losses import CrossEntropyLoss
from mim_framework.checkpoints import checkpoint
from mim_framework.commands.check import report
from mim_framework.contract.records import Ask
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.published import comparison
from mim_framework.training.trainer import train

torch.set_num_threads(1)  # ranks are forked; the suite's conftest says it too, unless the plugin is tested alone

VIT = {"patch_size": 4, "embed_dim": 16, "num_heads": 2}
TOKENIZER = {
    **RECIPE,
    "name": "tokenizer",
    "views": {"type": "image", "img_size": 16, "mean": [0.0] * 3, "std": [1.0] * 3},
    "masker": "none",
    "encoder": {"type": "vqkd", **VIT, "depth": 1, "num_codes": 12, "code_dim": 4},
    "target": "pixels",
    "decoder": {"type": "vqkd_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2},
    "loss": "cosine",
}
BEIT = {
    **RECIPE,
    "name": "beit",
    "views": {
        "type": "beit", "img_size": 16, "second_size": 16, "second_interpolation": "bicubic", "color_jitter": 0.0,
    },
    "masker": {"type": "block", "mask_ratio": 0.4, "min_num_patches": 2},
    "encoder": {"type": "beit", **VIT, "depth": 3},
    "target": {"type": "token_ids", "vocab_size": 12},
    "decoder": "linear",
    "loss": "cross_entropy",
    "objective": {"type": "beit_v2", "early_layers": 2, "head_layers": 2},
}  # fmt: skip
SGD = "optim={type: momentum, lr: 0.05, shape: constant, weight_decay: 0, options: {momentum: 0.0}}"
"""Adam would turn the rounding of a gradient that is zero into a step of full size."""


def model_of(**changes: Any) -> Model:
    return build_model(Recipe.model_validate({**BEIT, **changes}), RegistryWith())


def run(folder: Path, recipe: dict[str, Any], *overrides: str, registry: RegistryWith | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "recipe_in.yaml"
    file.write_text(json.dumps(recipe))
    registry = registry or RegistryWith()
    return train(load_recipe(file, [f"output_dir={folder}", "train.steps=3", *overrides], registry), registry)


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    return checkpoint.find_latest(run_dir / "checkpoints").tensors("model")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("tokenizer"), TOKENIZER)


def outcome_and_views(model: Model) -> tuple[Outcome, dict[str, Tensor]]:
    views = model.views.prepare(None, model.views.example(2))
    views["token_ids"] = torch.arange(32).reshape(2, 16) % 12
    step = make_step(model.recipe, torch.arange(2))
    return model.objective(step, views), views


# --- the second prediction -------------------------------------------------------------------------------------------


def test_each_head_predicts_twice_and_both_losses_count_alike():
    model = model_of(target=None, decoder=None, loss=None, heads={
        "ids": {"target": {"type": "token_ids", "vocab_size": 12}, "decoder": "linear", "loss": "cross_entropy"},
        "pixels": {"target": "pixels", "decoder": "linear", "loss": "mse", "weight": 0.5},
    })  # fmt: skip
    (losses, metrics, _), views = outcome_and_views(model)
    assert list(losses) == ["ids", "ids_cls", "pixels", "pixels_cls"]
    objective, step = model.objective, make_step(model.recipe, torch.arange(2))
    masked = objective.masker(step, views)
    mask, head = masked.masks["x"], objective.heads["pixels"]
    latent = objective.encode(Masked({"x": mask}, {"x": views["x"]}))
    for name, each in (("pixels", latent), ("pixels_cls", objective.aggregate(latent))):
        whole = head.loss(head.decoder(each, mask), head.target(step, masked), mask, each).loss
        assert losses[name].item() == pytest.approx(0.5 * whole.item())
    assert metrics.keys() == {"heads.ids.loss/accuracy", "heads.ids_cls.loss/accuracy"}


def test_early_patches_know_late_blocks_through_the_class_token_alone():
    """Another third block changes the second prediction only if its class token may."""
    objective = model_of().objective.eval()
    images, mask = torch.randn(2, 3, 16, 16), Mask.none(2, objective.encoder.spec.grid)
    latent = objective.encode(Masked({"x": mask}, {"x": images}))
    before = objective.aggregate(latent).tokens
    late = dict(latent.layers)
    late[objective.last] = torch.cat([late[2][:, :1], torch.randn(2, 16, 16)], dim=1)
    assert torch.equal(objective.aggregate(replace(latent, layers=late)).tokens, before)
    late[objective.last] = torch.cat([torch.randn(2, 1, 16), latent.layers[2][:, 1:]], dim=1)
    assert not torch.allclose(objective.aggregate(replace(latent, layers=late)).tokens, before, atol=1e-3)


def test_norm_and_head_are_shared_or_of_their_own():
    shared, own = model_of(), model_of(objective={**BEIT["objective"], "shared_head": False})
    names = {name for name, _ in own.objective.named_parameters()} - {n for n, _ in shared.objective.named_parameters()}
    head = "cls_decoders.main.head"
    assert names == {"cls_norm.weight", "cls_norm.bias", f"{head}.weight", f"{head}.bias"}
    first = own.objective.heads["main"].decoder.head.weight
    assert not torch.equal(own.objective.cls_decoders["main"].head.weight, first)
    (losses, _, _), _ = outcome_and_views(own)
    assert torch.autograd.grad(losses["main_cls"], first, allow_unused=True) == (None,)


def test_all_that_trains_gets_a_gradient(tokenizer: Path):
    for shared in (True, False):
        preflight(
            model_of(tokenizer=str(tokenizer), objective={**BEIT["objective"], "shared_head": shared}),
            torch.device("cpu"),
        )


def test_kNN_and_export_see_the_plain_encoder():
    objective = model_of().objective
    assert not any("cls_blocks" in name for name, _ in objective.encoder.named_parameters())
    assert isinstance(objective, PatchAggregation)
    assert len(objective.cls_blocks) == 2


# --- how the added blocks begin --------------------------------------------------------------------------------------


def test_stochastic_depth_goes_on_along_the_ramp():
    """0.1 over 12 blocks; the blocks after the ninth of the base model have .0818 and .0909."""
    encoder = {"type": "beit", **VIT, "depth": 12, "drop_path_rate": 0.1}
    objective = model_of(encoder=encoder, objective={"type": "beit_v2", "early_layers": 9}).objective
    assert [round(block.drop_path1.drop_prob, 4) for block in objective.cls_blocks] == [0.0818, 0.0909]
    deep = model_of(encoder={**encoder, "depth": 3}, objective={"type": "beit_v2", "early_layers": 2, "head_layers": 4})
    assert [block.drop_path1.drop_prob for block in deep.objective.cls_blocks] == pytest.approx([0.04, 0.06, 0.08, 0.1])


def test_added_blocks_begin_as_officially_with_values_of_pytorch():
    encoder = {"type": "beit", **VIT, "embed_dim": 192, "depth": 3}
    objective = model_of(encoder=encoder).objective
    bound = 1 / math.sqrt(192)
    for number, block in enumerate(objective.cls_blocks, start=3):
        assert block.attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert block.mlp.fc1.bias.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert block.attn.proj.weight.abs().max().item() == pytest.approx(bound / math.sqrt(2 * number), rel=0.01)
        assert block.mlp.fc2.weight.abs().max().item() == pytest.approx(bound / 2 / math.sqrt(2 * number), rel=0.01)
        assert not block.attn.q_bias.any()
        assert block.gamma_1.unique().item() == pytest.approx(0.1)
    assert objective.encoder.blocks[0].attn.qkv.weight.abs().max() <= 0.02


def test_bias_tables_of_added_blocks_decay_as_those_of_the_encoder():
    encoder = {**BEIT["encoder"], "relative_bias": "per_block"}
    assert list(model_of(encoder=encoder).objective.no_weight_decay()) == []
    objective = model_of(encoder={**encoder, "decay_bias_tables": False}).objective
    assert list(objective.no_weight_decay()) == [f"cls_blocks.{i}.attn.relative_position_bias_table" for i in range(2)]


# --- what does not fit -----------------------------------------------------------------------------------------------


class LayerDecoder(LinearDecoder):
    name = "layers_of_the_tests"
    ask = Ask(layers=frozenset({0}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"encoder": {"type": "mae_vit", **VIT, "depth": 3}, "masker": {"type": "random"}, "decoder": "mae_decoder"},
            "objective 'beit_v2' and encoder 'mae_vit' do not fit: it adds blocks to a plain vision transformer with "
            "mask tokens and a class token, such as 'beit'",
        ),
        (
            {"objective": {"type": "beit_v2", "early_layers": 3}},
            "objective 'beit_v2' and encoder 'beit' do not fit: early_layers 3 must be less than the depth, 3",
        ),
        (
            {"decoder": "layers_of_the_tests"},
            "objective 'beit_v2' and decoder 'layers_of_the_tests' do not fit: the decoder asks for more than",
        ),
        (
            {
                "target": None, "decoder": None, "loss": None,
                "heads": {n: {"target": "pixels", "decoder": "linear", "loss": "mse"} for n in ("a", "a_cls")},
            },
            "objective 'beit_v2' calls a loss of head 'a' 'a_cls', which is a head too",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_sides(changes: dict[str, Any], text: str):
    with pytest.raises(RecipeError, match=f"recipe: objective: beit_v2: {text}"):
        build_model(Recipe.model_validate({**BEIT, **changes}), RegistryWith(LayerDecoder))


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_hundred_steps_leave_the_tokenizer_as_it_is_to_the_bit(tokenizer: Path, tmp_path: Path):
    """mmpretrain's goes on moving its codebook in stage two."""
    seen: list[dict[str, Tensor]] = []

    class Look:
        @hookimpl
        def mim_run_started(self, run):
            self.look(run)

        @hookimpl
        def mim_run_finished(self, run):
            self.look(run)

        def look(self, run):
            teacher = run.model.teachers["tokenizer"]
            seen.append({n: t.clone() for n, t in (*teacher.named_parameters(), *teacher.named_buffers())})

    registry = RegistryWith()
    registry._manager.register(Look())
    options = (
        "train.steps=500", "train.total_batch_size=2", "log.every_steps=500", f"tokenizer={tokenizer}",
        "masker={type: random, mask_ratio: 0.5}", "encoder.depth=2",
        "objective={type: beit_v2, early_layers: 1, head_layers: 1}",
    )  # fmt: skip
    run_dir = run(tmp_path, BEIT, *options, registry=registry)
    before, after = seen
    assert before.keys() == after.keys()
    assert "parts.encoder.codebook.codes" in before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = weights_of(tokenizer)
    assert torch.equal(before["parts.encoder.codebook.codes"], trained["encoder.codebook.codes"])
    assert not any("codebook" in name or "tokenizer" in name for name in weights_of(run_dir))
    told = {"heads.main.loss/accuracy", "heads.main_cls.loss/accuracy", "loss/main_cls"}
    assert told <= lines_of(run_dir)[-1].keys()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_with_accumulation_learn_what_one_learns(tmp_path: Path, tokenizer: Path, mode: str, shared: bool):
    options = (SGD, f"tokenizer={tokenizer}", f"objective.shared_head={str(shared).lower()}")
    alone = run(tmp_path / "alone", BEIT, *options)
    run_ranks(lambda rank: run(tmp_path / mode, BEIT, *options, f"train.distributed={mode}", "train.batch_size=2"))
    together = tmp_path / mode / alone.name
    for ours, theirs in zip(lines_of(together), lines_of(alone), strict=True):
        names = ("loss/main", "loss/main_cls")
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-5)
    weights = weights_of(together)
    for name, tensor in weights_of(alone).items():
        assert torch.allclose(weights[name], tensor, atol=2e-6), name


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, tokenizer: Path):
    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            if path.name.endswith("2"):
                raise KeyboardInterrupt

    options = (f"tokenizer={tokenizer}", "encoder.drop_path_rate=0.2")
    straight = run(tmp_path / "straight", BEIT, *options)
    registry = RegistryWith()
    registry._manager.register(Crash())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", BEIT, *options, "checkpoint.every_steps=1", registry=registry)
    resumed = run(tmp_path / "resumed", BEIT, *options)
    weights = weights_of(resumed)
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(straight).items())


def test_a_run_is_loaded_with_its_tokenizer(tmp_path: Path, tokenizer: Path):
    loaded = load_run(run(tmp_path, BEIT, f"tokenizer={tokenizer}"))
    assert loaded.specs.teacher("tokenizer").num_classes == 12
    assert isinstance(loaded.objective.heads["main"].loss, CrossEntropyLoss)


def test_a_tokenizer_of_another_grid_is_refused(tokenizer: Path):
    encoder = {**BEIT["encoder"], "patch_size": 2}
    with pytest.raises(RecipeError, match="target grid 4x4, encoder grid 8x8"):
        model_of(encoder=encoder, tokenizer=str(tokenizer), target="token_ids")


def test_costs_are_counted_with_the_tokenizer(tokenizer: Path):
    recipe = Recipe.model_validate({**BEIT, "tokenizer": str(tokenizer)})
    assert "tokens per image" in report(recipe, RegistryWith())


PROTOCOLS = {  # epochs, warm-up, rate for 1024 images, factor of a layer, drop path, parameters that train
    "beit_v2_finetune": (100, 20, 5e-4, 0.65, 0.1, 86_530_984),
    "beit_v2_finetune_vit_large": (50, 5, 2e-4, 0.8, 0.2, 304_430_568),
    "beit_v2_linear": (100, 0, 4e-3, None, 0, 769_000),
}
SMALL = [
    "data.source={type: digits}", "data.eval_source=null", "views.img_size=16", "encoder.patch_size=4",
    "encoder.embed_dim=16", "encoder.num_heads=2", "encoder.depth=3", "train.total_batch_size=4", "train.batch_size=4",
    "train.device=cpu", "train.precision=float32",
]  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_has_the_official_numbers_and_passes_the_check(name: str):
    recipe = load_recipe(name, [], RegistryWith())
    optim, batch = recipe.optim, recipe.train.total_batch_size
    *numbers, count = PROTOCOLS[name]
    found = recipe.train.epochs, optim.warmup_epochs, optim.peak_lr(batch), optim.layer_decay
    assert [*found, recipe.encoder.options["drop_path_rate"]] == numbers
    assert batch == 1024
    assert comparison(recipe, None, RegistryWith()).endswith("deviations: no pre-training")
    with torch.device("meta"):
        built = build_model(recipe, RegistryWith(), source=Classes(1000))
    assert sum(p.numel() for p in built.objective.parameters() if p.requires_grad) == count
    assert "tokens per image" in report(load_recipe(name, SMALL, RegistryWith()), RegistryWith())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_takes_the_encoder_of_a_run_without_its_added_blocks(name: str, tmp_path: Path):
    before = model_of().objective.state_dict()
    before = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in before.items()}
    save_file({key: tensor.contiguous() for key, tensor in before.items()}, tmp_path / "w.safetensors")
    changes = [*SMALL, f"init={tmp_path / 'w.safetensors'}"]
    built = build_model(load_recipe(name, changes, RegistryWith()), RegistryWith(), source=Classes(10))
    table = "rel_pos_bias.relative_position_bias_table"
    state = built.objective.encoder.state_dict()
    for key, tensor in state.items():
        shared = table if key.startswith("blocks") and key.endswith("bias_table") else key
        assert torch.equal(tensor, before[f"encoder.{shared}"]), key
    assert not any(key.startswith("cls_blocks") for key in built.objective.state_dict())


def test_the_base_model_has_the_official_number_of_parameters():
    encoder = {"type": "beit"}  # ViT-B/16
    changes = {
        "views": {"type": "beit", "second_size": 224, "second_interpolation": "bicubic"},
        "objective": "beit_v2", "encoder": encoder, "target": {"type": "token_ids", "vocab_size": 8192},
    }  # fmt: skip
    with torch.device("meta"):
        model = build_model(Recipe.model_validate({**BEIT, **changes}), RegistryWith(), with_weights=False)
    assert sum(p.numel() for p in model.objective.parameters()) == 106_143_056
    assert all(isinstance(block.norm1, nn.LayerNorm) for block in model.objective.cls_blocks)
