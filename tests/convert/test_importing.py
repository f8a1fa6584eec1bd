"""From an official checkpoint to weights and slots; MAE is the example."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_framework.assembly.builder import build_model
from mim_framework.base.errors import CheckpointError
from mim_framework.contract.components import CheckpointFormat
from mim_framework.contract.mask import Grid
from mim_framework.convert import import_checkpoint, resize_position_table
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.testing import RegistryWith

REST = {
    "name": "fine",
    "data": {"source": {"type": "folder", "root": "."}},
    "optim": {"lr": 1e-3},
    "train": {"total_batch_size": 2, "steps": 1},
}
HEADS = {"encoder.num_heads": 2, "decoder.num_heads": 2}
DECODER = ("mask_token", "decoder_")


def official_state(grid: int = 2, dim: int = 8, decoder_dim: int = 4, patch_size: int = 4) -> dict[str, Tensor]:
    """The names and shapes of an official MAE with one block in encoder and decoder, filled with random numbers."""
    tokens = grid**2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (dim,),
        "mask_token": (1, 1, decoder_dim),
        "decoder_pos_embed": (1, tokens, decoder_dim),
        "decoder_embed.weight": (decoder_dim, dim),
        "decoder_embed.bias": (decoder_dim,),
        "decoder_pred.weight": (3 * patch_size**2, decoder_dim),
        "decoder_pred.bias": (3 * patch_size**2,),
    }
    for prefix, width in (("", dim), ("decoder_", decoder_dim)):
        block = f"{prefix}blocks.0."
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
        for name in (f"{block}norm1", f"{block}norm2", f"{prefix}norm"):
            shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saved(folder: Path, state: dict[str, Tensor], name: str = "official.safetensors") -> Path:
    save_file(state, folder / name)
    return folder / name


def test_a_full_checkpoint_fills_the_model_of_its_slots(tmp_path: Path):
    state = official_state()
    report = import_checkpoint(saved(tmp_path, state), tmp_path / "out", options=HEADS)
    assert (report.missing, report.unexpected, report.resized) == ({}, {}, {})
    assert len(report.matched) == len(state)
    assert str(report).splitlines()[0] == f"layout mae_official: {len(state)} tensors matched"

    slots = yaml.safe_load((tmp_path / "out" / "slots.yaml").read_text())
    views = {"type": "image", "img_size": 8, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert slots["views"] == views
    shape = {"embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 4.0}
    assert slots["encoder"] == {"type": "mae_vit", "patch_size": 4, **shape}
    assert slots["decoder"] == {"type": "mae_decoder", **shape, "embed_dim": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(REST | slots))
    model = build_model(load_recipe(tmp_path / "recipe.yaml"), Registry())
    weights = model.objective.state_dict()
    assert torch.equal(weights["encoder.patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    assert torch.equal(weights["heads.main.decoder.mask_token"], state["mask_token"])


def test_an_encoder_alone_leaves_the_decoder_to_chance_and_says_so(tmp_path: Path):
    state = {name: tensor for name, tensor in official_state().items() if not name.startswith(DECODER)}
    state |= {"head.weight": torch.zeros(10, 8)}
    file, heads = saved(tmp_path, state), {"encoder.num_heads": 2}
    text = str(import_checkpoint(file, tmp_path / "out", layout="mae_official", options=heads))
    assert "unexpected  encoder.head.weight (10, 8)" in text
    assert re.search(r"missing     heads\.main\.decoder\.\* \(all \d+ tensors\)", text)
    assert all(name.startswith("encoder.") for name in load_file(tmp_path / "out" / "weights.safetensors"))


def test_a_single_missing_tensor_is_listed_with_its_shape(tmp_path: Path):
    state = official_state()
    del state["norm.weight"], state["decoder_pred.bias"]
    text = str(import_checkpoint(saved(tmp_path, state), tmp_path / "out", options=HEADS))
    assert "missing     encoder.norm.weight (8,)" in text
    assert "missing     heads.main.decoder.decoder_pred.bias (48,)" in text


def test_position_tables_are_interpolated_for_another_image_size(tmp_path: Path):
    state = official_state(grid=2)
    options = HEADS | {"views.img_size": 16}
    report = import_checkpoint(saved(tmp_path, state), tmp_path / "out", options=options)
    assert report.resized == {
        "encoder.pos_embed": ((1, 5, 8), (1, 17, 8)),
        "heads.main.decoder.decoder_pos_embed": ((1, 5, 4), (1, 17, 4)),
    }
    assert "resized     encoder.pos_embed (1, 5, 8) -> (1, 17, 8)" in str(report)
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    expected = resize_position_table(state["pos_embed"], Grid((2, 2)), Grid((4, 4)))
    assert torch.equal(weights["encoder.pos_embed"], expected)
    assert yaml.safe_load((tmp_path / "out" / "slots.yaml").read_text())["views"]["img_size"] == 16


def test_what_no_tensor_tells_must_be_given(tmp_path: Path):
    file = saved(tmp_path, official_state())
    message = r"does not tell encoder\.num_heads, decoder\.num_heads; give the value, for example encoder\.num_heads=12"
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_options_of_the_training_script_stand_in_the_slots_as_comments(tmp_path: Path):
    options = Namespace(norm_pix_loss=True, note="two\nlines: {type: evil}")
    torch.save({"model": official_state(), "args": options}, tmp_path / "official.pth")
    import_checkpoint(tmp_path / "official.pth", tmp_path / "out", options=HEADS)
    text = (tmp_path / "out" / "slots.yaml").read_text()
    assert "# The script that wrote it ran with norm_pix_loss: True\n" in text
    assert all(line.startswith("#") for line in text.splitlines() if "evil" in line)


def test_a_file_of_no_known_layout_is_refused(tmp_path: Path):
    file = saved(tmp_path, {"stem.weight": torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match=r"fits no installed layout \(known: .*mae_official.*\); it holds stem\.weight"
    ):
        import_checkpoint(file, tmp_path / "out")


class Twin(CheckpointFormat):
    """Recognises everything."""

    name = "twin"

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return True


def test_a_file_of_several_layouts_needs_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = saved(tmp_path, official_state())
    registry = RegistryWith(Twin)
    both = registry.classes("checkpoint_format") | {"twin": Twin}
    monkeypatch.setattr(registry, "classes", lambda kind: both)
    with pytest.raises(CheckpointError, match="fits several layouts, mae_official, twin; choose one"):
        import_checkpoint(file, tmp_path / "out", registry)
    report = import_checkpoint(file, tmp_path / "out", registry, layout="mae_official", options=HEADS)
    assert report.format == "mae_official"


def test_a_shape_that_does_not_fit_is_an_error_that_names_it(tmp_path: Path):
    state = official_state() | {"norm.weight": torch.zeros(9)}
    with pytest.raises(CheckpointError, match=r"'encoder\.norm\.weight' is \(9,\), the model needs \(8,\)"):
        import_checkpoint(saved(tmp_path, state), tmp_path / "out", options=HEADS)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to .*taken"):
        import_checkpoint(saved(tmp_path, official_state()), tmp_path / "taken", options=HEADS)


def test_by_default_the_folder_is_named_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    report = import_checkpoint(saved(tmp_path, official_state(), "mae_tiny.safetensors"), options=HEADS)
    assert report.folder == Path("mae_tiny")
    assert (tmp_path / "mae_tiny" / "weights.safetensors").is_file()


def test_a_group_of_names_that_fits_a_layout_is_named_with_its_prefix(tmp_path: Path):
    state = {f"net2.vit.{name}": tensor for name, tensor in official_state().items()} | {"loss.w": torch.zeros(1)}
    torch.save({"state_dict": state, "ema": {"w": torch.zeros(1)}}, tmp_path / "w.pth")
    message = r"under the key state_dict\. Other tensors: ema \(1 tensor\); --key NAME .*--prefix net2\.vit\. takes 38 "
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path / "w.pth", tmp_path / "out", options=HEADS)
    report = import_checkpoint(tmp_path / "w.pth", tmp_path / "out", options=HEADS, prefix="net2.vit.")
    assert "taken: the tensors under the key state_dict, without the prefix net2.vit." in str(report)


def test_averaged_weights_beside_those_that_are_taken_are_mentioned(tmp_path: Path):
    torch.save({"model": official_state(), "model_ema": official_state()}, tmp_path / "w.pth")
    report = import_checkpoint(tmp_path / "w.pth", tmp_path / "out", options=HEADS)
    assert "the file also holds model_ema (38 tensors); --key NAME takes those instead" in str(report)
    report = import_checkpoint(tmp_path / "w.pth", tmp_path / "out", options=HEADS, key="model_ema")
    assert "under the key model_ema" in str(report)


@pytest.mark.parametrize("layout", ["mae_official", "vit_timm"])
def test_the_final_norm_of_a_fine_tuned_file_takes_the_place_of_the_missing_one(tmp_path: Path, layout: str):
    state = {name: tensor for name, tensor in official_state().items() if not name.startswith(DECODER)}
    for part in ("weight", "bias"):
        state[f"fc_norm.{part}"] = state.pop(f"norm.{part}")
    state |= {"head.weight": torch.zeros(10, 8), "head.bias": torch.zeros(10)}
    file = saved(tmp_path, state)
    report = import_checkpoint(file, tmp_path / "out", layout=layout, options={"encoder.num_heads": 2})
    assert "encoder.norm.weight is the file's encoder.fc_norm.weight: that of a fine-tuned model" in str(report)
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    assert torch.equal(weights["encoder.norm.weight"], state["fc_norm.weight"])
    assert set(report.unexpected) == {"encoder.head.weight", "encoder.head.bias"}


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.fault(row="4")
@pytest.mark.parametrize("there", [False, True], ids=["new folder", "old folder"])
def test_a_full_disk_leaves_no_half_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, figure):
    file, out = saved(tmp_path, official_state()), tmp_path / "out"
    if there:
        import_checkpoint(file, out, options=HEADS)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else {}

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: IoError(Os { code: 28, message: No space left on device })")

    monkeypatch.setattr("mim_framework.convert.importing.save_file", full)
    with pytest.raises(CheckpointError, match="cannot write to .*out: .*No space left on device"):
        import_checkpoint(file, out, options=HEADS | {"views.img_size": 16})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before if there else not out.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    figure(f"import into {'an old' if there else 'a new'} folder: 1 sentence, 0 files changed or left")


def test_an_import_into_an_old_folder_leaves_other_files_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    import_checkpoint(saved(tmp_path, official_state()), tmp_path / "out", options=HEADS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mine.txt",
        "slots.yaml",
        "weights.safetensors",
    ]
