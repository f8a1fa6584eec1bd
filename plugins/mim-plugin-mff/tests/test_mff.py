"""The fusion, by hand and by property, on encoders of either kind. Official numbers are in parity/."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mim_plugin_mae.checkpoints import MMPretrainCheckpoint as MAECheckpoint
from mim_plugin_mff import FusedPrediction, MMPretrainCheckpoint
from mim_plugin_mff.objective import Fusion, levels_of
from safetensors.torch import load_file
from tiny import RECIPE
from torch import Tensor, nn

from mim_framework import Ask, Encoder, EncoderSpec, Grid, Latent, Mask, Masked, RecipeError
from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.preflight import make_step, preflight
from mim_framework.base.errors import CheckpointError
from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.checkpoints.checkpoint import find_latest
from mim_framework.convert import export_run, import_checkpoint
from mim_framework.nn.masking import mask_from_noise
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.runtime.optim import parameter_groups
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train

GRID = Grid((4, 4))
ON_MAE = {"encoder": {"type": "mae_vit", "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}}
ON_VIT = {
    "encoder": {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "relative_bias": "shared"},
    "decoder": "linear",
}
KINDS = pytest.mark.parametrize("slots", [ON_MAE, ON_VIT], ids=["visible tokens only", "a token at every position"])


def recipe_at(folder: Path, *overrides: str, layers: list[int] | None = None, registry: Any = None, **slots: Any):
    file = folder / "recipe_in.yaml"
    objective = {"type": "mff", **({} if layers is None else {"layers": layers})}
    file.write_text(json.dumps({**RECIPE, "objective": objective, **slots}))
    return load_recipe(file, [f"output_dir={folder}", *overrides], registry or Registry())


def make_objective(folder: Path, layers: list[int] | None = None, registry: Any = None, **slots: Any) -> Any:
    recipe = recipe_at(folder, layers=layers, registry=registry, **slots)
    return build_model(recipe, registry or Registry()).objective


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask() -> Mask:
    return mask_from_noise(torch.rand(2, 16, generator=torch.Generator().manual_seed(3)), num_keep=4, grid=GRID)


def sequence(latent: Latent) -> Tensor:
    assert latent.prefix is not None
    return torch.cat([latent.prefix, latent.tokens], dim=1)


# --- the sum ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_fused_value_by_hand():
    fusion = Fusion(1, 3)
    fusion.proj_weights.copy_(torch.tensor([1.0, 2.0, 1.0]).log().reshape(3, 1, 1, 1))  # weights 1/4, 1/2, 1/4
    for projection, (factor, bias) in zip(fusion.proj_layers, [(10.0, 1.0), (100.0, 2.0)], strict=True):
        projection.weight.fill_(factor)
        projection.bias.fill_(bias)
    levels = [torch.full((1, 1, 1), value) for value in (2.0, 3.0, 4.0)]
    assert fusion(levels).item() == pytest.approx(21 / 4 + 302 / 2 + 4 / 4)
    assert fusion.weights().tolist() == pytest.approx([0.25, 0.5, 0.25])


def test_one_product_is_the_sum_of_the_projections_in_value_and_gradient():
    torch.manual_seed(0)
    fusion = Fusion(8, 4)
    nn.init.normal_(fusion.proj_weights)
    levels = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(4)]
    projected = [*(p(x) for p, x in zip(fusion.proj_layers, levels, strict=False)), levels[-1]]
    written_out = (fusion.proj_weights.softmax(0) * torch.stack(projected)).sum(0)
    assert torch.allclose(fusion(levels), written_out, atol=1e-6)
    wanted = torch.autograd.grad(written_out.square().sum(), [*fusion.parameters(), *levels])
    ours = torch.autograd.grad(fusion(levels).square().sum(), [*fusion.parameters(), *levels])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, wanted, strict=True))


def test_the_fusion_begins_with_equal_weights_and_xavier_projections():
    torch.manual_seed(0)
    fusion = Fusion(64, 6)
    assert fusion.weights().tolist() == pytest.approx([1 / 6] * 6)
    bound = math.sqrt(6 / (64 + 64))
    assert 0.98 * bound < max(p.weight.abs().max().item() for p in fusion.proj_layers) <= bound
    assert all(not p.bias.any() for p in fusion.proj_layers)


def test_the_fusion_of_the_published_model_has_the_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Fusion(768, 6).parameters()) == 2_952_966


@KINDS
@torch.no_grad()
def test_all_the_weight_on_the_last_block_gives_the_encoders_own_tokens(tmp_path, images, mask, slots):
    objective = make_objective(tmp_path, **slots)
    plain = objective.encoder(images, mask)
    assert not torch.allclose(objective.encode(Masked({"x": mask}, {"x": images})).tokens, plain.tokens, atol=0.01)
    objective.fusion.proj_weights[-1] = 100.0
    fused = objective.encode(Masked({"x": mask}, {"x": images}))
    assert torch.allclose(sequence(fused), sequence(plain), atol=1e-6)
    assert fused.ids is plain.ids is None or torch.equal(fused.ids, plain.ids)


@KINDS
@torch.no_grad()
def test_a_shallow_level_is_projected_and_normed_as_the_encoder_norms(tmp_path, images, mask, slots):
    objective = make_objective(tmp_path, layers=[1, 3], **slots)
    objective.fusion.proj_weights[0] = 100.0
    objective.fusion.proj_layers[0].weight.copy_(2 * torch.eye(16))
    objective.encoder.norm.bias.fill_(5.0)
    shallow = objective.encoder(images, mask, Ask(layers=frozenset({1}))).layers[1]
    wanted = nn.functional.layer_norm(2 * shallow, (16,), eps=1e-6) + 5
    assert torch.allclose(sequence(objective.encode(Masked({"x": mask}, {"x": images}))), wanted, atol=1e-5)


@torch.no_grad()
def test_one_level_is_the_method_without_fusion(tmp_path, images, mask):
    objective = make_objective(tmp_path, layers=[-1], **ON_MAE)
    assert torch.equal(
        sequence(objective.encode(Masked({"x": mask}, {"x": images}))), sequence(objective.encoder(images, mask))
    )
    trained = [name for name, p in objective.named_parameters() if p.requires_grad and name.startswith("fusion")]
    assert trained == []


@KINDS
def test_every_parameter_gets_a_gradient(tmp_path, slots):
    for layers in (None, [-1], [0, 1, 2, 3]):
        model = build_model(recipe_at(tmp_path, layers=layers, **slots), Registry())
        assert preflight(model, torch.device("cpu"))["main"] > 0


@KINDS
def test_autocast_keeps_the_sum_in_full_precision_and_near_it(tmp_path, images, mask, slots):
    objective = make_objective(tmp_path, **slots)
    exact = sequence(objective.encode(Masked({"x": mask}, {"x": images})))
    with torch.autocast("cpu", torch.bfloat16):
        latent = objective.encode(Masked({"x": mask}, {"x": images}))
        fused = objective.fusion([latent.layers[i] for i in objective.layers])
    assert fused.dtype == torch.float32
    assert torch.allclose(sequence(latent).float(), exact, atol=0.06)
    sequence(latent).float().square().sum().backward()
    assert objective.fusion.proj_weights.grad.dtype == torch.float32


# --- which layers ----------------------------------------------------------------------------------------------------


def spec_of(depth: int, **changes: Any) -> EncoderSpec:
    layers = range(depth)
    spec = EncoderSpec(
        dim=16, grid=GRID, stride=4, depth=depth, num_heads=1,
        offers=Ask(layers=frozenset(layers)), layers=dict.fromkeys(layers, (16, GRID)),
    )  # fmt: skip
    return replace(spec, **changes)


@pytest.mark.parametrize(
    ("depth", "levels"),
    [
        (12, (0, 2, 4, 6, 8, 11)),  # mmpretrain's configs/mff
        (24, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23)),
        (5, (0, 2, 4)), (4, (0, 3)), (3, (0, 2)), (2, (0, 1)), (1, (0,)),
    ],
)  # fmt: skip
def test_by_default_every_second_block_and_the_last(depth, levels):
    assert levels_of(None, "any", spec_of(depth)) == levels


def test_layers_count_from_the_end_if_negative():
    assert levels_of([0, -6, 8, -1], "any", spec_of(12)) == (0, 6, 8, 11)


HIERARCHY = spec_of(4, layers={0: (4, Grid((16, 16))), 1: (8, Grid((8, 8))), 2: (16, GRID), 3: (16, GRID)})


@pytest.mark.parametrize(
    ("layers", "spec", "message"),
    [
        ([0, 12], spec_of(12), r"encoder 'swin' do not fit: layers \[0, 12\], the encoder hands out 0 to 11"),
        ([-13, 11], spec_of(12), r"layers \[-13, 11\], the encoder hands out 0 to 11"),
        ([0, 3], spec_of(4, offers=Ask(layers=frozenset({1, 3}))), r"layers \[0, 3\], the encoder hands out 1, 3"),
        ([2, 0, 11], spec_of(12), r"layers \[2, 0, 11\] must increase, which blocks \[2, 0, 11\] do not"),
        ([11, -1], spec_of(12), r"layers \[11, -1\] must increase, which blocks \[11, 11\] do not"),
        (
            [0, 8],
            spec_of(12),
            r"layers \[0, 8\] must end with the last block, 11 of encoder 'swin': later ones would not be trained",
        ),
        (
            None,
            spec_of(4, offers=Ask()),
            "objective 'mff' and encoder 'swin' do not fit: the encoder hands out none of its layers",
        ),
        (
            [1, 3],
            HIERARCHY,
            "objective 'mff' and encoder 'swin' do not fit: fused layers need one width and one grid, "
            "but layer 1 has width 8 on grid 8x8 and the encoder's output 16 on 4x4",
        ),
        (None, HIERARCHY, "layer 0 has width 4 on grid 16x16 and the encoder's output 16 on 4x4"),
        (None, spec_of(3, offers=Ask(layers=frozenset({1}))), r"by default it takes 0, 2, the encoder hands out 1$"),
    ],
)
def test_layers_that_cannot_be_fused_are_refused(layers, spec, message):
    with pytest.raises(ValueError, match=message):
        levels_of(layers, "swin", spec)


def test_a_hierarchical_encoder_can_fuse_the_blocks_of_its_last_stage():
    assert levels_of([2, 3], "swin", HIERARCHY) == (2, 3)


@pytest.mark.parametrize(
    ("layers", "slots", "message"),
    [
        ([0, 4], ON_MAE, r"recipe_in.yaml:1:\d+: objective: mff: objective 'mff' and encoder 'mae_vit' do not fit"),
        ([], ON_MAE, r"objective.layers: must have at least 1 entr"),
        (
            None,
            {"encoder": {"type": "timm", "model": "vit_tiny_patch16_224"}, "masker": "none", "decoder": "linear"},
            "encoder 'timm' do not fit: the encoder hands out none of its layers, there is nothing to fuse",
        ),
    ],
)
def test_a_recipe_is_refused_with_its_place(tmp_path, layers, slots, message):
    with pytest.raises(RecipeError, match=message):
        make_objective(tmp_path, layers=layers, **slots)


# --- other components ------------------------------------------------------------------------------------------------


class Plain(Encoder):
    """No prefix tokens, no final norm: each layer doubles, so that the layers of an image of ones are 2, 4, 8."""

    name = "plain"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.factor = nn.Parameter(torch.tensor([2.0]))
        self.spec = spec_of(3, dim=1, layers={})

    def forward(self, view, mask, ask=Ask()):
        x = nn.functional.avg_pool2d(view[:, :1], 4).flatten(1)[..., None]
        layers = {}
        for i in range(3):
            x = self.factor * x
            if i in ask.layers:
                layers[i] = x
        return Latent(x, GRID, layers=layers)


class Curious(LinearDecoder):
    """Wants a layer of its own."""

    name = "curious"
    ask = Ask(layers=frozenset({1}))

    def forward(self, latent, mask):
        assert latent.layers.keys() == {0, 1, 2}
        return super().forward(latent, mask)


def test_an_encoder_without_prefix_and_norm_and_a_decoder_that_asks_for_layers_too(tmp_path, images, mask):
    registry = RegistryWith(Plain, Curious)
    objective = make_objective(tmp_path, layers=[0, 2], registry=registry, encoder="plain", decoder="curious")
    with torch.no_grad():
        objective.fusion.proj_layers[0].weight.fill_(10)
        latent = objective.encode(Masked({"x": mask}, {"x": torch.ones_like(images)}))
    assert latent.prefix is None
    assert latent.tokens.flatten().unique().item() == pytest.approx((10 * 2 + 8) / 2)
    step = make_step(recipe_at(tmp_path, registry=registry, encoder="plain", decoder="curious"), torch.arange(2))
    assert objective(step, {"x": images}).losses["main"].item() > 0


def test_the_heads_share_one_fusion(tmp_path, images):
    head = {name: RECIPE[name] for name in ("target", "decoder", "loss")}
    slots = {"heads": {"a": head, "b": {**head, "weight": 0.5}}, "target": None, "decoder": None, "loss": None}
    objective = make_objective(tmp_path, **ON_MAE, **slots)
    fused = []
    objective.fusion.register_forward_hook(lambda *_: fused.append(1))
    losses = objective(make_step(recipe_at(tmp_path, **ON_MAE, **slots), torch.arange(2)), {"x": images}).losses
    assert losses.keys() == {"a", "b"}
    assert fused == [1]


# --- training --------------------------------------------------------------------------------------------------------


def test_tokens_and_positions_do_not_decay_and_the_fusion_does(tmp_path):
    on_mae = make_objective(tmp_path, **ON_MAE)
    assert exempt_names(on_mae) == {"encoder.cls_token", "heads.main.decoder.mask_token"}
    on_vit = make_objective(tmp_path, **ON_VIT)
    assert exempt_names(on_vit) == {"encoder.cls_token", "encoder.mask_token", "encoder.pos_embed"}
    [decayed] = [g["names"] for g in parameter_groups(on_mae.named_parameters(), exempt_names(on_mae)) if g["decay"]]
    fusion = {name for name in decayed if name.startswith("fusion.")}
    assert fusion == {"fusion.proj_weights", "fusion.proj_layers.0.weight"}


def test_the_weights_of_the_blocks_are_logged_and_are_those_of_the_checkpoint(tmp_path):
    recipe = recipe_at(tmp_path, "optim.lr=0.1", "optim.warmup_epochs=0", layers=[0, 2, 3], **ON_MAE)
    run_dir = train(recipe, Registry())
    weights = find_latest(run_dir / "checkpoints").tensors("model")["fusion.proj_weights"]
    final = weights.flatten().softmax(0).tolist()
    logged = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line][-1]
    assert [logged[f"mff/weight_of_block_{i}"] for i in (0, 2, 3)] == pytest.approx(final)
    assert max(final) - min(final) > 1e-3


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_timm_gets_the_encoder_without_the_fusion(tmp_path, images):
    run_dir = train(recipe_at(tmp_path, **ON_MAE), Registry())
    file = export_run(run_dir, "timm")
    assert not [name for name in load_file(file) if "proj_layers" in name or "proj_weights" in name]
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=0
    ).eval()
    theirs.load_state_dict(load_file(file))
    objective = build_model(recipe_at(tmp_path, f"init={run_dir}", **ON_MAE), Registry()).objective.eval()
    with torch.no_grad():
        ours = objective.encoder(images, Mask.none(2, GRID))
        assert torch.allclose(theirs.forward_features(images), sequence(ours), atol=1e-5)
    official = torch.load(export_run(run_dir, "official"), weights_only=True)["model"]
    assert {"cls_token", "decoder_pred.weight"} <= official.keys()
    assert not [name for name in official if "proj_layers" in name or "proj_weights" in name]


def to_mmpretrain(name: str) -> str:
    """Our name to mmpretrain's, written down the other way round than the plugin has it."""
    if name.startswith("fusion."):
        return "backbone." + name.removeprefix("fusion.")
    part = "backbone." if name.startswith("encoder.") else "neck."
    name = (
        name.removeprefix("encoder.")
        .removeprefix("heads.main.decoder.")
        .replace("patch_embed.proj", "patch_embed.projection")
    )
    for ours, theirs in (
        ("decoder_norm.", "ln1."), ("norm1.", "ln1."), ("norm2.", "ln2."),
        ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    name = "ln1." + name.removeprefix("norm.") if name.startswith("norm.") else name
    return part + (name.replace("blocks.", "layers.", 1) if part == "backbone." else name)


def test_mmpretrain_checkpoints_are_read_and_told_from_those_of_mae(tmp_path):
    ours = make_objective(tmp_path, layers=[0, 1, 3], **ON_MAE).state_dict()
    theirs = {to_mmpretrain(name): tensor for name, tensor in ours.items()}
    assert {
        "backbone.proj_layers.1.bias",
        "backbone.proj_weights",
        "backbone.ln1.weight",
        "neck.ln1.bias",
    } <= theirs.keys()
    layout = MMPretrainCheckpoint()
    imported = layout.import_state(theirs)
    assert imported.keys() == ours.keys()
    assert all(imported[name] is tensor for name, tensor in ours.items())
    assert layout.recognises(theirs)
    assert not MAECheckpoint().recognises(theirs)
    plain = {name: tensor for name, tensor in theirs.items() if "proj_layers" not in name and "proj_w" not in name}
    assert MAECheckpoint().recognises(plain)
    assert not layout.recognises(plain)
    with pytest.raises(ValueError, match="it can be read only"):
        layout.export_state(ours)


def test_the_levels_are_asked_for_where_no_published_model_tells_them(tmp_path):
    ours = make_objective(tmp_path, layers=[0, 1, 3], **ON_MAE).state_dict()
    theirs = {to_mmpretrain(name): tensor for name, tensor in ours.items()}
    torch.save({"meta": {"epoch": 3}, "state_dict": theirs}, tmp_path / "mff.pth")
    options: dict[str, Any] = {"encoder.num_heads": 2, "decoder.num_heads": 2}
    with pytest.raises(CheckpointError, match="does not tell objective.layers; give the value"):
        import_checkpoint(tmp_path / "mff.pth", tmp_path / "imported", options=options)
    with pytest.raises(CheckpointError, match="'fusion.proj_weights' is"):
        import_checkpoint(tmp_path / "mff.pth", tmp_path / "imported", options=options | {"objective.layers": [0, 3]})
    report = import_checkpoint(
        tmp_path / "mff.pth", tmp_path / "imported", options=options | {"objective.layers": [0, 1, 3]}
    )
    assert (report.format, report.missing, report.unexpected) == ("mff_mmpretrain", {}, {})
    slots = (tmp_path / "imported" / "slots.yaml").read_text()
    assert "type: mff\n" in slots
    assert "type: resized_crop" in slots
    imported = load_file(tmp_path / "imported" / "weights.safetensors")
    assert all(torch.equal(imported[name], tensor) for name, tensor in ours.items())


def test_the_levels_of_the_published_models_are_known():
    blocks = {f"backbone.layers.{i}.attn.qkv.bias": torch.zeros(1) for i in range(12)}
    state = blocks | {
        "backbone.proj_weights": torch.zeros(6, 1, 1, 1),
        "backbone.cls_token": torch.zeros(1, 1, 768),
        "backbone.pos_embed": torch.zeros(1, 197, 768),
        "backbone.patch_embed.projection.weight": torch.zeros(768, 3, 16, 16),
        "backbone.layers.0.ffn.layers.0.0.weight": torch.zeros(3072, 768),
    }
    slots = MMPretrainCheckpoint().to_recipe(state)
    assert slots["objective"]["type"] == "mff"
    assert slots["objective"]["layers"].value == [0, 2, 4, 6, 8, 11]
    assert slots["views"] == {"type": "resized_crop", "img_size": 224}
    assert slots["encoder"]["num_heads"].value == 12  # a guess


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_shipped_recipes_have_the_official_rates_and_levels():
    registry = Registry()
    names = {info.name for info in registry.recipes() if info.plugin == "mff"}
    protocols = {"mff_finetune": 2e-3, "mff_linear": 6.4}
    assert names == {"mff", "mff_800e", "mff_simmim_vit", "mff_quickstart", *protocols}
    for name, rate in protocols.items():
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(rate)
        assert (recipe.objective.type, recipe.encoder.type) == ("classify", "mae_vit")
    for name, epochs, factor in (("mff", 300, 1e-4), ("mff_800e", 800, 1e-9)):
        recipe = load_recipe(name, registry=registry)
        assert recipe.train.epochs == epochs
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(2.4e-3)
        assert recipe.optim.warmup_lr == pytest.approx(2.4e-3 * factor)
        assert recipe.views.type == "resized_crop"
        assert list(recipe.objective.options["layers"]) == [0, 2, 4, 6, 8, 11]
    load_recipe("mff_quickstart", registry=registry)


def test_the_published_model_has_the_published_size():
    with torch.device("meta"):
        model = build_model(load_recipe("mff"), Registry(), with_weights=False)
    assert isinstance(model.objective, FusedPrediction)
    assert sum(tensor.numel() for tensor in model.objective.state_dict().values()) == 114_860_806


def test_on_simmim_only_the_objective_is_new():
    pytest.importorskip("mim_plugin_simmim")
    ours, theirs = (load_recipe(name).model_dump() for name in ("mff_simmim_vit", "simmim_vit_base"))
    assert ours["encoder"]["type"] == "simmim_vit"
    assert {key for key in ours if ours[key] != theirs[key]} <= {"name", "objective", "checkpoint"}


def test_of_simmims_encoders_the_vit_can_be_fused_and_the_swin_only_in_its_last_stage(tmp_path, images):
    pytest.importorskip("mim_plugin_simmim")
    vit = {"type": "simmim_vit", "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    objective = make_objective(tmp_path, encoder=vit, decoder="linear")
    step = make_step(recipe_at(tmp_path, encoder=vit, decoder="linear"), torch.arange(2))
    assert objective(step, {"x": images}).losses["main"].item() > 0
    swin = {
        "encoder": {"type": "simmim_swin", "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
        "views": {"type": "image", "img_size": 32},
        "decoder": "linear",
        "target": {"type": "pixels", "patch_size": 8},
    }
    wanted = "objective 'mff' and encoder 'simmim_swin' do not fit: fused layers need one width and one grid"
    with pytest.raises(RecipeError, match=wanted):
        make_objective(tmp_path, **swin)
    model = build_model(recipe_at(tmp_path, layers=[1, 2], **swin), Registry())
    assert preflight(model, torch.device("cpu"))["main"] > 0
