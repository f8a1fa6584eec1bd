"""A run's weights for timm and for the official code; MAE is the example."""

from __future__ import annotations

import ast
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from mim_framework.assembly.builder import Model, build_model
from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.contract.mask import Mask
from mim_framework.convert import export_run, import_checkpoint
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

RECIPE = {
    "name": "run",
    "data": {"source": {"type": "folder", "root": "."}},
    "views": {"type": "image", "img_size": 32},
    "masker": "random",
    "encoder": {"type": "mae_vit", "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "target": "pixels",
    "decoder": {"type": "mae_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2},
    "loss": "mse",
    "optim": {"lr": 1e-3},
    "train": {"total_batch_size": 2, "steps": 1, "device": "cpu"},
}


def make_run(folder: Path, **changes) -> Model:
    """A run directory with a recipe and one checkpoint, whose weights are no initial ones."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    model = build_model(load_recipe(folder / "recipe.yaml"), Registry())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.objective.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_checkpoint(folder / "checkpoints", 1, {"model": model.objective.state_dict()}, {})
    return model


@torch.no_grad()
def features(model: Model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class token and mean of the patch tokens, after the final norm."""
    encoder = model.objective.encoder.eval()
    latent = encoder(images, Mask.none(len(images), encoder.spec.grid))
    return latent.prefix[:, 0], latent.pooled()


@torch.no_grad()
def test_timm_gives_the_same_features_with_token_and_with_average_pooling(tmp_path: Path):
    model = make_run(tmp_path / "run")
    weights = load_file(export_run(tmp_path / "run", "timm"))
    images = torch.randn(2, 3, 32, 32)
    cls_token, pooled = features(model, images)
    for options, ours in (
        ({"global_pool": "token"}, cls_token),
        ({"global_pool": "avg", "fc_norm": False}, pooled),
    ):
        vit = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, **options
        )  # fmt: skip
        vit.load_state_dict(weights)
        assert torch.allclose(vit.eval()(images), ours, atol=1e-5)


@torch.no_grad()
def test_timm_create_model_loads_the_file_by_itself(tmp_path: Path):
    encoder = {"type": "mae_vit", "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3}
    model = make_run(tmp_path / "run", encoder=encoder)
    file = export_run(tmp_path / "run", "timm", tmp_path / "vit.safetensors")
    assert file == tmp_path / "vit.safetensors"
    options = {"img_size": 32, "depth": 2, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file), **options)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(vit.eval()(images), features(model, images)[0], atol=1e-5)


CLASSIFIES = {"data": {"source": "digits"}, "masker": "none", "objective": "classify", "target": "labels"}
CLASSIFIES |= {"loss": "cross_entropy"}


@pytest.mark.parametrize(
    "decoder", [{"norm": "new"}, {"norm": "new", "pool": "cls"}, {"pool": "cls", "batch_norm": True}, {}]
)
def test_timm_loads_a_fine_tuned_run_with_its_classifier(tmp_path: Path, decoder: dict[str, Any]):
    encoder = {"type": "mae_vit", "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3}
    model = make_run(tmp_path / "run", encoder=encoder, decoder={"type": "classifier", **decoder}, **CLASSIFIES)
    notes: list[str] = []
    file = export_run(tmp_path / "run", "timm", tmp_path / "a.safetensors", classifier=True, note=notes.append)
    told = re.fullmatch(r"timm\.create_model\(NAME, checkpoint_path=FILE, (.*)\) loads it", notes[0])
    options = ast.literal_eval("{" + re.sub(r"(\w+)=", r"'\1': ", told[1]) + "}")
    vit = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file), img_size=32, depth=2, **options)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs, ours = vit.eval()(images), model.objective.eval().logits({"x": images})
    assert ours.shape == (2, 10)
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_a_classifier_that_is_left_out_or_has_no_place_is_told(tmp_path: Path):
    make_run(tmp_path / "run", decoder="classifier", **CLASSIFIES)
    notes: list[str] = []
    assert not any("head" in name for name in load_file(export_run(tmp_path / "run", "timm", note=notes.append)))
    assert notes == ["the classifier of the run is left out; --to timm --classifier writes it too"]
    with pytest.raises(CheckpointError, match="only the layout timm has a place for one; write --to timm"):
        export_run(tmp_path / "run", "official", classifier=True)
    make_run(tmp_path / "other")
    with pytest.raises(CheckpointError, match="the run has no head with decoder 'classifier'; leave the option out"):
        export_run(tmp_path / "other", "timm", classifier=True)


def test_official_to_ours_and_back_is_bitwise_the_same(tmp_path: Path):
    make_run(tmp_path / "run")
    file = export_run(tmp_path / "run", "official")
    assert file == tmp_path / "run" / "export" / "official.pth"
    first = torch.load(file, weights_only=True)["model"]
    assert {"cls_token", "blocks.1.mlp.fc2.bias", "mask_token", "decoder_blocks.0.norm1.weight"} <= first.keys()

    heads = {"encoder.num_heads": 3, "decoder.num_heads": 2}
    report = import_checkpoint(file, tmp_path / "imported", options=heads)
    assert not report.missing | report.unexpected
    slots = yaml.safe_load((tmp_path / "imported" / "slots.yaml").read_text())
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | slots))
    model = build_model(load_recipe(tmp_path / "again" / "recipe.yaml"), Registry())
    save_checkpoint(tmp_path / "again" / "checkpoints", 1, {"model": model.objective.state_dict()}, {})
    second = torch.load(export_run(tmp_path / "again", "official"), weights_only=True)["model"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_suffix_chooses_the_kind_of_file(tmp_path: Path):
    make_run(tmp_path / "run")
    file = export_run(tmp_path / "run", "official", tmp_path / "mae.safetensors")
    assert "decoder_pred.weight" in load_file(file)


def test_a_layout_that_the_plugin_lacks_is_an_error(tmp_path: Path):
    make_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no layout 'onnx' for encoder 'mae_vit'; its plugin has only .*timm"):
        export_run(tmp_path / "run", "onnx")
    with pytest.raises(CheckpointError, match="cannot be written in layout 'mmpretrain': it can be read only"):
        export_run(tmp_path / "run", "mmpretrain")


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path):
    make_run(tmp_path / "run")
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot write .*taken"):
        export_run(tmp_path / "run", "timm", tmp_path / "taken" / "vit.safetensors")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is no run directory: it has no recipe.yaml"):
        export_run(tmp_path, "timm")


@pytest.mark.fault(row="4")
@pytest.mark.parametrize("to", ["official", "timm"])
def test_a_full_disk_leaves_the_export_of_before(tmp_path: Path, to: str, figure):
    make_run(tmp_path / "run")
    file = export_run(tmp_path / "run", to)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=f"cannot write .*{file.name}"):
            export_run(tmp_path / "run", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    figure(f"export to {to}: 1 sentence, the file of before to the bit, 0 others")
