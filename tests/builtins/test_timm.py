"""timm's models as encoders: where weights come from, which normalisation they want, and CLIP's projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch.nn.functional import linear

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.base.errors import CheckpointError, RecipeError
from mim_framework.builtins.timm import TimmEncoder
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.specs import Specs, ViewSpec
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

CLIP_MEAN, CLIP_STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
SPECS = Specs(views={"x": ViewSpec("x", size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)})
NOTHING = Mask.none(2, Grid((4, 4)))


@register_model
def vit_clip_of_the_tests(pretrained: bool = False, num_classes: int = 6, **options: Any) -> VisionTransformer:
    """As timm has CLIP: a norm before the blocks, and a linear layer into the space of texts as the head."""
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": num_classes}
    taken = {name: value for name, value in options.items() if name in ("img_size", "in_chans", "drop_path_rate")}
    model = VisionTransformer(**taken, **sizes, pre_norm=True)
    model.pretrained_cfg = {"mean": CLIP_MEAN, "std": CLIP_STD, "classifier": "head", "num_classes": 6}
    return model


def encoder_of(**options: Any) -> TimmEncoder:
    encoder = TimmEncoder(TimmEncoder.Config(model="vit_clip_of_the_tests", **options), SPECS)
    encoder.load_published()
    return encoder.eval()


def recipe_of(teacher: dict[str, Any], **changes: Any) -> Recipe:
    recipe = {
        "name": "run",
        "data": {"source": "digits"},
        "views": {"type": "image", "img_size": 32},
        "masker": "none",
        "encoder": {"type": "vit", "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "target": {"type": "features", "teacher": "clip", "normalize": False},
        "decoder": "linear",
        "loss": "cosine",
        "teachers": {"clip": {"encoder": {"type": "timm", "model": "vit_clip_of_the_tests", **teacher}}},
        "optim": {"lr": 1e-3},
        "train": {"total_batch_size": 2, "steps": 1},
    }
    return Recipe.model_validate(recipe | changes)


@pytest.fixture
def published(tmp_path: Path) -> tuple[VisionTransformer, str]:
    """A model with weights of its own, and the file of them."""
    torch.manual_seed(3)
    model = timm.create_model("vit_clip_of_the_tests", img_size=32).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    return model, str(tmp_path / "clip.safetensors")


@torch.no_grad()
def test_projected_tokens_are_those_of_the_last_layer_without_its_bias(published):
    model, file = published
    images = torch.randn(2, 3, 32, 32)
    latent = encoder_of(checkpoint=file, project=True)(images, NOTHING)
    wanted = linear(model.forward_features(images), model.head.weight)
    assert latent.tokens.shape == (2, 16, 6)
    assert torch.allclose(torch.cat([latent.prefix, latent.tokens], dim=1), wanted, atol=1e-6)
    plain = encoder_of(checkpoint=file)(images, NOTHING)
    assert torch.allclose(plain.tokens, model.forward_features(images)[:, 1:], atol=1e-6)


def test_all_that_trains_has_a_place_in_the_tokens(published):
    encoder = encoder_of(checkpoint=published[1], project=True)
    latent = encoder(torch.randn(2, 3, 32, 32), NOTHING)
    torch.cat([latent.prefix, latent.tokens], dim=1).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert encoder.spec.dim == 6


def test_published_weights_see_images_normalised_as_published_and_the_student_as_in_the_recipe(published):
    model = build_model(recipe_of({"checkpoint": published[1], "project": True}), Registry())
    seen = []
    teacher = model.teachers["clip"].part("encoder")
    teacher.model.patch_embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    batch = model.views.example(2)
    views = model.views.prepare(None, batch)
    step = make_step(model.recipe, torch.arange(2), teachers=model.teachers.session())
    model.objective(step, views)
    wanted = (batch["x"] / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    assert torch.allclose(seen[0], wanted, atol=1e-5)

    student = {"type": "timm", "model": "vit_clip_of_the_tests", "checkpoint": published[1]}
    head = {"target": "pixels", "teachers": {}, "loss": "mse", "encoder": student}
    model = build_model(recipe_of({}, **head), Registry())
    model.objective.encoder.model.patch_embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.objective(step, views)
    assert torch.equal(seen[1], views["x"])


def test_weights_without_a_source_have_no_normalisation_of_their_own():
    assert encoder_of().spec.mean is None
    assert encoder_of().spec.std is None


def test_the_teacher_does_not_change_how_the_student_begins(published):
    clip = {"type": "timm", "model": "vit_clip_of_the_tests", "project": True}
    teachers = [{"encoder": clip, "random": True}, {"encoder": clip | {"checkpoint": published[1]}}]
    weights = [
        build_model(recipe_of({}, teachers={"clip": teacher}), Registry()).objective.state_dict()
        for teacher in teachers
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_costs_and_imports_need_no_weights(tmp_path: Path):
    recipe = recipe_of({"checkpoint": str(tmp_path / "none.safetensors")})
    build_model(recipe, Registry(), with_weights=False)
    with pytest.raises(RecipeError, match=r"teachers.clip.encoder: timm: checkpoint .*none.safetensors does not exist"):
        build_model(recipe, Registry())


def test_what_is_no_vision_transformer_with_a_linear_layer_cannot_be_projected():
    with pytest.raises(ValueError, match=r"project=true needs a vision transformer.*'test_resnet' is none"):
        TimmEncoder(TimmEncoder.Config(model="test_resnet", project=True), SPECS)
    with pytest.raises(ValueError, match="exclude each other"):
        encoder_of(pretrained=True, checkpoint="x.safetensors")


def test_files_that_do_not_fit_are_refused(published, tmp_path: Path):
    model, file = published
    state = model.state_dict()
    (tmp_path / "clip.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"clip.pth is no .safetensors file, and nothing else is read"):
        encoder_of(checkpoint=str(tmp_path / "clip.pth"))
    del state["norm.weight"]
    save_file({**state, "other": torch.zeros(1), "cls_token": torch.zeros(1, 1, 8)}, file)
    text = (
        r"does not fit timm's 'vit_clip_of_the_tests': cls_token \(1, 1, 8\), needed \(1, 1, 16\), "
        r"norm.weight None, needed \(16,\), other \(1,\), needed None"
    )
    with pytest.raises(ValueError, match=text):
        encoder_of(checkpoint=file)
    Path(file).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        encoder_of(checkpoint=file)


def test_a_name_that_timm_does_not_know_is_refused_with_others():
    config = TimmEncoder.Config(model="vit_bsae")
    with pytest.raises(ValueError, match="timm knows no model 'vit_bsae'; for example .*vit_"):
        TimmEncoder(config, SPECS)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_layers_of_a_vision_transformer_are_timms_and_a_projection_is_in_the_last():
    encoder = encoder_of(project=True)
    layers = {"model.cls_token": 0, "model.pos_embed": 0, "model.patch_embed.proj.weight": 0,
              "model.blocks.0.mlp.fc1.bias": 1, "model.blocks.1.norm1.weight": 2, "model.norm.weight": 2,
              "projection.weight": 3}  # fmt: skip
    assert layers.keys() <= dict(encoder.named_parameters()).keys()
    assert {name: encoder.layer_of(name) for name in layers} == layers
    assert encoder.num_layers == 4


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_convnext"])
def test_rates_by_layer_are_those_of_timms_own_function_for_the_model_with_its_classifier(model):
    whole = timm.create_model(model)
    names = {id(parameter): f"model.{name}" for name, parameter in whole.named_parameters()}
    scales = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(whole, layer_decay=0.5)
        for parameter in group["params"]
    }
    encoder = TimmEncoder(TimmEncoder.Config(model=model), SPECS)
    ours = {name: 0.5 ** (encoder.num_layers - 1 - encoder.layer_of(name)) for name, _ in encoder.named_parameters()}
    assert ours == {name: scales[name] for name in ours}
    assert len(set(ours.values())) > 3
