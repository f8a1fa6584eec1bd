"""Whatever names an encoder opens to the same one, with images as it saw them; what cannot be had is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_framework.assembly.opened import LoadedEncoder, Origin
from mim_framework.base.errors import CheckpointError, RecipeError
from mim_framework.contract.mask import Mask
from mim_framework.convert import export_run, import_checkpoint
from mim_framework.evaluate.cache import weights_hash
from mim_framework.features.subjects import TimmName, open_encoder


@torch.no_grad()
def tokens(opened: LoadedEncoder, images: Tensor) -> Tensor:
    encoder = opened.trained.eval()
    latent = encoder(images, Mask.none(len(images), encoder.spec.grid))
    return latent.tokens if latent.prefix is None else torch.cat([latent.prefix, latent.tokens], dim=1)


# --- runs, and what comes from them ----------------------------------------------------------------------------------


def test_a_run_opens_at_its_newest_checkpoint_and_a_checkpoint_at_its_own(make_run):
    folder, model = make_run(steps=(4, 9))
    opened = open_encoder(folder)
    assert opened.origin == Origin(str(folder), "run", "mae_vit", method="mae", run="small", step=9, images_seen=9 * 6)
    assert opened.weights_sha256 == weights_hash(model.objective.encoder)
    assert opened.views.config.mean == (0.5, 0.4, 0.3)
    assert opened.device == torch.device("cpu")
    step = folder / "checkpoints" / "step_00000004"
    early = open_encoder(str(step))
    assert early.origin == Origin(str(step), "checkpoint", "mae_vit", "mae", "small", step=4, images_seen=4 * 6)
    assert (
        len(
            {opened.weights_sha256, early.weights_sha256, weights_hash(opened.untrained), weights_hash(early.untrained)}
        )
        == 3
    )


@pytest.mark.parametrize("layout", ["timm", "official"])
def test_an_export_is_the_encoder_of_its_run_without_a_guess(make_run, layout):
    folder, _ = make_run()
    run, images = open_encoder(folder), torch.randn(2, 3, 32, 32)
    file = export_run(folder, layout)
    opened = open_encoder(file)
    assert opened.origin == Origin(str(file), "export", "mae_vit", "mae", "small", step=9, images_seen=54)
    assert torch.equal(tokens(opened, images), tokens(run, images))
    assert opened.weights_sha256 == run.weights_sha256
    assert opened.views.config == run.views.config
    assert opened.recipe is None
    assert weights_hash(opened.untrained) != run.weights_sha256


def test_an_import_is_opened_by_its_folder_or_its_weights(make_run, tmp_path):
    folder, _ = make_run()
    import_checkpoint(export_run(folder, "official"), tmp_path / "imported")
    run, images = open_encoder(folder), torch.randn(2, 3, 32, 32)
    for subject in (tmp_path / "imported", tmp_path / "imported" / "weights.safetensors"):
        opened = open_encoder(subject)
        assert opened.origin == Origin(str(subject), "import", "mae_vit", "mae")
        assert torch.equal(tokens(opened, images), tokens(run, images))
        assert opened.views.config.std == (0.2, 0.3, 0.25)


def test_an_export_without_a_mask_token_is_an_encoder_all_the_same(make_run):
    encoder = {"type": "vit", "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    folder, _ = make_run(encoder=encoder, decoder="linear", target="hog", masker={"type": "block"})
    run, images = open_encoder(folder), torch.randn(2, 3, 32, 32)
    assert run.origin.method == "maskfeat"
    file = export_run(folder, "timm")
    assert "mask_token" not in load_file(file)
    assert torch.allclose(tokens(open_encoder(file), images), tokens(run, images), atol=1e-6)


def test_an_import_that_lacks_a_part_of_the_encoder_is_refused(make_run, tmp_path):
    folder, _ = make_run()
    import_checkpoint(export_run(folder, "official"), tmp_path / "imported")
    file = tmp_path / "imported" / "weights.safetensors"
    weights = load_file(file)
    del weights["encoder.norm.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"imported lacks norm\.weight of encoder 'mae_vit'"):
        open_encoder(tmp_path / "imported")


def test_a_foreign_file_has_to_be_imported_first(make_run, tmp_path):
    folder, _ = make_run()
    save_file(load_file(export_run(folder, "timm")), tmp_path / "foreign.safetensors")
    text = r"was not written by `mim export`, and does not say what its encoder is; `mim import .*foreign.safetensors`"
    with pytest.raises(CheckpointError, match=text):
        open_encoder(tmp_path / "foreign.safetensors")


def test_a_run_whose_start_is_gone_opens_until_the_start_is_asked_for(make_run, tmp_path):
    folder, _ = make_run()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"init": str(tmp_path / "gone")}))
    opened = open_encoder(folder)
    with pytest.raises(CheckpointError, match="gone does not exist"):
        _ = opened.untrained


def test_what_names_no_encoder_is_told_what_would(tmp_path, make_run):
    cases = {
        str(tmp_path / "gone"): r"gone does not exist\. An encoder is named by a run directory, a checkpoint folder",
        str(tmp_path): r"is a folder without a recipe\.yaml or slots\.yaml\. An encoder is named by",
        "test_vit": r"test_vit does not exist; timm:test_vit is the model of timm",
        "https://host/run": r"https://host/run: needs a local path",
    }
    for subject, text in cases.items():
        with pytest.raises(RecipeError, match=text):
            open_encoder(subject)


def test_a_device_that_is_not_there_is_refused(make_run):
    folder, _ = make_run()
    assert open_encoder(folder, device="cpu").device == torch.device("cpu")
    for device in ("abacus", "cuda:977"):
        with pytest.raises(RecipeError, match=f"device '{device}' is not there; this machine has cpu"):
            open_encoder(folder, device=device)


# --- timm ------------------------------------------------------------------------------------------------------------

FAMILIES = {
    "test_vit": (64, "tokens", 1),
    "deit_tiny_distilled_patch16_224": (32, "tokens", 2),
    "eva02_tiny_patch14_224": (28, "tokens", 1),
    "test_convnext": (64, "channels first", 0),
    "test_resnet": (64, "channels first", 0),
    "swin_tiny_patch4_window7_224": (64, "channels last", 0),
    "test_efficientnet": (64, "channels first", 0),
}
"""Model -> image size for the test, how timm lays out its features, tokens that stand before the patches."""
LARGER_FAMILIES = {
    "beit_base_patch16_224": (32, "tokens", 1),
    "maxvit_rmlp_nano_rw_256": (256, "channels first", 0),
    "mvitv2_tiny": (64, "tokens", 0),
    "swinv2_cr_tiny_ns_224": (224, "channels first", 0),
    "vit_small_patch14_reg4_dinov2": (28, "tokens", 5),
    "vit_base_patch16_siglip_224": (32, "tokens", 0),
    "hiera_tiny_224": (224, "tokens", 0),
}


@pytest.mark.parametrize("model", FAMILIES)
def test_models_of_other_families_give_a_grid_of_tokens(model):
    check_tokens(model, *FAMILIES[model])


@pytest.mark.slow
@pytest.mark.parametrize("model", LARGER_FAMILIES)
def test_models_of_more_families_give_a_grid_of_tokens(model):
    check_tokens(model, *LARGER_FAMILIES[model])


@torch.no_grad()
def check_tokens(model: str, img_size: int, layout: str, num_prefix_tokens: int) -> None:
    opened = open_encoder(f"timm:{model},random,img_size={img_size}")
    encoder, spec = opened.trained.eval(), opened.trained.spec
    images = torch.randn(2, 3, img_size, img_size)
    latent = encoder(images, Mask.none(2, spec.grid))
    features = encoder.model.forward_features(images)
    rows, columns = spec.grid.shape
    if layout == "tokens":
        assert torch.equal(latent.tokens, features[:, num_prefix_tokens:])
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
        token = latent.tokens[:, row * columns + column]
        if layout == "channels first":
            assert torch.equal(token, features[:, :, row, column])
        elif layout == "channels last":
            assert torch.equal(token, features[:, row, column])
    assert spec.num_prefix_tokens == num_prefix_tokens == (0 if latent.prefix is None else latent.prefix.shape[1])
    assert latent.tokens.shape == (2, rows * columns, spec.dim)
    assert (rows * spec.stride[0], columns * spec.stride[1]) == (img_size, img_size)
    assert opened.origin == Origin(f"timm:{model},random,img_size={img_size}", "random", model)
    assert opened.untrained is None


def test_a_file_of_weights_makes_timm_s_own_model_with_images_as_timm_states_them(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    opened = open_encoder(f"timm:test_vit,checkpoint={tmp_path}/vit.safetensors")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(tokens(opened, images), model.forward_features(images))
    config = model.pretrained_cfg
    assert opened.views.specs["x"].size == config["input_size"][1:]
    assert (opened.views.config.mean, opened.views.config.std) == (config["mean"], config["std"])
    assert opened.origin.kind == "timm"
    assert weights_hash(opened.untrained) != opened.weights_sha256
    assert weights_hash(opened.untrained) == open_encoder("timm:test_vit,random").weights_sha256


def test_weights_that_cannot_be_had_are_an_error_that_names_the_ways(monkeypatch):
    create = timm.create_model

    def offline(name, *, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    text = (
        "timm:test_vit: its weights cannot be had (OSError: no route to host). Name a file of timm's weights, "
        "timm:test_vit,checkpoint=FILE.safetensors; fill timm's cache where there is internet and set HF_HOME to it; "
        "or write timm:test_vit,random, if a random network is meant"
    )
    with pytest.raises(CheckpointError, match=re.escape(text)):
        open_encoder("timm:test_vit")
    with pytest.raises(CheckpointError, match=r"checkpoint gone\.safetensors does not exist.*timm:test_vit,random"):
        open_encoder("timm:test_vit,checkpoint=gone.safetensors")


def test_a_name_of_timm_is_taken_apart():
    assert TimmName.read("timm:vit.mae") == TimmName("vit.mae")
    assert TimmName.read("timm:vit,img_size=96,random") == TimmName("vit", random=True, img_size=96)
    assert TimmName.read("timm:vit,checkpoint=a=b.safetensors") == TimmName("vit", checkpoint="a=b.safetensors")


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("timm:test_vjt,random", r"timm knows no model 'test_vjt', did you mean 'test_vit\d?'"),
        ("timm:test_vit.mae", r"timm has no such weights of 'test_vit', but test_vit\.r160_in1k"),
        ("timm:test_vit?random", r"timm knows no model 'test_vit\?random'.*timm:NAME,random"),
        ("timm:test_vit,rand", r"'rand' is no option; write timm:NAME, timm:NAME,checkpoint=FILE"),
        ("timm:test_vit,random,img_size=big", r"img_size is a number of pixels, got 'big'"),
        ("timm:test_vit,random,checkpoint=a.safetensors", r"random and checkpoint=a\.safetensors exclude each other"),
        (
            "timm:pit_ti_224,random",
            r"'pit_ti_224' gives 1 tokens of an image of 224x224 pixels, which are no grid of 7x7",
        ),
        ("timm:test_resnet,random,img_size=100", r"no grid of \d+x\d+ tokens of 32x32 pixels; another size may do"),
    ],
)
def test_a_wrong_name_of_timm_is_one_clear_sentence(subject, text):
    with pytest.raises(RecipeError, match=text):
        open_encoder(subject)


def test_a_path_object_is_a_path(tmp_path):
    with pytest.raises(RecipeError, match="is a folder without"):
        open_encoder(Path(tmp_path))
