"""Layouts of SimMIM's checkpoints: there and back, into timm, and what each cannot hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mim_plugin_simmim.checkpoints import (
    MMPretrainSwinCheckpoint,
    OfficialSwinCheckpoint,
    OfficialViTCheckpoint,
    TimmSwinCheckpoint,
    TimmViTCheckpoint,
    head_to_official,
    head_to_ours,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, linear, pixel_shuffle

from mim_framework import Grid, Mask, unpatchify
from mim_framework.assembly.builder import Model, build_model
from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.convert import export_run, import_checkpoint
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")

SIZES: dict[str, dict[str, Any]] = {
    "simmim_swin": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "simmim_swinv2": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "simmim_vit": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
SWIN_SIZES = {"img_size": 64, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
"""The same for timm."""


def model_of(encoder: str, img_size: int = 64, **options: Any) -> Model:
    """Every parameter is drawn anew, so that nothing is 0 or 1."""
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "data": {"source": "digits"},
            "views": {"type": "image", "img_size": img_size},
            "masker": {"type": "random", "mask_ratio": 0.5, "mask_patch_size": 32},
            "encoder": {"type": encoder, **SIZES[encoder], **options},
            "target": "pixels",
            "decoder": {"type": "linear", "init": "torch"},
            "loss": "l1",
            "optim": {"lr": 1e-3},
            "train": {"total_batch_size": 2, "steps": 1},
        }
    )
    model = build_model(recipe, Registry())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.objective.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def run_of(model: Model, folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(model.recipe))
    save_checkpoint(folder / "checkpoints", 1, {"model": model.objective.state_dict()}, {})
    return folder


def features(model: Model, images: Tensor) -> Tensor:
    return model.objective.encoder.eval()(images, Mask.none(len(images), Grid((1, 1)))).tokens


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


# --- the head --------------------------------------------------------------------------------------------------------


def test_rows_of_the_head_by_hand():
    """Cells of 2 x 2 pixels: officially the red ones come first, ours are pixel by pixel."""
    official = torch.tensor([11, 12, 13, 14, 21, 22, 23, 24, 31, 32, 33, 34])
    assert head_to_ours(official).tolist() == [11, 21, 31, 12, 22, 32, 13, 23, 33, 14, 24, 34]
    assert torch.equal(head_to_official(head_to_ours(official)), official)


def test_our_patches_are_the_pixels_that_the_official_head_shuffles():
    torch.manual_seed(0)
    weight, bias, tokens = torch.randn(48, 5, 1, 1), torch.randn(48), torch.randn(2, 6, 5)
    official = pixel_shuffle(conv2d(tokens.transpose(1, 2).unflatten(2, (2, 3)), weight, bias), 4)
    ours = unpatchify(linear(tokens, head_to_ours(weight), head_to_ours(bias)), 4, Grid((2, 3)))
    assert torch.allclose(ours, official, atol=1e-5)
    assert torch.equal(head_to_official(head_to_ours(weight)), weight)


# --- official --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", sorted(SIZES))
def test_an_official_export_is_imported_as_the_same_model(encoder: str, tmp_path: Path):
    model = model_of(encoder)
    file = export_run(run_of(model, tmp_path / "run"), "official")
    # No tensor tells the image size of a Swin, and of SwinV2 not the window either: official files hold index buffers.
    options = {"simmim_swin": {"views.img_size": 64}, "simmim_vit": {}}.get(
        encoder, {"views.img_size": 64, "encoder.window_size": 4}
    )
    report = import_checkpoint(file, tmp_path / "imported", options=options)
    assert not report.missing
    assert not report.unexpected
    state, imported = model.objective.state_dict(), load_file(tmp_path / "imported" / "weights.safetensors")
    assert state.keys() == imported.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in imported.items())


def test_index_buffers_of_official_files_tell_image_and_window_and_are_left_out():
    state = OfficialSwinCheckpoint().export_state(model_of("simmim_swinv2").objective.state_dict())
    attention = "encoder.layers.0.blocks.1.attn"
    buffers = {
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        f"{attention}.relative_coords_table": torch.zeros(1, 7, 7, 2),
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16),  # 4 x 4 windows of 4 x 4 tokens of 4 pixels
    }
    layout = OfficialSwinCheckpoint()
    slots = layout.to_recipe(state | buffers)
    assert slots["views"]["img_size"] == 64
    wanted = {"type": "simmim_swinv2", **SIZES["simmim_swinv2"]}
    assert {name: slots["encoder"][name] for name in wanted} == wanted
    assert layout.import_state(state | buffers).keys() == layout.import_state(state).keys()


def test_layouts_recognise_their_own_and_no_other():
    states = {
        name: OfficialViTCheckpoint().export_state(model_of(name).objective.state_dict())
        if name == "simmim_vit"
        else OfficialSwinCheckpoint().export_state(model_of(name).objective.state_dict())
        for name in SIZES
    }
    states["mmpretrain"] = to_mmpretrain(states["simmim_swin"])
    states["fine-tuned"] = {name.removeprefix("encoder."): tensor for name, tensor in states["simmim_swin"].items()}
    found = {
        name: [cls.name for cls in Registry().classes("checkpoint_format").values() if cls().recognises(state)]
        for name, state in states.items()
    }
    assert found == {
        "simmim_swin": ["simmim_swin_official"],
        "simmim_swinv2": ["simmim_swin_official"],
        "simmim_vit": ["simmim_vit_official"],
        "mmpretrain": ["simmim_swin_mmpretrain"],
        "fine-tuned": [],
    }


def test_the_vit_without_position_weights_leaves_its_sizes_open():
    vit = model_of("simmim_vit", relative_bias="none")
    state = OfficialViTCheckpoint().export_state(vit.objective.state_dict())
    slots = OfficialViTCheckpoint().to_recipe(state)
    assert slots["views"]["img_size"] is None
    assert slots["encoder"]["num_heads"] is None
    assert slots["encoder"]["relative_bias"] == slots["encoder"]["position"] == "none"


def test_a_head_for_anything_but_pixels_is_left_out():
    state = model_of("simmim_swin").objective.state_dict()
    head = "heads.main.decoder.head"
    foreign = state | {f"{head}.weight": torch.zeros(108, 16), f"{head}.bias": torch.zeros(108)}
    exported = OfficialSwinCheckpoint().export_state(foreign)
    assert not any(name.startswith("decoder.") for name in exported)
    assert OfficialSwinCheckpoint().export_state(state)["decoder.0.weight"].shape == (192, 16, 1, 1)


# --- mmpretrain ------------------------------------------------------------------------------------------------------


def to_mmpretrain(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written down the other way round than the plugin has it."""
    found = {}
    for name, tensor in official.items():
        if ".downsample." in name:  # Unfold puts the four places of a channel side by side, row by row
            places = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
            tensor = places.transpose(-1, -2).flatten(-2)
        for ours, theirs in (
            ("encoder.norm.", "backbone.norm3."), ("encoder.", "backbone."), ("decoder.0.", "neck.decoder.0."),
            ("patch_embed.proj.", "patch_embed.projection."), ("backbone.layers.", "backbone.stages."),
            (".attn.", ".attn.w_msa."), (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def test_mmpretrain_checkpoints_are_read(tmp_path: Path):
    model = model_of("simmim_swin")
    state = model.objective.state_dict()
    theirs = to_mmpretrain(OfficialSwinCheckpoint().export_state(state))
    assert {
        "backbone.stages.0.downsample.reduction.weight", "backbone.stages.1.blocks.0.attn.w_msa.qkv.weight",
        "backbone.stages.0.blocks.1.ffn.layers.0.0.bias", "backbone.norm3.weight", "neck.decoder.0.weight",
    } <= theirs.keys()  # fmt: skip
    theirs["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(16, 16)
    torch.save({"state_dict": theirs, "meta": {"epoch": 100}}, tmp_path / "mm.pth")
    with pytest.raises(CheckpointError, match=r"does not tell views.img_size; give the value"):
        import_checkpoint(tmp_path / "mm.pth", tmp_path / "imported")
    report = import_checkpoint(tmp_path / "mm.pth", tmp_path / "imported", options={"views.img_size": 64})
    assert report.format == "simmim_swin_mmpretrain"
    assert not report.missing
    assert not report.unexpected
    imported = load_file(tmp_path / "imported" / "weights.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in imported.items())
    with pytest.raises(ValueError, match="it can be read only"):
        MMPretrainSwinCheckpoint().export_state(state)


def test_unfolded_and_sliced_merging_are_the_same_linear_layer():
    """mmpretrain's `Unfold` and the official slices of a map of 2 x 2 tokens with 3 channels."""
    torch.manual_seed(0)
    tokens, weight = torch.randn(1, 2, 2, 3), torch.randn(5, 12)
    slices = torch.cat([tokens[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1).flatten()
    theirs = to_mmpretrain({"encoder.layers.0.downsample.reduction.weight": weight})
    (unfolded_weight,) = theirs.values()
    unfolded = torch.nn.functional.unfold(tokens.permute(0, 3, 1, 2), 2, stride=2).flatten()
    assert torch.allclose(linear(slices, weight), linear(unfolded, unfolded_weight), atol=1e-6)


# --- timm ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "name"), [("simmim_swin", "swin_base_patch4_window7_224"), ("simmim_swinv2", "swinv2_base_window8_256")]
)
def test_timm_loads_an_exported_swin_and_computes_our_features(encoder: str, name: str, tmp_path: Path, images: Tensor):
    model = model_of(encoder)
    file = export_run(run_of(model, tmp_path / "run"), "timm")
    assert file.suffix == ".safetensors"
    # SwinV2 in timm has four sizes of pre-training windows
    more = {} if encoder == "simmim_swin" else {"pretrained_window_sizes": (0, 0)}
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(file), **SWIN_SIZES, **more).eval()
    wanted = theirs.forward_features(images).flatten(1, 2)
    assert torch.allclose(features(model, images), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(features(model, images).mean(1), theirs(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("relative_bias", ["shared", "per_block"])
def test_timm_loads_an_exported_vit_and_computes_our_features(relative_bias: str, tmp_path: Path, images: Tensor):
    model = model_of("simmim_vit", relative_bias=relative_bias)
    file = export_run(run_of(model, tmp_path / "run"), "timm")
    options = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    theirs = timm.create_model(
        "beit_base_patch16_224", num_classes=0, global_pool="token", checkpoint_path=str(file), **options
    ).eval()
    wanted = theirs.forward_features(images)
    assert torch.allclose(features(model, images), wanted[:, 1:], rtol=1e-4, atol=1e-4)
    tables = [block.attn.relative_position_bias_table for block in theirs.blocks]
    assert torch.equal(tables[0], tables[1]) == (relative_bias == "shared")


@pytest.mark.parametrize(
    ("encoder", "options", "layout", "message"),
    [
        ("simmim_swin", {"absolute_position": True}, TimmSwinCheckpoint, "timm's Swin has no absolute positions"),
        ("simmim_vit", {"qkv_bias": "full"}, TimmViTCheckpoint, r"there the key has no bias.*qkv_bias: full"),
        ("simmim_vit", {"qkv_bias": "full"}, OfficialViTCheckpoint, r"there the key has no bias.*qkv_bias: full"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(encoder: str, options: dict[str, Any], layout: Any, message: str):
    with pytest.raises(ValueError, match=message):
        layout().export_state(model_of(encoder, **options).objective.state_dict())


def test_every_encoder_has_its_layouts(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match="no layout 'onnx' for encoder 'simmim_vit'; its plugin has only official"
    ):
        export_run(run_of(model_of("simmim_vit"), tmp_path / "run"), "onnx")


def test_the_mask_token_is_ours_alone():
    state = model_of("simmim_swin").objective.state_dict()
    exported = TimmSwinCheckpoint().export_state(state)
    assert not any(re.search("mask_token|decoder|^encoder", name) for name in exported)
    assert "layers.1.downsample.reduction.weight" in exported  # timm merges at the start of a stage
    assert "encoder.layers.0.downsample.reduction.weight" in OfficialSwinCheckpoint().export_state(state)
