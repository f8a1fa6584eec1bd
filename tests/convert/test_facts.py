"""What no tensor tells: of an export's own record, of the script that wrote a file, asked for, or marked as a guess."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mim_plugin_mae.checkpoints import OfficialCheckpoint as MAE
from mim_plugin_simmim.checkpoints import OfficialSwinCheckpoint, OfficialViTCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_framework.assembly.builder import Model, build_model
from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.convert import export_run, import_checkpoint
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry

REGISTRY = Registry()
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4}
NORMALISED = {"type": "pixels", "norm_pix_loss": True}
SLOTS: dict[str, dict[str, Any]] = {
    "mae": {
        "views": {"type": "image", "img_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]},
        "masker": {"type": "random", "mask_ratio": 0.6, "mask_patch_size": 16},
        "encoder": {"type": "mae_vit", **VIT},
        "target": {"type": "pixels", "norm_pix_loss": True},
        "decoder": {"type": "mae_decoder", "embed_dim": 8, "depth": 1, "num_heads": 1},
        "loss": "mse",
    },
    "swin": {
        "views": {"type": "image", "img_size": 80, "mean": [0.1, 0.2, 0.3]},
        "masker": {"type": "random", "mask_ratio": 0.5, "mask_patch_size": 16, "rounding": "hide_ceil"},
        "encoder": {"type": "simmim_swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 5},
        "target": "pixels",
        "decoder": {"type": "linear", "init": "torch"},
        "loss": "l1",
    },
    "beit": {
        "views": {"type": "beit", "img_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "masker": {"type": "block", "num_hidden": 7, "rule": "stop_short"},
        "encoder": {"type": "beit", **VIT, "layer_scale": 1e-5},
        "target": {"type": "token_ids", "vocab_size": 12},
        "decoder": "linear",
        "loss": "cross_entropy",
    },
    "two heads": {
        "views": {"type": "image", "img_size": 16},
        "masker": {"type": "random", "mask_ratio": 0.25},
        "encoder": {"type": "mae_vit", **VIT, "patch_size": 4},
        "heads": {
            name: {"target": target, "decoder": decoder, "loss": "mse", "weight": weight}
            for name, target, weight in (("main", "pixels", 1.0), ("other", NORMALISED, 0.5))
            for decoder in ({"type": "mae_decoder", "embed_dim": 8, "depth": 1, "num_heads": 2},)
        },
    },
}


def model_of(folder: Path, slots: dict[str, Any]) -> Model:
    """Every parameter is drawn anew."""
    rest = {"name": "run", "data": {"source": "digits"}, "optim": {"lr": 1e-3}}
    rest["train"] = {"total_batch_size": 2, "steps": 1}
    folder.mkdir(exist_ok=True)
    (folder / "draft.yaml").write_text(yaml.safe_dump(rest | slots))
    model = build_model(load_recipe(folder / "draft.yaml", [], REGISTRY), REGISTRY)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.objective.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def run_of(folder: Path, slots: dict[str, Any]) -> Model:
    model = model_of(folder, slots)
    (folder / "recipe.yaml").write_text(dump_recipe(model.recipe))
    save_checkpoint(folder / "checkpoints", 1, {"model": model.objective.state_dict()}, {})
    return model


def slots_in(folder: Path) -> dict[str, Any]:
    slots = yaml.safe_load((folder / "slots.yaml").read_text())
    assert slots.pop("init") == str((folder / "weights.safetensors").resolve())
    return slots


# --- our own exports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("to", ["official", "timm"])
@pytest.mark.parametrize("method", sorted(SLOTS))
def test_an_export_comes_back_with_the_weights_and_all_slots_of_the_run(
    tmp_path: Path, method: str, to: str, suffix: str
):
    model = run_of(tmp_path / "run", SLOTS[method])
    file = export_run(tmp_path / "run", to, tmp_path / f"weights{suffix}")
    report = import_checkpoint(file, tmp_path / "in", REGISTRY)
    assert (report.guesses, report.told) == ({}, {})
    recipe = model.recipe.model_dump(mode="json")
    slots = slots_in(tmp_path / "in")
    assert slots == {slot: recipe[slot] for slot in slots}
    assert slots.keys() >= {"views", "masker", "encoder", "objective"} | (SLOTS[method].keys() - {"heads"})
    state, imported = model.objective.state_dict(), load_file(tmp_path / "in" / "weights.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in imported.items())
    if to == "official" and method != "two heads":
        assert imported.keys() == state.keys()
    assert {name for name in state if name.startswith("encoder.")} - imported.keys() <= {"encoder.mask_token"}


def test_what_the_user_says_counts_more_than_the_record(tmp_path: Path):
    run_of(tmp_path / "run", SLOTS["mae"])
    file = export_run(tmp_path / "run", "official")
    report = import_checkpoint(file, tmp_path / "in", options={"views.img_size": 64, "masker.mask_ratio": 0.5})
    slots = slots_in(tmp_path / "in")
    assert (slots["views"]["img_size"], slots["masker"]["mask_ratio"]) == (64, 0.5)
    assert slots["target"]["norm_pix_loss"] is True
    assert set(report.resized) == {"encoder.pos_embed", "heads.main.decoder.decoder_pos_embed"}


@pytest.mark.parametrize("record", ["text", {"format": 1, "layout": 3, "slots": {}}, {"format": 99}])
def test_a_record_that_is_none_of_ours_is_passed_over(tmp_path: Path, record: Any):
    state = MAE().export_state(model_of(tmp_path / "m", SLOTS["mae"]).objective.state_dict())
    torch.save({"model": state, "mim_framework": record}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="does not tell encoder.num_heads, decoder.num_heads"):
        import_checkpoint(tmp_path / "w.pth", tmp_path / "in")


# --- the options of the script that wrote the file -------------------------------------------------------------------


HEADS = {"encoder.num_heads": 2, "decoder.num_heads": 2}


def mae_file(folder: Path, **args: Any) -> Path:
    state = MAE().export_state(model_of(folder / "m", SLOTS["mae"]).objective.state_dict())
    torch.save({"model": state, "args": Namespace(**args)}, folder / "mae.pth")
    return folder / "mae.pth"


def test_the_options_of_a_script_fill_the_slots_and_are_told(tmp_path: Path):
    args = {"norm_pix_loss": True, "mask_ratio": 0.8, "num_heads": 8, "decoder_num_heads": 4, "std": (0.1, 0.2, 0.3)}
    report = import_checkpoint(mae_file(tmp_path, **args), tmp_path / "in")
    slots = slots_in(tmp_path / "in")
    assert slots["target"] == {"type": "pixels", "norm_pix_loss": True}
    assert slots["masker"]["mask_ratio"] == 0.8
    assert (slots["encoder"]["num_heads"], slots["decoder"]["num_heads"]) == (8, 4)
    assert slots["views"]["std"] == [0.1, 0.2, 0.3]
    assert report.guesses.keys() == {"views.mean [0.485, 0.456, 0.406]"}
    assert "told        masker.mask_ratio 0.8, by the script that wrote the file" in str(report)
    assert "  mask_ratio: 0.8  # told by the script that wrote the file\n" in (tmp_path / "in/slots.yaml").read_text()


def test_slots_do_not_contradict_their_own_comments(tmp_path: Path):
    file = mae_file(tmp_path, input_size=224, mask_ratio=0.8)
    import_checkpoint(file, tmp_path / "in", options={**HEADS, "masker.mask_ratio": 0.5})
    text = (tmp_path / "in" / "slots.yaml").read_text()
    assert "  img_size: 32  # the script that wrote the file said 224\n" in text
    assert "  mask_ratio: 0.5  # the script that wrote the file said 0.8\n" in text


@pytest.mark.parametrize(("model", "heads"), [("mae_vit_base_patch16", (12, 16)), ("mae_vit_huge_patch14", (16, 16))])
def test_the_name_of_an_official_model_tells_its_heads(model: str, heads: tuple[int, int]):
    told = MAE().told_by({"model": model})
    assert (told["encoder.num_heads"], told["decoder.num_heads"]) == heads
    assert MAE().told_by({"model": "vit_small"})["encoder.num_heads"] is None  # MoCo v3's has 12, timm's 6


def test_a_guess_is_marked_in_the_report_and_in_the_slots(tmp_path: Path):
    report = import_checkpoint(mae_file(tmp_path), tmp_path / "in", options=HEADS)
    assert {what.partition(" ")[0] for what in report.guesses} == {
        "views.mean", "views.std", "masker.mask_ratio", "target.norm_pix_loss",
    }  # fmt: skip
    assert "guess       target.norm_pix_loss False: the default of the official script" in str(report)
    text = (tmp_path / "in" / "slots.yaml").read_text()
    assert "  norm_pix_loss: false  # guess: the default of the official script\n" in text
    assert "  mean:  # guess: the default of these views" in text


@pytest.mark.parametrize(("width", "guess"), [(384, 6), (512, None)])
def test_the_width_of_a_decoder_tells_nothing_of_an_encoder(width: int, guess: int | None):
    state = {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 5, width)}
    state |= {"patch_embed.proj.weight": torch.zeros(width, 3, 4, 4), "blocks.0.mlp.fc1.weight": torch.zeros(width, 1)}
    heads = MAE().to_recipe(state)["encoder"]["num_heads"]
    assert (heads and heads.value) == guess


def swin_file(folder: Path, config: dict[str, Any] | None = None) -> Path:
    state = OfficialSwinCheckpoint().export_state(model_of(folder / "m", SLOTS["swin"]).objective.state_dict())
    torch.save({"model": state, **({"config": config} if config else {})}, folder / "swin.pth")
    return folder / "swin.pth"


def test_a_simmim_image_that_is_no_multiple_of_32_is_imported(tmp_path: Path):
    report = import_checkpoint(swin_file(tmp_path), tmp_path / "in", options={"views.img_size": 80})
    assert not report.missing
    masker = slots_in(tmp_path / "in")["masker"]
    assert masker["mask_patch_size"] == 16  # of 8, 16, 24, 32 the largest that divides 80
    vit = model_of(tmp_path / "v", {**SLOTS["swin"], "views": {"type": "image", "img_size": 48},
                                    "encoder": {"type": "simmim_vit", **VIT}})  # fmt: skip
    save_file(OfficialViTCheckpoint().export_state(vit.objective.state_dict()), tmp_path / "vit.safetensors")
    import_checkpoint(tmp_path / "vit.safetensors", tmp_path / "vit")
    assert slots_in(tmp_path / "vit")["masker"]["mask_patch_size"] == 24


def test_a_nested_configuration_tells_image_ratio_and_mask_unit(tmp_path: Path):
    config = {"DATA": {"IMG_SIZE": 80, "MASK_RATIO": 0.4, "MASK_PATCH_SIZE": 8}, "MODEL": {"TYPE": "swin"}}
    report = import_checkpoint(swin_file(tmp_path, config), tmp_path / "in")
    slots = slots_in(tmp_path / "in")
    assert slots["views"]["img_size"] == 80
    assert (slots["masker"]["mask_ratio"], slots["masker"]["mask_patch_size"]) == (0.4, 8)
    assert report.told["views.img_size"] == 80


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("norm.weight", float("nan"), r"encoder.norm.weight \(1 NaN, 0 infinite of 16 values\)"),
        (
            "decoder_pred.bias",
            float("-inf"),
            r"heads.main.decoder.decoder_pred.bias \(0 NaN, 1 infinite of 192 values\)",
        ),
    ],
)
def test_values_that_are_no_numbers_are_named_and_refused(tmp_path: Path, name: str, value: float, text: str):
    state = MAE().export_state(model_of(tmp_path / "m", SLOTS["mae"]).objective.state_dict())
    state = {each: tensor.clone() for each, tensor in state.items()}
    state[name][3] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=rf"holds values that are no numbers: {text}.*--allow-nonfinite"):
        import_checkpoint(tmp_path / "w.safetensors", tmp_path / "in", options=HEADS)
    assert not (tmp_path / "in").exists()
    import_checkpoint(tmp_path / "w.safetensors", tmp_path / "in", options=HEADS, allow_nonfinite=True)
    left_out: dict[str, Tensor] = {**state, name: torch.zeros_like(state[name]), "head.weight": torch.full((2,), value)}
    save_file(left_out, tmp_path / "other.safetensors")  # what is not taken may hold anything
    import_checkpoint(tmp_path / "other.safetensors", tmp_path / "other", options=HEADS)
