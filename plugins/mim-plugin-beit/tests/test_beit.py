"""BEiT's own parts: the two views of a crop, the encoder's beginning, checkpoints in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mim_plugin_beit import BEiTEncoder, BEiTViews
from mim_plugin_beit.checkpoints import MMPretrainCheckpoint, OfficialCheckpoint, TimmCheckpoint
from mim_plugin_beit.views import NUM_JITTER_RANDOM
from PIL import Image, ImageEnhance
from pydantic import ValidationError
from timm.models.beit import Beit
from torch import nn
from torchvision.transforms import v2

from mim_framework import Ask, Mask, Sample, Specs, ViewSpec, jitter_color
from mim_framework.assembly.builder import build_model
from mim_framework.commands.check import report
from mim_framework.convert import import_checkpoint
from mim_framework.data.views import NUM_CROP_RANDOM
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.training.published import comparison

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(np.kron(RNG.integers(0, 256, (6, 9, 3)), np.ones((20, 20, 1))).astype(np.uint8))


def views(**options: Any) -> BEiTViews:
    return BEiTViews(BEiTViews.Config(**{"img_size": 32, "second_size": 16, **options}))


def numbers(seed: int = 0) -> torch.Tensor:
    return torch.rand(NUM_CROP_RANDOM + 1 + NUM_JITTER_RANDOM, generator=torch.Generator().manual_seed(seed))


def encoder(**options: Any) -> BEiTEncoder:
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = BEiTEncoder.Config(**{**small, **options})
    return BEiTEncoder(config, Specs(views={"x": ViewSpec("x", size=(32, 32))}))


# --- views -----------------------------------------------------------------------------------------------------------


def test_both_views_show_one_crop():
    made = views(color_jitter=0, second_interpolation="bicubic")
    sample = made(Sample(PHOTO, "photo"), numbers())
    assert sample["x"].shape == (3, 32, 32)
    assert sample["tokenizer"].shape == (3, 16, 16)
    smaller = nn.functional.interpolate(sample["x"][None].float(), (16, 16), mode="area")[0]
    assert (smaller - sample["tokenizer"].float()).abs().mean() < 4
    other = made(Sample(PHOTO, "photo"), numbers(1))
    assert (other["x"].float() - sample["x"].float()).abs().mean() > 10


def test_the_second_view_is_resized_from_the_crop_and_not_from_the_first():
    rand = numbers()
    as_lanczos = views(color_jitter=0)(Sample(PHOTO, "photo"), rand)["tokenizer"]
    of_another_first = views(color_jitter=0, img_size=64)(Sample(PHOTO, "photo"), rand)["tokenizer"]
    assert torch.equal(as_lanczos, of_another_first)


def test_equal_views_travel_once():
    made = views(second_size=32, second_interpolation="bicubic")
    assert made.same_pixels
    batch = made.collate([made(Sample(PHOTO, "photo"), numbers())])
    assert batch.keys() == made.example(2).keys() == {"x"}
    prepared = made.prepare(None, batch)
    assert torch.equal(prepared["tokenizer"], batch["x"].float() / 255)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (made.config.mean, made.config.std))
    assert torch.allclose(prepared["x"] * std + mean, prepared["tokenizer"], atol=1e-6)


def test_an_evaluation_view_has_no_second_one():
    made = views()
    batch = {"x": made.evaluation_view(Sample(PHOTO, "photo"))[None]}
    assert made.prepare(None, batch).keys() == {"x"}


def test_jitter_is_that_of_torchvision():
    """The same factors in the same order, on a Pillow image and on a tensor."""
    rand = [0.9, 0.2, 0.7, 0.999]  # the last of six orders: saturation, contrast, brightness
    expected = PHOTO
    for enhance, number in ((ImageEnhance.Color, 0.7), (ImageEnhance.Contrast, 0.2), (ImageEnhance.Brightness, 0.9)):
        expected = enhance(expected).enhance(1 + 0.4 * (2 * number - 1))
    ours = np.asarray(jitter_color(PHOTO, rand, (0.4,) * 3), dtype=int)
    assert np.array_equal(ours, np.asarray(expected, dtype=int))
    on_tensor = jitter_color(v2.functional.pil_to_tensor(PHOTO), rand, (0.4,) * 3).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(on_tensor - ours).max() <= 3


def test_jitter_draws_like_torchvision():
    """Factors are uniform in 1 +- 0.4 and every order is as likely: the mean pixel has the same distribution."""
    image, generator = PHOTO.resize((18, 12)), torch.Generator().manual_seed(0)
    rows = torch.rand(600, NUM_JITTER_RANDOM, generator=generator).tolist()
    ours = np.array([np.asarray(jitter_color(image, row, (0.4,) * 3)).std() for row in rows])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        official = v2.ColorJitter(0.4, 0.4, 0.4)
        theirs = np.array([np.asarray(official(image)).std() for _ in range(600)])
    error = np.hypot(ours.std(), theirs.std()) / np.sqrt(600)
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert ours.std() == pytest.approx(theirs.std(), rel=0.15)


@pytest.mark.parametrize("after_crop", [False, True])
def test_contrast_refers_to_the_mean_of_the_whole_image_or_of_the_crop(after_crop: bool):
    halves = Image.new("RGB", (64, 64), "black")
    halves.paste("white", (0, 0, 64, 8))  # mean 32 of 255
    rand = numbers()
    rand[:NUM_CROP_RANDOM] = 0.0
    rand[20], rand[21] = 0.999, 0.0  # the crop at the bottom: black
    rand[NUM_CROP_RANDOM + 1 :] = torch.tensor([0.5, 0.0, 0.5, 0.0])  # contrast 0.6, the others 1
    made = views(jitter_after_crop=after_crop, scale=(0.25, 0.25), ratio=(1.0, 1.0), flip=0.0)
    crop = made(Sample(halves, "halves"), rand)["x"].float()
    assert crop.mean().item() == pytest.approx(0 if after_crop else 0.4 * 32, abs=1)


def test_large_photographs_are_jittered_at_the_scale_that_the_crop_needs():
    import io

    buffer = io.BytesIO()
    PHOTO.resize((1800, 1200)).save(buffer, "JPEG", quality=95)
    scaled = views()(Sample(buffer.getvalue(), "photo"), numbers())
    full = views(scaled_decode=False)(Sample(buffer.getvalue(), "photo"), numbers())
    for name in ("x", "tokenizer"):
        assert (scaled[name].float() - full[name].float()).abs().mean() < 3


# --- encoder ---------------------------------------------------------------------------------------------------------


def test_the_encoder_begins_as_officially():
    torch.manual_seed(0)
    made = encoder(embed_dim=256, num_heads=4)
    qkv = made.blocks[1].attn.qkv.weight
    assert qkv.abs().max() <= 0.02
    assert qkv.std().item() == pytest.approx(0.0108, rel=0.02)
    assert made.blocks[1].mlp.fc2.weight.std().item() == pytest.approx(0.0108 / 2, rel=0.02)  # sqrt(2 * 2)
    assert made.cls_token.abs().max() <= 0.02
    assert bool((made.rel_pos_bias.relative_position_bias_table == 0).all())
    assert bool((made.blocks[0].gamma_1 == 0.1).all())


def test_what_decays_is_official_or_sane():
    assert set(encoder().no_weight_decay()) == {"cls_token", "pos_embed"}
    table = "rel_pos_bias.relative_position_bias_table"
    assert table in encoder(decay_bias_tables=False).no_weight_decay()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def objective(**options: Any) -> nn.Module:
    recipe = Recipe.model_validate(
        {
            "name": "beit",
            "data": {"source": "digits"},
            "views": {"type": "image", "img_size": 32},
            "masker": {"type": "block", "rule": "stop_short"},
            "encoder": {"type": "beit", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **options},
            "target": {"type": "token_ids", "vocab_size": 16},
            "decoder": "linear",
            "loss": "cross_entropy",
            "optim": {"lr": 1e-3},
            "train": {"total_batch_size": 2, "steps": 1},
        }
    )
    made = build_model(recipe, Registry()).objective
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.mark.parametrize("options", [{}, {"relative_bias": "none", "position": "learned", "layer_scale": 0}])
def test_official_weights_go_out_and_come_back(tmp_path: Path, options: dict[str, Any]):
    made = objective(**options)
    layout = OfficialCheckpoint()
    official = layout.export_state(made.state_dict())
    assert layout.recognises(official)
    torch.save({"model": official}, tmp_path / "official.pth")
    report = import_checkpoint(
        tmp_path / "official.pth", tmp_path / "in", options={"encoder.num_heads": 2, "views.img_size": 32}
    )
    assert not report.missing
    assert not report.unexpected
    slots = yaml.safe_load((tmp_path / "in" / "slots.yaml").read_text())
    assert slots["target"] == {"type": "token_ids", "vocab_size": 16}
    assert slots["encoder"]["relative_bias"] == options.get("relative_bias", "shared")


def to_mmpretrain(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of mmpretrain's BEiT, written down independently of the code that reads them."""
    names = {}
    for name, tensor in official.items():
        name = name.replace("lm_head.", "head.cls_head.")
        if not name.startswith("head."):
            if name.startswith("norm."):
                name = name.replace("norm.", "ln1.", 1)
            name = name.replace("patch_embed.proj.", "patch_embed.projection.").replace("blocks.", "layers.")
            name = name.replace(".norm1.", ".ln1.").replace(".norm2.", ".ln2.")
            name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
            name = f"backbone.{name}"
        names[name] = tensor
    return names


def test_mmpretrain_weights_are_read():
    made = objective()
    layout = MMPretrainCheckpoint()
    foreign = to_mmpretrain(OfficialCheckpoint().export_state(made.state_dict()))
    foreign["target_generator.blocks.input.w"] = torch.zeros(1)
    assert layout.recognises(foreign)
    assert not OfficialCheckpoint().recognises(foreign)
    imported, own = layout.import_state(foreign), made.state_dict()
    assert imported.keys() == own.keys()
    assert all(torch.equal(imported[name], tensor) for name, tensor in own.items())
    assert layout.to_recipe(foreign)["encoder"]["num_heads"] == 2
    with pytest.raises(ValueError, match="read only"):
        layout.export_state(own)


@torch.no_grad()
def test_timm_gives_the_same_features_with_the_shared_table_in_every_block():
    made = objective().eval()
    state = TimmCheckpoint().export_state(made.state_dict())
    model = Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, qkv_bias=True, init_values=0.1,
        use_abs_pos_emb=False, use_rel_pos_bias=True, global_pool="token",
    ).eval()  # fmt: skip
    model.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    latent = made.encoder(images, Mask.none(2, made.encoder.spec.grid))
    expected = torch.cat([latent.prefix, latent.tokens], dim=1)
    assert torch.allclose(model.forward_features(images), expected, atol=1e-5)


def test_tables_of_another_resolution_are_resized_on_import(tmp_path: Path):
    official = OfficialCheckpoint().export_state(objective().state_dict())
    torch.save({"model": official}, tmp_path / "official.pth")
    report = import_checkpoint(tmp_path / "official.pth", tmp_path / "in", options={"views.img_size": 48})
    [(old, new)] = report.resized.values()
    assert (old, new) == ((7 * 7 + 3, 2), (11 * 11 + 3, 2))


def test_a_full_bias_of_the_key_has_no_place_there():
    made = objective(qkv_bias="full")
    for layout in (OfficialCheckpoint(), TimmCheckpoint()):
        with pytest.raises(ValueError, match="the key has no bias"):
            layout.export_state(made.state_dict())


def test_the_bias_of_positions_is_handed_out():
    made = encoder()
    latent = made(torch.randn(1, 3, 32, 32), Mask.none(1, made.spec.grid), Ask(aux=frozenset({"position_bias"})))
    assert latent.aux["position_bias"].shape == (1, 2, 17, 17)
    assert encoder(relative_bias="none").spec.lacks(Ask(aux=frozenset({"position_bias"})))


@pytest.mark.parametrize("name", ["beit", "beit_800e", "beit_vit_large"])
def test_recipes_have_the_published_numbers(name: str):
    recipe = load_recipe(name, [], Registry())
    assert recipe.optim.peak_lr(2048) == 1.5e-3
    assert (recipe.train.epochs, recipe.optim.warmup_epochs) == {"beit": (300, 5)}.get(name, (800, 10))
    assert recipe.encoder.options["layer_scale"] == (1e-5 if name == "beit_vit_large" else 0.1)


PROTOCOLS = {  # epochs, warm-up, rate for 1024 images, factor of a layer, drop path
    "beit_finetune": (100, 20, 4e-3, 0.65, 0.1),
    "beit_finetune_vit_large": (50, 5, 1e-3, 0.75, 0.2),
    "beit_linear": (100, 0, 4e-3, None, 0),
}
SMALL = [
    "data.source={type: digits}", "data.eval_source=null", "views.img_size=16", "encoder.patch_size=8",
    "encoder.embed_dim=16", "encoder.num_heads=2", "train.total_batch_size=4", "train.batch_size=4",
    "train.device=cpu", "train.precision=float32",
]  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_has_the_official_numbers_and_passes_the_check(name: str):
    recipe = load_recipe(name, [], Registry())
    optim, batch = recipe.optim, recipe.train.total_batch_size
    found = recipe.train.epochs, optim.warmup_epochs, optim.peak_lr(batch), optim.layer_decay
    assert (*found, recipe.encoder.options["drop_path_rate"]) == PROTOCOLS[name]
    assert batch == 1024
    assert comparison(recipe, None, Registry()).endswith("deviations: no pre-training")
    assert "tokens per image" in report(load_recipe(name, SMALL, Registry()), Registry())


def test_every_block_of_the_linear_probe_has_a_classifier():
    recipe = load_recipe("beit_linear", [], Registry())
    assert [head.decoder.options["layer"] for head in recipe.heads.values()] == list(range(12))
    assert {(head.decoder.options["pool"], head.decoder.options["norm"]) for head in recipe.heads.values()} == {
        ("cls_mean", "none")
    }


@pytest.mark.parametrize("after_crop", [False, True])
def test_both_views_may_be_wide_and_grey(after_crop):
    shapes = {"img_size": (32, 64), "second_size": (16, 32), "mean": (0.5,), "std": (0.25,)}
    made = BEiTViews(BEiTViews.Config(**shapes, jitter_after_crop=after_crop))
    views = made(Sample(PHOTO, "photo"), torch.full((made.num_random,), 0.3))
    assert {name: view.shape for name, view in views.items()} == {"x": (1, 32, 64), "tokenizer": (1, 16, 32)}
    assert {name: made.specs[name].shape for name in views} == {"x": (1, 32, 64), "tokenizer": (1, 16, 32)}
    prepared = made.prepare(None, {name: view[None] for name, view in views.items()})
    torch.testing.assert_close(prepared["tokenizer"][0], views["tokenizer"] / 255)


def test_colours_of_other_bands_are_not_jittered():
    four = {"mean": (0.5,) * 4, "std": (0.25,) * 4}
    with pytest.raises(ValidationError, match=r"'mean' has 4 channels; use color_jitter: 0"):
        BEiTViews.Config(**four)
    assert BEiTViews(BEiTViews.Config(**four, color_jitter=0)).specs["tokenizer"].in_chans == 4
