"""The built-in `vit` and the vision transformers of timm: out, in, and what a plain one is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from mim_framework.assembly.builder import Model, build_model
from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.contract.mask import Mask
from mim_framework.convert import export_run, import_checkpoint
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry

REGISTRY = Registry()
SIZES = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SHARED = {"position": "none", "relative_bias": "shared", "qkv_bias": "qv", "layer_scale": 0.1}


def run_of(folder: Path, **options: Any) -> Model:
    """A run of one checkpoint, whose weights are no initial ones."""
    recipe = {
        "name": "run",
        "data": {"source": "digits"},
        "views": {"type": "image", "img_size": 32},
        "masker": {"type": "random", "mask_ratio": 0.3},
        "encoder": {"type": "vit", **SIZES, **options},
        "target": {"type": "pixels", "norm_pix_loss": True},
        "decoder": "linear",
        "loss": "l1",
        "optim": {"lr": 1e-3},
        "train": {"total_batch_size": 2, "steps": 1},
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = build_model(load_recipe(folder / "recipe.yaml", [], REGISTRY), REGISTRY)
    (folder / "recipe.yaml").write_text(dump_recipe(model.recipe))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.objective.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_checkpoint(folder / "checkpoints", 1, {"model": model.objective.state_dict()}, {})
    return model


def features(model: Model, images: torch.Tensor) -> torch.Tensor:
    encoder = model.objective.encoder.eval()
    latent = encoder(images, Mask.none(len(images), encoder.spec.grid))
    return torch.cat([latent.prefix, latent.tokens], dim=1)


VARIANTS = [
    {},
    {"position": "sincos", "qkv_bias": "none"},
    {"layer_scale": 0.1, "qkv_bias": "qv"},
    SHARED,
    {"relative_bias": "per_block", "qkv_bias": "none"},
]


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS)
def test_timm_computes_the_features_of_an_exported_vit(tmp_path: Path, options: dict[str, Any]):
    model = run_of(tmp_path / "run", **options)
    state = load_file(export_run(tmp_path / "run", "timm"))
    shape = {"img_size": 32, **SIZES, "num_classes": 0, "init_values": options.get("layer_scale")}
    if options.get("relative_bias"):
        shape |= {"use_abs_pos_emb": "pos_embed" in state, "use_rel_pos_bias": True, "global_pool": "token"}
        theirs = Beit(**shape, qkv_bias=options["qkv_bias"] == "qv")
    else:
        theirs = VisionTransformer(**shape, qkv_bias=options.get("qkv_bias") != "none")
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(theirs.eval().forward_features(images), features(model, images), atol=1e-5)


@pytest.mark.parametrize("options", [*VARIANTS, {"final_norm": False}])
def test_an_exported_vit_comes_back_with_its_slots(tmp_path: Path, options: dict[str, Any]):
    model = run_of(tmp_path / "run", **options)
    report = import_checkpoint(export_run(tmp_path / "run", "timm"), tmp_path / "in", REGISTRY)
    state, imported = model.objective.state_dict(), load_file(tmp_path / "in" / "weights.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in imported.items())
    assert set(report.missing) == {"encoder.mask_token", *(n for n in state if n.startswith("heads."))}
    slots = yaml.safe_load((tmp_path / "in" / "slots.yaml").read_text())
    recipe = model.recipe.model_dump(mode="json")
    assert all(slots[slot] == recipe[slot] for slot in slots if slot != "init")


def test_biases_of_all_three_beside_relative_ones_have_no_place_in_timm(tmp_path: Path):
    run_of(tmp_path / "run", relative_bias="shared")
    with pytest.raises(CheckpointError, match="the key has no bias, in this run it has one"):
        export_run(tmp_path / "run", "timm")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "classifier"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 5}, True),
        ("deit3_small_patch16_224", {"num_classes": 0, "no_embed_class": False}, False),
        ("beit_base_patch16_224", {"num_classes": 3}, True),
    ],
)
def test_a_supervised_vit_is_no_mae_and_is_imported_as_what_it_is(
    tmp_path: Path, name: str, options: dict[str, Any], classifier: bool
):
    shape = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
    theirs = timm.create_model(name, **shape, **options).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    report = import_checkpoint(tmp_path / "timm.safetensors", tmp_path / "in", options={"encoder.num_heads": 3})
    assert report.format == "vit_timm"
    assert ("a plain ViT of timm with a classifier, which is left out" in str(report)) == classifier
    assert "name its layout, for example --layout mae_official" in str(report)
    assert {"masker.type random", "target.type pixels"} <= report.guesses.keys()
    slots = yaml.safe_load((tmp_path / "in" / "slots.yaml").read_text())
    rest = {"name": "r", "data": {"source": "digits"}, "optim": {"lr": 1}, "train": {"total_batch_size": 2, "steps": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(slots | rest))
    model = build_model(load_recipe(tmp_path / "recipe.yaml", [], REGISTRY), REGISTRY)
    images = torch.randn(2, 3, 32, 32)
    wanted = theirs.forward_features(images)
    if "encoder.norm.weight is the file's encoder.fc_norm.weight" in str(report):  # timm applies it after pooling
        wanted = theirs.fc_norm(wanted)
    assert torch.allclose(features(model, images), wanted, atol=1e-4)


def test_an_encoder_of_mae_without_decoder_is_told_by_its_fixed_positions(tmp_path: Path):
    options = {"encoder.num_heads": 3}
    run_of(tmp_path / "run", position="sincos")
    state = load_file(export_run(tmp_path / "run", "timm"))
    save_file(state, tmp_path / "mae.safetensors")  # without the record
    assert import_checkpoint(tmp_path / "mae.safetensors", tmp_path / "a", options=options).format == "mae_official"
    state["pos_embed"] = state["pos_embed"] + 0.1 * torch.randn_like(state["pos_embed"])
    save_file(state, tmp_path / "vit.safetensors")
    assert import_checkpoint(tmp_path / "vit.safetensors", tmp_path / "b", options=options).format == "vit_timm"
    report = import_checkpoint(tmp_path / "vit.safetensors", tmp_path / "c", layout="mae_official", options=options)
    assert report.format == "mae_official"
