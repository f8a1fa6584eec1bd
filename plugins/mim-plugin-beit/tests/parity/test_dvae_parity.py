"""Our dVAE against numbers that the official implementation computed (openai/DALL-E 5be4b23, in microsoft/unilm)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mim_plugin_beit.dvae import Bottleneck, map_pixels, unmap_pixels
from mim_plugin_beit.dvae_checkpoints import DalleCheckpoint
from parity.harness import (
    cases,
    named,
    of_committed_cases,
    relative,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mim_framework.assembly.builder import build_model
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask
from mim_framework.convert import import_checkpoint
from mim_framework.nn.patches import patchify
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

OUTPUT_TOLERANCE = 5e-6
CASES = cases("beit-dvae_*.safetensors")
IDS = Ask(aux=frozenset({"ids"}))


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Tensor], nn.Module]:
    """The tensors of a file, and our model with its weights, which went the way of a user."""
    tensors = load_file(request.param)
    with safe_open(request.param, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    torch.save(named(tensors, "param"), tmp_path / "dvae.pth")
    report = import_checkpoint(tmp_path / "dvae.pth", tmp_path / "in", options={"views.img_size": config["img_size"]})
    assert not report.unexpected
    assert all(name.startswith("heads.main.decoder.") for name in report.missing)
    rest = "name: dvae\ndata: {source: digits}\noptim: {lr: 1.0e-3}\ntrain: {total_batch_size: 2, steps: 1}\n"
    (tmp_path / "recipe.yaml").write_text((tmp_path / "in" / "slots.yaml").read_text() + rest)
    registry = Registry()
    return tensors, build_model(load_recipe(tmp_path / "recipe.yaml", [], registry), registry).objective


@of_committed_cases
def test_official_cases_are_committed():
    assert len(CASES) >= 2


@torch.no_grad()
def test_logits_and_token_ids_are_those_of_the_official_code(case: tuple[dict[str, Tensor], nn.Module]):
    tensors, objective = case
    images, encoder = tensors["input/images"], objective.encoder
    assert relative(map_pixels(images), tensors["out/mapped"]) < OUTPUT_TOLERANCE
    latent = encoder(images, Mask.none(len(images), encoder.spec.grid), IDS)
    logits = latent.tokens.transpose(1, 2).unflatten(2, latent.grid.shape)
    assert relative(logits, tensors["out/z_logits"]) < OUTPUT_TOLERANCE
    assert relative(logits.softmax(1), tensors["out/probs"]) < OUTPUT_TOLERANCE
    assert torch.equal(latent.aux["ids"].unflatten(1, latent.grid.shape), tensors["out/token_ids"])


@torch.no_grad()
def test_every_group_of_the_encoder_gives_what_the_official_one_does(case: tuple[dict[str, Tensor], nn.Module]):
    tensors, objective = case
    images, encoder = tensors["input/images"], objective.encoder
    seen: dict[str, Tensor] = {}
    for number in range(1, 5):
        group = encoder.blocks.get_submodule(f"group_{number}")
        group.register_forward_hook(lambda _, __, out, n=number: seen.update({f"encoder.blocks.group_{n}": out}))
    encoder(images, Mask.none(len(images), encoder.spec.grid))
    middle = named(tensors, "mid")
    assert middle.keys() & seen.keys() == seen.keys()
    for name, out in seen.items():
        assert relative(out[:1], middle[name]) < OUTPUT_TOLERANCE, name


@torch.no_grad()
def test_decoded_images_are_those_of_the_official_code(case: tuple[dict[str, Tensor], nn.Module]):
    tensors, objective = case
    if "out/decoded" not in tensors:
        pytest.skip("this file holds no decoder")
    images, encoder = tensors["input/images"], objective.encoder
    mask = Mask.none(len(images), encoder.spec.grid)
    pred = objective.heads["main"].decoder.eval()(encoder(images, mask), mask)
    means, log_scales = tensors["out/decoded"].chunk(2, dim=1)
    assert relative(pred.values, patchify(means, 8)) < OUTPUT_TOLERANCE
    assert relative(pred.log_scales, patchify(log_scales, 8)) < OUTPUT_TOLERANCE
    picture = objective.heads["main"].target.reconstruct(pred, mask, images)
    assert relative(picture, tensors["out/decoded_image"]) < OUTPUT_TOLERANCE
    assert relative(unmap_pixels(map_pixels(images)), images) < OUTPUT_TOLERANCE


def test_weights_go_out_as_they_came(case: tuple[dict[str, Tensor], nn.Module]):
    tensors, objective = case
    exported = DalleCheckpoint().export_state(objective.state_dict())
    for name, official in named(tensors, "param").items():
        assert torch.equal(exported[name], official), name


@torch.no_grad()
@pytest.mark.parametrize("fault", ["pixels not mapped", "another residual scale", "average pooling"])
def test_a_wrong_implementation_would_be_found(case: tuple[dict[str, Tensor], nn.Module], fault: str):
    tensors, objective = case
    images, encoder = tensors["input/images"], objective.encoder
    for module in encoder.modules():
        if fault == "another residual scale" and isinstance(module, Bottleneck):
            module.scale *= 1.001
    if fault == "average pooling":
        encoder.blocks.group_1.resize = nn.AvgPool2d(2)
    if fault == "pixels not mapped":
        images = (images - 0.1) / 0.8
    latent = encoder(images, Mask.none(len(images), encoder.spec.grid))
    logits = latent.tokens.transpose(1, 2).unflatten(2, latent.grid.shape)
    assert relative(logits, tensors["out/z_logits"]) > 5 * OUTPUT_TOLERANCE
