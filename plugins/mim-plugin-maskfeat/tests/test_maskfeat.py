"""HOG and the encoders of MaskFeat, by hand and by property. Official numbers are in parity/."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from mim_plugin_maskfeat import HOGTarget, MaskFeatMViT, MaskFeatViT
from mim_plugin_maskfeat.checkpoints import (
    MMPretrainCheckpoint,
    MViTTimmCheckpoint,
    OfficialCheckpoint,
    TimmCheckpoint,
)
from mim_plugin_maskfeat.hog import gaussian_kernel, glyphs, histogram_by_bins, histogram_by_scatter, hog, orientations
from safetensors.torch import save_file
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import Tensor, nn

from mim_framework import Ask, EncoderSpec, Grid, Mask, Masked, MaskerSpec, Pred, Specs, Step, ViewSpec
from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.preflight import make_step
from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.evaluate.reconstruct import reconstruct
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

GRID = Grid((2, 2))
VIEWS = Specs(views={"x": ViewSpec("x", size=(16, 16))})
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def normalised(images: Tensor) -> Tensor:
    """As `ImageViews.prepare` does it."""
    return images.float().mul_(1 / (255 * STD)).add_(-MEAN / STD)


def make_target(stride: int = 8, img_size: int = 16, in_chans: int = 3, **options) -> HOGTarget:
    grid = Grid((img_size // stride,) * 2)
    encoder = EncoderSpec(dim=8, grid=grid, stride=stride, depth=1, num_heads=1, in_chans=in_chans)
    specs = Specs(views={"x": ViewSpec("x", size=(img_size, img_size), in_chans=in_chans)}, encoder=encoder)
    return HOGTarget(HOGTarget.Config(**options), specs)


def make_vit(**options) -> MaskFeatViT:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} | options
    return MaskFeatViT(MaskFeatViT.Config(**options), VIEWS)


def make_mvit(img_size: int = 32, **options) -> MaskFeatMViT:
    torch.manual_seed(0)
    options = {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": 1} | options
    return MaskFeatMViT(MaskFeatMViT.Config(**options), Specs(views={"x": ViewSpec("x", size=(img_size, img_size))}))


def step() -> Step:
    return Step(0, 1, 0.0, 1.0, torch.arange(1), 0, None)


# --- HOG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dx", "dy", "bin_number"), [(1, 0, 4), (-1, 0, 4), (0, 1, 0), (0, -1, 0), (1, 1, 2), (1, -1, 6)]
)
def test_ramps_fall_into_one_bin_by_hand(dx: int, dy: int, bin_number: int):
    """Bins of 20 degrees, from a gradient straight down: to the right is 90 degrees, the middle of bin 4."""
    ramp = dx * torch.arange(24.0)[None, :] + dy * torch.arange(24.0)[:, None]
    middle = hog(ramp[None, None])[0, 0, :, 1, 1]
    assert middle.tolist() == [1.0 if number == bin_number else 0.0 for number in range(9)]


def test_gradients_by_hand():
    images = torch.zeros(1, 1, 4, 4)
    images[..., 2:] = 1.0  # an edge: left minus right is -1 on both sides of it, with weights 1, 2, 1
    magnitude, index = orientations(images, 9, 0.0, None)
    assert magnitude[0, 0].tolist() == [[0, 4, 4, 0]] * 4
    assert index[0, 0].tolist() == [[0, 4, 4, 0]] * 4


def reference_hog(image: Tensor, bins: int, cell_size: int) -> Tensor:
    """image (H, W) float64 -> (bins, rows, columns): pixel by pixel, as the fact sheet of the official code says."""
    height, width = image.shape
    mirror = lambda i, size: -i if i < 0 else 2 * (size - 1) - i if i >= size else i  # noqa: E731
    at = lambda y, x: image[mirror(y, height), mirror(x, width)].item()  # noqa: E731
    sums = torch.zeros(bins, height // cell_size, width // cell_size, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            gx = sum(w * (at(y + i, x - 1) - at(y + i, x + 1)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            gy = sum(w * (at(y - 1, x + i) - at(y + 1, x + i)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            number = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
            sums[number, y // cell_size, x // cell_size] += math.hypot(gx, gy)
    return sums / sums.norm(dim=0, keepdim=True).clamp(min=1e-12)


@pytest.mark.parametrize(("bins", "cell_size"), [(9, 4), (9, 8), (6, 4), (1, 2), (12, 8)])
def test_hog_is_that_of_a_plain_loop_over_pixels(bins: int, cell_size: int):
    image = (torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) * 255).round()
    ours = hog(image[None, None].byte(), bins=bins, cell_size=cell_size)[0, 0]
    assert torch.allclose(ours.double(), reference_hog(image.double(), bins, cell_size), atol=1e-6)


def test_both_forms_of_the_histogram_agree_on_a_whole_batch():
    magnitude, index = orientations(noise(3, 2, 16, 24).round(decimals=1), 7, 0.0, None)
    by_bins = histogram_by_bins(magnitude, index, 7, 4)
    assert by_bins.shape == (3, 2, 7, 4, 6)
    assert torch.allclose(histogram_by_scatter(magnitude, index.clone(), 7, 4), by_bins, atol=1e-6)
    assert by_bins.sum().item() == pytest.approx(magnitude.sum().item(), rel=1e-5)


def test_an_image_has_the_same_hog_in_a_batch_of_any_size(monkeypatch: pytest.MonkeyPatch):
    images = noise(5, 3, 16, 16)
    alone = torch.cat([hog(image[None]) for image in images])
    assert torch.allclose(hog(images), alone, atol=1e-6)
    monkeypatch.setattr("mim_plugin_maskfeat.hog.CHUNK", 2 * 3 * 16 * 16)
    assert torch.allclose(hog(images), alone, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 100, 137, 254])
def test_a_constant_image_has_no_orientation_also_after_normalisation(level: int):
    """The official code blows the rounding of a normalised flat image up to a unit vector."""
    images = torch.full((1, 3, 16, 16), level, dtype=torch.uint8)
    assert hog(images).abs().max() == 0
    assert hog(normalised(images)).abs().max() == 0
    assert make_target().describe(normalised(images)).abs().max() == 0


def test_rounding_of_the_normalised_view_does_not_choose_bins():
    """Gradients that are zero in whole numbers are common in 8-bit images; without the threshold bins 0 and 8 flip."""
    images = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 4).byte()
    exact, view = hog(images), normalised(images)
    assert torch.allclose(hog(view, flat_threshold=3e-6), exact, atol=1e-5)
    assert (hog(view) - exact).abs().max() > 0.05


def test_scale_shift_and_sign_of_an_image_do_not_matter():
    images = noise(1, 3, 16, 16)
    for same in (images * 3, images + 0.5, -images):
        assert torch.allclose(hog(same), hog(images), atol=1e-4)


def test_every_cell_of_noise_has_unit_norm_and_the_mean_square_is_a_ninth():
    cells = hog(noise(2, 3, 32, 32))
    assert torch.allclose(cells.norm(dim=2), torch.ones(2, 3, 4, 4), atol=1e-6)
    assert cells.square().mean().item() == pytest.approx(1 / 9, rel=1e-5)


def test_gaussian_windows_tile_the_image_and_weigh_its_pixels():
    kernel = gaussian_kernel(16)
    assert kernel.sum().item() == pytest.approx(1.0)
    assert kernel[7, 7] == kernel.max()
    assert (kernel[0, 7] / kernel[7, 7]).item() == pytest.approx(math.exp(-0.5 * (7.5**2 - 0.5**2) / 8**2))
    images = noise(1, 1, 32, 16)
    magnitude, index = orientations(images, 9, 0.0, kernel.repeat(2, 1))
    weighted = histogram_by_bins(magnitude, index, 9, 8)
    assert torch.allclose(hog(images, gaussian_window=16), nn.functional.normalize(weighted, dim=2), atol=1e-6)
    assert not torch.allclose(hog(images, gaussian_window=16), hog(images), atol=0.01)


def test_autocast_does_not_reach_the_target():
    target, images = make_target(), normalised((noise(2, 3, 16, 16).abs() * 99).byte())
    masked = Masked({"x": Mask.none(2, GRID).predicting(torch.ones(2, 4, dtype=torch.bool))}, {"x": images})
    exact = target(step(), masked)
    with torch.autocast("cpu", torch.bfloat16):
        cast = target(step(), masked)
    assert cast.values.dtype == torch.float32
    assert torch.equal(cast.values, exact.values)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_one_graph_with_the_same_values():
    torch.compiler.reset()
    images = noise(2, 3, 16, 16)
    compiled = torch.compile(hog, fullgraph=True)
    assert torch.allclose(compiled(images), hog(images), atol=1e-5)


# --- target ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_patch_are_ordered_by_channel_bin_row_and_column():
    target = make_target(stride=8, cell_size=4)
    images = noise(1, 3, 16, 16)
    cells, patches = hog(images, cell_size=4), target.describe(images)
    assert target.spec.dim == 3 * 9 * 4
    for channel, bin_number, row, column in ((0, 0, 0, 0), (1, 3, 0, 1), (2, 8, 1, 0)):
        number = ((channel * 9 + bin_number) * 2 + row) * 2 + column
        assert patches[0, 2, number] == cells[0, channel, bin_number, 2 + row, column]  # patch 2: lower left


def test_values_at_hidden_positions_only_are_those_of_the_whole_clean_image():
    target, images = make_target(), noise(2, 3, 16, 16)
    mask = Mask(torch.tensor([[True, False, False, True], [False, True, True, False]]), GRID, equal=True)
    pred = target(step(), Masked({"x": mask}, {"x": torch.zeros_like(images)}, originals={"x": images}))
    whole = target.describe(images)
    assert pred.ids.tolist() == [[0, 3], [1, 2]]
    assert torch.equal(pred.values, torch.stack([whole[0, [0, 3]], whole[1, [1, 2]]]))
    uneven = Mask(torch.tensor([[True, False, False, True], [False, True, False, False]]), GRID)
    everywhere = target(step(), Masked({"x": uneven}, {"x": images}))
    assert everywhere.ids is None
    assert torch.equal(everywhere.values, whole)


@pytest.mark.parametrize(
    ("stride", "img_size", "options", "cell_size", "dim", "side"),
    [
        (16, 32, {}, 8, 108, 2),  # MaskFeat
        (32, 64, {}, 8, 432, 2),  # Swin, MixMIM: 4x4 cells
        (14, 28, {}, 7, 108, 2),  # ViT-H
        (4, 16, {}, 4, 27, 4),
        (16, 32, {"patch_size": 8, "bins": 6, "cell_size": 4}, 4, 72, 4),
    ],
)
def test_any_patch_has_cells_that_fit(stride: int, img_size: int, options: dict, cell_size: int, dim: int, side: int):
    target = make_target(stride, img_size, **options)
    assert target.cell_size == cell_size
    assert (target.spec.kind, target.spec.dim, target.spec.grid) == ("dense", dim, Grid((side, side)))
    assert target.describe(noise(1, 3, img_size, img_size)).shape == (1, side * side, dim)


def test_grey_images_have_one_channel():
    assert make_target(in_chans=1).spec.dim == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell_size": 5}, "cell_size 5 does not divide the patch of 8 pixels; 4 does"),
        ({"patch_size": 12}, "image size 16x16 is not a multiple of patch_size 12"),
        ({"gaussian_window": 6}, "image size 16x16 is not a multiple of gaussian_window 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_target(**options)


def test_an_image_of_part_of_a_cell_is_refused():
    with pytest.raises(ValueError, match="image size 16x12 is not a multiple of cell_size 8"):
        hog(torch.zeros(1, 1, 16, 12))


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_glyph_lies_along_the_edge():
    """Bin 4 of 9 holds gradients to the right, whose edges are upright; bin 0 of 1 is the same by symmetry."""
    upright = glyphs(9, 16)[4]
    assert upright[:, 7:9].sum() == upright.sum()
    assert upright[0].sum() > 0
    assert torch.allclose(glyphs(9, 16)[0], glyphs(9, 16)[8].flip(1), atol=1e-6)


def test_a_drawing_holds_predictions_where_hidden_and_the_image_elsewhere():
    target, view = make_target(), noise(1, 3, 16, 16)
    mask = Mask(torch.tensor([[False, True, False, True]]), GRID, equal=True)
    truth = target(step(), Masked({"x": mask}, {"x": view}))
    perfect = target.draw(truth, mask, view)
    assert perfect.shape == (1, 1, 32, 32)  # cells of 8 pixels drawn on 16
    assert 0 <= perfect.min() < perfect.max() <= 1
    wrong = target.draw(Pred(torch.zeros_like(truth.values), GRID, truth.ids), mask, view)
    changed = (wrong != perfect).reshape(2, 16, 2, 16).any(3).any(1)
    assert changed.flatten().tolist() == [False, True, False, True]
    nothing = torch.zeros(1, 4, 27)
    assert torch.equal(target.draw(Pred(nothing, GRID), replace(mask, equal=False, num_hidden=None), view), wrong)


def test_a_run_shows_the_drawing_beside_images_of_its_size():
    recipe = load_recipe("maskfeat_quickstart", [], Registry())
    model = build_model(recipe, Registry())
    rows = reconstruct(model.objective, model.views, make_step(recipe, torch.arange(2)), model.views.example(2))
    assert [image.shape for image in rows[0]] == [(3, 128, 128), (3, 128, 128), (1, 128, 128)]


# --- ViT -------------------------------------------------------------------------------------------------------------


def test_initial_biases_are_the_official_ones():
    encoder = make_vit()
    assert encoder.norm.__class__ is nn.Identity
    for name, parameter in encoder.named_parameters():
        if name.endswith(".bias") and not name.startswith("patch_embed"):
            assert (parameter == 0.02).all(), name
        if name.endswith("norm1.weight"):
            assert (parameter == 1).all(), name
    assert 0 < encoder.patch_embed.proj.bias.abs().max() <= 1 / math.sqrt(3 * 8 * 8)  # PyTorch's default
    assert encoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert make_vit(initial_bias=0).blocks[0].attn.qkv.bias.abs().max() == 0


def test_what_decays_is_as_official_or_as_in_mmpretrain():
    assert make_vit().no_weight_decay() == ()
    assert make_vit(mask_token_decays=False).no_weight_decay() == ("mask_token",)


@pytest.mark.parametrize(
    ("recipe", "count"),
    [("maskfeat", 85_882_476), ("maskfeat_vit_large", 303_413_356)],  # of the official modules
)
def test_parameter_counts_are_the_published_ones(recipe: str, count: int):
    with torch.device("meta"):
        model = build_model(load_recipe(recipe, [], Registry()), Registry(), with_weights=False)
    assert sum(parameter.numel() for parameter in model.objective.parameters()) == count


# --- MViTv2 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_unmasked_our_mvit_is_timms():
    timms = timm.create_model("mvitv2_tiny", img_size=64, num_classes=0).eval()
    ours = make_mvit(64, embed_dim=96, depths=(1, 2, 5, 2), last_pooling=True, final_norm=True).eval()
    ours.model.load_state_dict(timms.state_dict())
    images = noise(1, 3, 64, 64)
    latent = ours(images, Mask.none(1, ours.spec.grid))
    assert (ours.spec.grid, ours.spec.stride, ours.spec.depth, ours.spec.dim) == (Grid((2, 2)), (32, 32), 10, 768)
    assert torch.allclose(latent.tokens, timms.forward_features(images), atol=1e-5)


def test_the_small_model_is_timms_by_default():
    config = MaskFeatMViT.Config()
    published = MultiScaleVitCfg(depths=(1, 2, 11, 2))  # timm's mvitv2_small
    assert (config.depths, config.embed_dim) == (published.depths, published.embed_dim[0])
    assert (config.num_heads, config.expand_attn) == (published.num_heads[0], published.expand_attn)


@torch.no_grad()
def test_mask_tokens_stand_on_the_finer_grid_of_the_patch_embedding():
    encoder = make_mvit()
    assert (encoder.spec.grid, encoder.patch_grid, encoder.spec.dim) == (Grid((2, 2)), Grid((8, 8)), 64)
    encoder.mask_token.fill_(7.0)
    seen = {}
    encoder.repeated_blocks()[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    encoder(noise(1, 3, 32, 32), Mask(torch.tensor([[False, True, False, False]]), GRID, equal=True))
    is_token = (seen["x"] == 7).all(-1).reshape(8, 8)
    assert is_token[:4, 4:].all()
    assert is_token.sum() == 16


@torch.no_grad()
def test_hidden_pixels_reach_the_mvit_by_three_pixels_only():
    encoder, images = make_mvit().eval(), noise(1, 3, 32, 32)
    mask = Mask(torch.tensor([[True, False, True, False]]), GRID, equal=True)  # columns 0 to 15
    tokens = encoder(images, mask).tokens
    far, near = images.clone(), images.clone()
    far[..., :13], near[..., 13:16] = 9.0, 9.0
    assert torch.equal(encoder(far, mask).tokens, tokens)
    assert not torch.equal(encoder(near, mask).tokens, tokens)


@torch.no_grad()
def test_layers_of_the_mvit_have_the_sizes_of_its_spec():
    encoder = make_mvit(final_norm=True)
    latent = encoder(noise(2, 3, 32, 32), Mask.none(2, GRID), Ask(layers=frozenset(range(5))))
    shapes = {i: (layer.shape[2], layer.shape[1]) for i, layer in latent.layers.items()}
    assert shapes == {0: (8, 64), 1: (16, 16), 2: (32, 4), 3: (64, 4), 4: (64, 4)}
    assert {i: (dim, grid.num_patches) for i, (dim, grid) in encoder.spec.layers.items()} == shapes
    assert torch.equal(encoder.final_norm(latent.layers[4]), latent.tokens)


def test_the_mvits_blocks_are_counted_through_its_stages():
    encoder = make_mvit(final_norm=True)
    layers = {"mask_token": 0, "model.patch_embed.proj.weight": 0, "model.stages.0.blocks.0.mlp.fc1.bias": 1,
              "model.stages.1.blocks.0.norm1.weight": 2, "model.stages.3.blocks.0.norm1.weight": 4,
              "model.stages.3.blocks.1.norm1.weight": 5,
              "model.norm.weight": 6}  # fmt: skip
    assert layers.keys() <= dict(encoder.named_parameters()).keys()
    assert {name: encoder.layer_of(name) for name in layers} == layers
    assert encoder.num_layers == 7


def test_every_parameter_of_the_mvit_gets_a_gradient_also_if_nothing_is_hidden():
    encoder = make_mvit()
    encoder(noise(1, 3, 32, 32), Mask.none(1, GRID)).tokens.square().mean().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 24}, "square images of a multiple of 16 pixels, got 24x24"),
        ({"img_size": 48, "last_pooling": True}, "multiple of 32 pixels, got 48x48"),
        ({"num_heads": 3}, "embed_dim 8 is not a multiple of num_heads 3"),
    ],
)
def test_an_mvit_that_does_not_fit_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_mvit(**options)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def state_of(encoder: MaskFeatViT | MaskFeatMViT, norm: bool = True) -> dict[str, Tensor]:
    """An objective's state; the head's norm is told from an untouched one."""
    masker = MaskerSpec(encoder.spec.grid, equal=True, num_hidden=1)
    target = HOGTarget(HOGTarget.Config(), VIEWS.also(views={"x": ViewSpec("x", size=(32, 32))}, encoder=encoder.spec))
    specs = VIEWS.also(encoder=encoder.spec, masker=masker, target=replace(target.spec, grid=encoder.spec.grid))
    decoder = LinearDecoder(LinearDecoder.Config(norm=norm), specs)
    if norm:
        nn.init.constant_(decoder.norm.bias, 0.5)
    return {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()} | {
        f"heads.main.decoder.{name}": tensor for name, tensor in decoder.state_dict().items()
    }


def test_official_checkpoints_go_out_and_come_back():
    ours = state_of(make_vit())
    official = OfficialCheckpoint().export_state(ours)
    assert {
        "mask_token",
        "blocks.1.attn.qkv.bias",
        "pred_head.transforms.0.0.bias",
        "pred_head.projections.0.weight",
    } <= (official.keys())
    assert OfficialCheckpoint().recognises(official)
    filters = {"hogs.0.weight_x": torch.zeros(3, 1, 3, 3)}
    imported = OfficialCheckpoint().import_state(official | filters)
    assert imported.keys() == ours.keys()
    assert all(imported[name] is tensor for name, tensor in ours.items())


def test_a_file_is_recognised_by_one_layout():
    official = OfficialCheckpoint().export_state(state_of(make_vit()))
    theirs = {to_mmpretrain(name): tensor for name, tensor in state_of(make_vit(final_norm=True), norm=False).items()}
    layouts = {name: cls() for name, cls in Registry().classes("checkpoint_format").items()}
    fitting = lambda state: [name for name, layout in layouts.items() if layout.recognises(state)]  # noqa: E731
    assert fitting(official) == ["maskfeat_official"]
    assert fitting(theirs) == ["maskfeat_mmpretrain"]


def test_slots_are_told_by_the_shapes():
    layout = OfficialCheckpoint()
    slots = layout.to_recipe(layout.export_state(state_of(make_vit())))
    assert slots["views"]["img_size"] == 16
    assert slots["encoder"] == {
        "type": "maskfeat_vit", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": None, "mlp_ratio": 4.0,
    }  # fmt: skip
    assert slots["target"] == {"type": "hog", "cell_size": 8, "gaussian_window": 0}
    assert slots["decoder"] == {"type": "linear", "norm": True}
    assert slots["masker"]["rule"] == "stop_short"


def to_mmpretrain(ours: str) -> str:
    """The name of one of our tensors in mmpretrain, written down the other way round than the plugin has it."""
    name = ours.replace("heads.main.decoder.head.", "neck.fc.").replace("encoder.norm.", "backbone.ln1.")
    name = name.replace("encoder.", "backbone.").replace("patch_embed.proj", "patch_embed.projection")
    name = name.replace(".blocks.", ".layers.").replace(".norm1.", ".ln1.").replace(".norm2.", ".ln2.")
    return name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")


def test_mmpretrain_checkpoints_are_read():
    ours = state_of(make_vit(final_norm=True), norm=False)
    theirs = {to_mmpretrain(name): tensor for name, tensor in ours.items()}
    assert {"backbone.layers.1.ffn.layers.0.0.weight", "backbone.ln1.bias", "neck.fc.weight"} <= theirs.keys()
    layout = MMPretrainCheckpoint()
    imported = layout.import_state(theirs | {"target_generator.gaussian_kernel": torch.zeros(16, 16)})
    assert imported.keys() == ours.keys()
    assert all(imported[name] is tensor for name, tensor in ours.items())
    slots = layout.to_recipe(theirs)
    assert slots["encoder"]["final_norm"] is True
    assert slots["encoder"]["mask_token_decays"] is False
    assert slots["target"]["gaussian_window"] == 16
    assert slots["decoder"] == {"type": "linear"}
    with pytest.raises(ValueError, match="it can be read only"):
        layout.export_state(ours)


def test_the_number_of_heads_is_known_for_published_widths_only():
    layout = OfficialCheckpoint()
    state = layout.export_state(state_of(make_vit()))
    state |= {"cls_token": torch.zeros(1, 1, 768), "blocks.0.mlp.fc1.weight": torch.zeros(3072, 768)}
    assert layout.to_recipe(state)["encoder"]["num_heads"].value == 12  # a guess


def timm_vit(**options) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_base_patch16_224", **sizes, num_classes=0, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("place", ["head", "encoder", "nowhere"])
def test_timm_computes_our_features_from_the_exported_encoder(tmp_path: Path, place: str):
    encoder = make_vit(final_norm=place == "encoder").eval()
    state = state_of(encoder, norm=place == "head")
    save_file(TimmCheckpoint().export_state(state), tmp_path / "timm.safetensors")
    options = {"global_pool": "avg", "fc_norm": False} | ({"final_norm": False} if place == "nowhere" else {})
    model = timm_vit(checkpoint_path=str(tmp_path / "timm.safetensors"), **options)
    images = noise(2, 3, 16, 16)
    latent = encoder(images, Mask.none(2, GRID))
    tokens = torch.cat([latent.prefix, latent.tokens], dim=1)
    if place == "head":
        norm = [state[f"heads.main.decoder.norm.{name}"] for name in ("weight", "bias")]
        tokens = nn.functional.layer_norm(tokens, (32,), *norm, eps=1e-6)
    assert torch.allclose(model.forward_features(images), tokens, atol=1e-5)
    assert torch.allclose(model(images), tokens[:, 1:].mean(1), atol=1e-5)


@torch.no_grad()
def test_timm_computes_our_features_from_the_exported_mvit(tmp_path: Path):
    encoder = make_mvit(64, embed_dim=96, depths=(1, 2, 5, 2), last_pooling=True).eval()
    save_file(MViTTimmCheckpoint().export_state(state_of(encoder)), tmp_path / "timm.safetensors")
    model = timm.create_model(
        "mvitv2_tiny", img_size=64, num_classes=0, checkpoint_path=str(tmp_path / "timm.safetensors")
    ).eval()
    images = noise(1, 3, 64, 64)
    tokens = encoder(images, Mask.none(1, encoder.spec.grid)).tokens
    tokens = nn.functional.layer_norm(tokens, (768,), bias=torch.full((768,), 0.5), eps=1e-6)
    assert torch.allclose(model.forward_features(images), tokens, atol=1e-4)


def test_timm_interpolates_the_last_relative_positions_of_an_mvit_without_last_pooling(tmp_path: Path):
    """13 rows where ours has 27 at 224 pixels, here 3 and 7."""
    encoder = make_mvit(64, embed_dim=96, depths=(1, 2, 5, 2))
    exported = MViTTimmCheckpoint().export_state(state_of(encoder))
    save_file(exported, tmp_path / "timm.safetensors")
    model = timm.create_model(
        "mvitv2_tiny", img_size=64, num_classes=0, pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "timm.safetensors"), "num_classes": 0},
    )  # fmt: skip
    name = "stages.3.blocks.1.attn.rel_pos_h"
    assert (len(exported[name]), len(model.state_dict()[name])) == (7, 3)
    assert torch.equal(model.state_dict()[name][1], exported[name][3])  # the middle stays
    assert torch.equal(model.state_dict()["norm.bias"], torch.full((768,), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_norm": True}, "has a final norm"),
        ({"qkv_bias": "qv"}, "it holds no relative position biases"),
        ({"layer_scale": 0.1}, "it holds no relative position biases"),
        ({"position": "none"}, "it holds no relative position biases"),
    ],
)
def test_layouts_that_cannot_hold_an_encoder_say_so(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        OfficialCheckpoint().export_state(state_of(make_vit(**options)))


def test_timms_layout_is_read_with_the_slots_of_its_run_only():
    assert not TimmCheckpoint().recognises(TimmCheckpoint().export_state(state_of(make_vit())))
    with pytest.raises(ValueError, match="it reads only what `mim export` wrote with the slots of a run"):
        TimmCheckpoint().to_recipe({})


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_shipped_recipes_are_valid_and_have_the_official_rate():
    registry = Registry()
    names = {info.name for info in registry.recipes() if info.plugin == "maskfeat"}
    protocols = {"maskfeat_finetune": 2e-3, "maskfeat_finetune_vit_large": 1e-3, "maskfeat_linear": 1.6}
    assert names == {"maskfeat", "maskfeat_vit_large", "maskfeat_mvit_small", "maskfeat_quickstart", *protocols}
    for name, rate in protocols.items():
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(rate)
        assert recipe.objective.type == "classify"
    for name in names - {"maskfeat_quickstart", *protocols}:
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(1.6e-3)
        assert recipe.optim.clip_grad_norm == 0.02
        with torch.device("meta"):
            model = build_model(recipe, registry, with_weights=False)
        target = model.objective.heads["main"].target
        assert target.spec.grid == Grid((14, 14))
        assert (target.spec.grid, target.spec.dim) == (model.specs.encoder.grid, 108)
        assert not exempt_names(model.objective)


@pytest.mark.parametrize("encoder", ["vit", "mae_vit"])
def test_hog_is_a_target_for_other_methods_encoders(encoder: str):
    decoder = "{type: mae_decoder, embed_dim: 16, depth: 1, num_heads: 2}" if encoder == "mae_vit" else "linear"
    changes = {
        "masker": "{type: random, mask_ratio: 0.5}",
        "encoder": f"{{type: {encoder}, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}}",
        "decoder": decoder,
    }
    recipe = load_recipe("maskfeat_quickstart", [f"{slot}={value}" for slot, value in changes.items()], Registry())
    model = build_model(recipe, Registry())
    assert model.objective.heads["main"].target.spec.dim == 108
    views = model.views.prepare(None, model.views.example(2))
    loss = sum(model.objective(make_step(recipe, torch.arange(2)), views).losses.values())
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.objective.parameters())


def test_each_layout_names_its_encoder_so_that_the_shortest_name_means_the_right_one():
    assert TimmCheckpoint.encoders == {"maskfeat_vit"}
    assert MViTTimmCheckpoint.encoders == {"maskfeat_mvit"}
    assert OfficialCheckpoint.encoders == MMPretrainCheckpoint.encoders == {"maskfeat_vit"}
