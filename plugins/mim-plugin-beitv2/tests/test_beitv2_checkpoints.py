"""Layouts of VQ-KD's and BEiT v2's checkpoints: there and back, into timm, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mim_plugin_beitv2.checkpoints import (
    MMPretrainCheckpoint,
    MMPretrainVQKDCheckpoint,
    OfficialCheckpoint,
    OfficialVQKDCheckpoint,
    TimmVQKDCheckpoint,
)
from safetensors.torch import load_file
from torch import Tensor

from mim_framework import Ask, CheckpointError, Grid, Mask
from mim_framework.assembly.builder import Model, build_model
from mim_framework.assembly.trained import trained_encoder
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.convert import export_run, import_checkpoint
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
REST = {"name": "run", "data": {"source": "digits"}, "optim": {"lr": 1}, "train": {"total_batch_size": 2, "steps": 1}}
TEACHER = {"encoder": {"type": "vit", **VIT, "embed_dim": 24}, "random": True}
VQKD = {
    "views": {"type": "image", "img_size": 32, "mean": [0.0] * 3, "std": [1.0] * 3},
    "masker": "none",
    "encoder": {"type": "vqkd", **VIT, "num_codes": 12, "code_dim": 4},
    "target": {"type": "features", "teacher": "teacher", "normalize": False},
    "teachers": {"teacher": TEACHER},
    "decoder": {"type": "vqkd_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2},
    "loss": "cosine",
}
BEIT = {
    "views": {"type": "beit", "img_size": 32, "second_size": 32, "second_interpolation": "bicubic"},
    "masker": {"type": "block", "mask_ratio": 0.4},
    "encoder": {"type": "beit", **VIT},
    "target": {"type": "token_ids", "vocab_size": 12},
    "decoder": "linear",
    "loss": "cross_entropy",
    "objective": {"type": "beit_v2", "early_layers": 1, "head_layers": 2},
}
IMPORT_VQKD = {"encoder.num_heads": 2, "decoder.num_heads": 2, "teachers.teacher": TEACHER}
EVERYTHING = Ask(aux=frozenset({"ids", "features"}))


def model_of(slots: dict[str, Any], **changes: Any) -> Model:
    """Every parameter is drawn anew, so that nothing is 0 or 1."""
    model = build_model(Recipe.model_validate({**REST, **slots, **changes}), Registry())
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


def placed(model: Model) -> Model:
    """As after the first step of a run."""
    model.objective.encoder.codebook.initted.fill_(1)
    return model


def official_vqkd() -> dict[str, Tensor]:
    return OfficialVQKDCheckpoint().export_state(placed(model_of(VQKD)).objective.state_dict())


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def same(state: dict[str, Tensor], file: Path) -> bool:
    imported = load_file(file)
    return state.keys() == imported.keys() and all(torch.equal(state[name], each) for name, each in imported.items())


# --- VQ-KD -----------------------------------------------------------------------------------------------------------


def test_an_official_export_of_the_tokenizer_is_imported_as_the_same_model(tmp_path: Path):
    model = placed(model_of(VQKD))
    file = export_run(run_of(model, tmp_path / "run"), "official")
    report = import_checkpoint(file, tmp_path / "imported", options=IMPORT_VQKD)
    assert report.format == "vqkd_official"
    assert not report.missing
    assert not report.unexpected
    assert same(model.objective.state_dict(), tmp_path / "imported" / "weights.safetensors")
    trained = trained_encoder(tmp_path / "imported", Registry())
    assert trained.encoder.type == "vqkd"
    assert (trained.mean, trained.std) == ((0, 0, 0), (1, 1, 1))


def test_an_imported_tokenizer_is_frozen_as_it_is(tmp_path: Path, images: Tensor):
    torch.save({"model": official_vqkd()}, tmp_path / "vqkd.pth")
    import_checkpoint(tmp_path / "vqkd.pth", tmp_path / "imported", options=IMPORT_VQKD)
    model = model_of(BEIT, tokenizer=str(tmp_path / "imported"), target="token_ids")
    teacher = model.teachers["tokenizer"].part("encoder")
    nothing = Mask.none(2, Grid((4, 4)))
    wanted = placed(model_of(VQKD)).objective.encoder.eval()(images, nothing, EVERYTHING).aux["ids"]
    assert torch.equal(teacher(images, nothing, EVERYTHING).aux["ids"], wanted)
    assert teacher.codebook.initted.item() == 1


def test_teacher_and_what_belongs_to_it_are_left_out_and_named_teachers_come_with_their_width(tmp_path: Path):
    more = dict.fromkeys(("teacher_model.visual.proj", "scaling_layer.shift", "loss.x"), torch.zeros(1))
    layout = OfficialVQKDCheckpoint()
    state = official_vqkd()
    assert layout.import_state(state | more).keys() == layout.import_state(state).keys()
    assert layout.to_recipe(state)["teachers"] == {"teacher": None}
    for width, name, model in ((512, "clip", "vit_base_patch16_clip_quickgelu_224.openai"), (768, "dino", "dino")):
        wide = state | {"decode_task_layer.2.weight": torch.zeros(width, 16)}
        slots = layout.to_recipe(wide)
        assert model in slots["teachers"][name]["encoder"]["model"]
        assert slots["target"]["teacher"] == name
    torch.save({"model": state}, tmp_path / "vqkd.pth")
    with pytest.raises(CheckpointError, match="does not tell encoder.num_heads, decoder.num_heads, teachers.teacher"):
        import_checkpoint(tmp_path / "vqkd.pth", tmp_path / "imported")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"quantize.embedding.initted": torch.zeros(1)},
            "was never trained: initted is 0. Official code would cluster",
        ),
        ({"quantize.embedding.weight": torch.zeros(12, 4)}, "was never trained: its rows have not the length 1"),
    ],
)
def test_a_codebook_without_codes_is_refused(changes: dict[str, Tensor], text: str, tmp_path: Path):
    torch.save({"model": official_vqkd() | changes}, tmp_path / "vqkd.pth")
    with pytest.raises(CheckpointError, match=text):
        import_checkpoint(tmp_path / "vqkd.pth", tmp_path / "imported", options=IMPORT_VQKD)


def test_a_file_without_the_flag_of_the_codebook_is_taken_by_its_codes(tmp_path: Path):
    state = official_vqkd()
    del state["quantize.embedding.initted"]
    torch.save({"state_dict": state}, tmp_path / "vqkd.pth")
    report = import_checkpoint(tmp_path / "vqkd.pth", tmp_path / "imported", options=IMPORT_VQKD)
    assert not report.missing


def to_mmpretrain(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written down the other way round than the plugin has it; mmpretrain keeps encoder, task layer and codes."""
    found = {}
    for name, tensor in official.items():
        if name.startswith(
            ("decoder.", "decode_task_layer.", "quantize.embedding.cluster_size", "quantize.embedding.emb")
        ):
            continue
        for ours, theirs in (
            ("encoder.blocks.", "encoder.layers."), ("encoder.fc_norm.", "encoder.ln1."), (".norm", ".ln"),
            (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."), ("embed.proj.", "embed.projection."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def test_a_tokenizer_of_mmpretrain_is_read_without_decoder(tmp_path: Path):
    model = placed(model_of(VQKD))
    theirs = to_mmpretrain(official_vqkd())
    assert {"encoder.layers.1.ln2.weight", "encoder.patch_embed.projection.bias", "encoder.ln1.bias"} <= theirs.keys()
    torch.save({"state_dict": theirs}, tmp_path / "mm.pth")
    options = {"encoder.num_heads": 2, "decoder.embed_dim": 16, "decoder.num_heads": 2, "teachers.clip": TEACHER}
    report = import_checkpoint(tmp_path / "mm.pth", tmp_path / "imported", options=options)
    assert report.format == "vqkd_mmpretrain"
    assert {name.partition(".")[0] for name in report.missing} == {"heads"}
    state = model.objective.state_dict()
    imported = load_file(tmp_path / "imported" / "weights.safetensors")
    assert imported.keys() == {name for name in state if name.startswith("encoder.")}
    assert all(torch.equal(state[name], tensor) for name, tensor in imported.items())
    with pytest.raises(ValueError, match="it can be read only"):
        MMPretrainVQKDCheckpoint().export_state(state)


@torch.no_grad()
def test_timm_loads_the_vit_in_front_of_the_codes(tmp_path: Path, images: Tensor):
    model = placed(model_of(VQKD))
    file = export_run(run_of(model, tmp_path / "run"), "timm")
    theirs = timm.create_model(
        "vit_base_patch16_224", num_classes=0, checkpoint_path=str(file), img_size=32, **VIT
    ).eval()
    latent = model.objective.encoder.eval()(images, Mask.none(2, Grid((4, 4))), EVERYTHING)
    wanted = theirs.forward_features(2 * images - 1)[:, 1:]
    assert torch.allclose(latent.aux["features"], wanted, rtol=1e-4, atol=1e-5)
    for refused in (TimmVQKDCheckpoint().to_recipe, TimmVQKDCheckpoint().import_state):
        with pytest.raises(ValueError, match="it is written only"):
            refused({})


# --- stage two -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_an_official_export_of_stage_two_is_imported_as_the_same_model(shared: bool, tmp_path: Path):
    model = model_of(BEIT, objective={**BEIT["objective"], "shared_head": shared})
    file = export_run(run_of(model, tmp_path / "run"), "official")
    options = {"objective.early_layers": 1}
    report = import_checkpoint(file, tmp_path / "imported", options=options)
    assert report.format == "beitv2_official"
    assert not report.missing
    assert not report.unexpected
    assert same(model.objective.state_dict(), tmp_path / "imported" / "weights.safetensors")
    assert ("cls_pt_lm_head.weight" in torch.load(file)["model"]) == (not shared)


def test_early_layers_are_known_for_published_depths_and_asked_for_otherwise(tmp_path: Path):
    layout = OfficialCheckpoint()
    for depth, early in ((12, 9), (24, 21), (2, None)):
        model = model_of(BEIT, encoder={**BEIT["encoder"], "depth": depth})
        slots = layout.to_recipe(layout.export_state(model.objective.state_dict()))
        guess = slots["objective"]["early_layers"]
        assert (guess and guess.value) == early
        assert slots["views"] | {"scale": None} == {
            "type": "beit", "img_size": 32, "second_size": 64, "second_interpolation": "bicubic", "scale": None,
        }  # fmt: skip
    torch.save({"module": layout.export_state(model.objective.state_dict())}, tmp_path / "beit.pth")
    with pytest.raises(CheckpointError, match="does not tell objective.early_layers"):
        import_checkpoint(tmp_path / "beit.pth", tmp_path / "imported")


def test_stage_two_of_mmpretrain_is_read_without_its_tokenizer(tmp_path: Path):
    model = model_of(BEIT)
    official = OfficialCheckpoint().export_state(model.objective.state_dict())
    theirs = {f"target_generator.{name}": tensor for name, tensor in to_mmpretrain(official_vqkd()).items()}
    for name, tensor in official.items():
        for ours, their in (
            ("cls_pt_layers.", "neck.patch_aggregation."), ("lm_head.", "head.cls_head."), (".norm1.", ".ln1."),
            ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1."), (".norm2.", ".ln2."),
            ("embed.proj.", "embed.projection."),
        ):  # fmt: skip
            name = name.replace(ours, their)
        if name.startswith("norm."):
            name = f"neck.{name}"
        elif not name.startswith(("neck.", "head.")):
            name = f"backbone.{name}".replace("backbone.blocks.", "backbone.layers.")
        theirs[name] = tensor
    assert {"neck.norm.weight", "neck.patch_aggregation.1.ln1.bias", "backbone.layers.0.gamma_1"} <= theirs.keys()
    torch.save({"state_dict": theirs}, tmp_path / "mm.pth")
    report = import_checkpoint(tmp_path / "mm.pth", tmp_path / "imported", options={"objective.early_layers": 1})
    assert report.format == "beitv2_mmpretrain"
    assert not report.missing
    assert not report.unexpected
    assert same(model.objective.state_dict(), tmp_path / "imported" / "weights.safetensors")
    with pytest.raises(ValueError, match="it can be read only"):
        MMPretrainCheckpoint().export_state({})


@torch.no_grad()
def test_timm_loads_an_exported_encoder_of_stage_two(tmp_path: Path, images: Tensor):
    model = model_of(BEIT)
    file = export_run(run_of(model, tmp_path / "run"), "timm")
    theirs = timm.create_model(
        "beitv2_base_patch16_224", num_classes=0, global_pool="token", checkpoint_path=str(file), img_size=32, **VIT
    ).eval()
    latent = model.objective.encoder.eval()(images, Mask.none(2, Grid((4, 4))))
    assert torch.allclose(latent.tokens, theirs.forward_features(images)[:, 1:], rtol=1e-4, atol=1e-5)
    tables = [block.attn.relative_position_bias_table for block in theirs.blocks]
    assert torch.equal(tables[0], tables[1])


def test_a_run_without_aggregation_is_written_by_the_plugin_of_its_encoder(tmp_path: Path):
    model = model_of(BEIT, objective="masked_prediction")
    exported = torch.load(export_run(run_of(model, tmp_path / "run"), "official"))["model"]
    assert not any(name.startswith("cls_pt") for name in exported)


def test_layouts_recognise_their_own_and_no_other():
    beit = OfficialCheckpoint().export_state(model_of(BEIT).objective.state_dict())
    states = {
        "vqkd": official_vqkd(),
        "vqkd mmpretrain": to_mmpretrain(official_vqkd()),
        "stage two": beit,
        "without aggregation": {name: tensor for name, tensor in beit.items() if "cls_pt" not in name},
    }
    found = {
        name: [cls.name for cls in Registry().classes("checkpoint_format").values() if cls().recognises(state)]
        for name, state in states.items()
    }
    assert found == {
        "vqkd": ["vqkd_official"],
        "vqkd mmpretrain": ["vqkd_mmpretrain"],
        "stage two": ["beitv2_official"],
        "without aggregation": ["beit_official"],
    }


def test_what_a_layout_cannot_hold_is_refused():
    model = model_of(BEIT, encoder={**BEIT["encoder"], "qkv_bias": "full"})
    with pytest.raises(ValueError, match=r"there the key has no bias.*qkv_bias: full"):
        OfficialCheckpoint().export_state(model.objective.state_dict())
