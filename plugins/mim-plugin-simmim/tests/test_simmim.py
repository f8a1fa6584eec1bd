"""The components of SimMIM, by hand and by property. Official numbers are in parity/."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mim_plugin_simmim import SimMIMViT, SwinEncoder, SwinV2Encoder
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from mim_framework import Ask, Encoder, Grid, Mask, Specs, ViewSpec
from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.preflight import make_step
from mim_framework.evaluate.reconstruct import reconstruct
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import parameter_groups

IMAGE = 64
CELLS = Grid((2, 2))
SPECS = Specs(views={"x": ViewSpec("x", size=(IMAGE, IMAGE))})
SWIN = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 4}
VIT = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
KINDS: list[tuple[type[Encoder], dict[str, Any]]] = [(SwinEncoder, SWIN), (SwinV2Encoder, SWIN), (SimMIMViT, VIT)]
SWINS = [(SwinEncoder, SwinTransformer), (SwinV2Encoder, SwinTransformerV2)]


def make(cls: type[Encoder], specs: Specs = SPECS, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = VIT if cls is SimMIMViT else SWIN
    return cls(cls.Config(**sizes | options), specs)


def perturbed(module: nn.Module) -> Any:
    """Every parameter off its initial value, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0].name)
def encoder(request: pytest.FixtureRequest) -> Any:
    return perturbed(make(request.param[0]))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask() -> Mask:
    """Three of the four 32-pixel cells are hidden in the first image, the others in the second."""
    return Mask(torch.tensor([[True, True, False, True], [False, True, True, True]]), CELLS, equal=True)


# --- encoders --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_encoder(encoder: Any, images: Tensor, mask: Mask):
    pixels = mask.hidden.reshape(2, 1, 2, 2).repeat_interleave(32, 2).repeat_interleave(32, 3)
    before = encoder(images, mask).tokens
    assert torch.equal(before, encoder(images.masked_fill(pixels, 99.0), mask).tokens)
    assert not torch.allclose(before, encoder(images.masked_fill(~pixels, 9.0), mask).tokens)


@torch.no_grad()
def test_the_mask_token_stands_at_every_hidden_place_before_positions_by_hand(images: Tensor, mask: Mask):
    swin = perturbed(make(SwinEncoder, absolute_position=True))
    embedded = swin.embed(images, mask.at(swin.input_grid))
    assert embedded.shape == (2, 16, 16, 8)
    positions = swin.absolute_pos_embed.reshape(16, 16, 8)
    hidden, visible = embedded[0, :8], embedded[0, 8:, :8]  # cells 0 and 1 are the upper half, cell 2 the lower left
    assert torch.allclose(hidden, swin.mask_token[0] + positions[:8])
    assert torch.allclose(visible, swin.swin.patch_embed(images)[0, 8:, :8] + positions[8:, :8])


@torch.no_grad()
def test_rows_may_hide_different_numbers_and_nothing(encoder: Any, images: Tensor):
    assert encoder.spec.accepts == {"equal", "varies", "none"}
    varied = Mask(torch.tensor([[True, False, False, False], [False] * 4]), CELLS)
    encoder.eval()
    nothing = encoder(images, Mask.none(2, CELLS)).tokens
    tokens = encoder(images, varied).tokens
    assert torch.allclose(tokens[1], nothing[1], atol=1e-5)
    assert not torch.allclose(tokens[0], nothing[0], atol=1e-2)


@torch.no_grad()
def test_asked_layers_have_the_width_and_grid_that_the_spec_says(encoder: Any, images: Tensor, mask: Mask):
    spec, prefix = encoder.spec, encoder.spec.num_prefix_tokens
    latent = encoder(images, mask, Ask(layers=frozenset(range(spec.depth))))
    assert spec.lacks(Ask(layers=frozenset({spec.depth}))) == f"layers [{spec.depth}]"
    for number, (dim, grid) in spec.layers.items():
        assert latent.layers[number].shape == (2, prefix + grid.num_patches, dim)
    assert latent.tokens.shape == (2, spec.grid.num_patches, spec.dim)
    last = latent.layers[spec.depth - 1]
    assert torch.equal(encoder.final_norm(last)[:, prefix:], latent.tokens)
    assert not encoder(images, mask).layers


def test_the_stages_of_swin_by_hand():
    spec = make(SwinEncoder).spec
    stages = [(8, Grid((16, 16))), (16, Grid((8, 8))), (32, Grid((4, 4)))]
    assert list(spec.layers.values()) == [stage for stage in stages for _ in range(2)]
    assert (spec.dim, spec.grid, spec.stride, spec.depth, spec.num_prefix_tokens) == (32, Grid((4, 4)), (16, 16), 6, 0)


def test_windows_shift_in_every_second_block_and_never_where_one_window_is_the_whole_grid():
    blocks = make(SwinEncoder, depths=(2, 2, 2), window_size=8).repeated_blocks()
    assert [block.window_size for block in blocks] == [(8, 8)] * 4 + [(4, 4)] * 2
    assert [block.shift_size for block in blocks] == [(0, 0), (4, 4), *[(0, 0)] * 4]
    assert [len(block.attn.relative_position_bias_table) for block in blocks] == [15**2] * 4 + [7**2] * 2
    assert [block.attn_mask is None for block in blocks] == [True, False, *[True] * 4]
    assert blocks[1].attn_mask.unique().tolist() == [-math.inf, 0.0]


@pytest.mark.parametrize(("ours", "timms"), SWINS, ids=["swin", "swinv2"])
def test_our_swin_is_timms_and_its_gradients(ours: type[SwinEncoder], timms: Any, images: Tensor):
    """timm's own attention adds -100 in shifted windows, ours -inf, and SwinV2's bias is another constant away."""
    encoder = perturbed(make(ours)).eval()
    reference = timms(
        img_size=IMAGE, num_classes=0, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 2), window_size=4
    ).eval()
    reference.load_state_dict(encoder.swin.state_dict())
    tokens = encoder(images, Mask.none(2, CELLS)).tokens
    wanted = reference.forward_features(images).flatten(1, 2)
    assert torch.allclose(tokens, wanted, atol=2e-5)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5))
    for out in (tokens, wanted):
        (out * weights).sum().backward()
    for (name, parameter), other in zip(encoder.swin.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-3, atol=1e-4 * other.grad.abs().max().item()), name


def test_every_parameter_gets_a_gradient_whatever_is_hidden(encoder: Any, images: Tensor, mask: Mask):
    for each in (mask, Mask.none(2, CELLS)):
        encoder.zero_grad()
        latent = encoder(images, each)
        (latent.tokens.square().mean() + (0 if latent.prefix is None else latent.prefix.mean())).backward()
        assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_autocast_keeps_the_residual_stream_in_full_precision(encoder: Any, images: Tensor, mask: Mask):
    ask = Ask(layers=frozenset(range(encoder.spec.depth)))
    with torch.autocast("cpu", torch.bfloat16):
        latent = encoder(images, mask, ask)
    assert {layer.dtype for layer in latent.layers.values()} == {torch.float32}
    exact = encoder(images, mask, ask).tokens
    assert (latent.tokens.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
def test_blocks_are_compiled_as_a_whole(encoder: Any):
    """No graph break: `backend="eager"` captures and generates no code."""
    torch.compiler.reset()
    block, (dim, grid) = encoder.repeated_blocks()[1], encoder.spec.layers[1]
    x = torch.randn(2, 17, dim) if isinstance(encoder, SimMIMViT) else torch.randn(2, *grid.shape, dim)
    compiled = torch.compile(block, fullgraph=True, backend="eager")(x)
    eager = block(x)
    if isinstance(encoder, SimMIMViT):
        compiled, eager = compiled[0], eager[0]
    assert torch.allclose(compiled, eager)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (SwinEncoder, {"patch_size": 5}, "image size 64x64 is not a multiple of 20, the stride of the last stage"),
        (SwinEncoder, {"num_heads": (1, 2)}, r"depths \[2, 2, 2\] and num_heads \[1, 2\] need as many stages"),
        (SwinEncoder, {"num_heads": (1, 3, 2)}, "width 16 of stage 1 is not a multiple of 3 heads"),
        (SwinEncoder, {"window_size": 6}, "grid 16x16 of stage 0 is no whole number of windows of 6"),
        (SwinV2Encoder, {"depths": (1,) * 5, "num_heads": (1,) * 5}, "windows of 2 tokens or more.* grid of 1x1"),
        (SimMIMViT, {"patch_size": 5}, "image size 64x64 is not a multiple of patch_size 5"),
        (SimMIMViT, {"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(cls: type[Encoder], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(cls, **options)


def test_images_need_not_be_square(images: Tensor):
    wide = Specs(views={"x": ViewSpec("x", size=(32, 64))})
    for cls in (SwinEncoder, SwinV2Encoder):
        encoder = make(cls, wide)
        assert encoder.spec.grid == Grid((2, 4))
        mask = Mask(torch.tensor([[True, False]] * 2), Grid((1, 2)), equal=True)
        assert encoder(images[:, :, :32], mask).tokens.shape == (2, 8, 32)


def test_stochastic_depth_grows_linearly_over_all_stages():
    blocks = make(SwinEncoder, drop_path_rate=0.5).repeated_blocks()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


# --- initial weights and sizes ---------------------------------------------------------------------------------------


def test_initial_weights_of_swin():
    encoder = make(SwinEncoder, embed_dim=32, absolute_position=True)
    state = encoder.state_dict()
    for name in ("layers.1.blocks.0.attn.qkv.weight", "layers.1.downsample.reduction.weight"):
        assert state[f"swin.{name}"].std().item() == pytest.approx(0.02, rel=0.05)
        assert state[f"swin.{name}"].abs().max() > 0.05  # not cut at 0.02
    for name in ("mask_token", "absolute_pos_embed", "swin.layers.0.blocks.1.attn.relative_position_bias_table"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.35)
    assert state["swin.layers.1.blocks.0.attn.qkv.bias"].abs().max() == 0
    bound = 1 / math.sqrt(3 * 4 * 4)  # PyTorch's default for convolutions
    assert 0.95 * bound < state["swin.patch_embed.proj.weight"].abs().max() <= bound
    assert {norm.eps for norm in encoder.modules() if isinstance(norm, nn.LayerNorm)} == {1e-5}


def test_initial_weights_of_the_vit():
    encoder = make(SimMIMViT, embed_dim=64, depth=4, position="learned")
    state = encoder.state_dict()
    for name in ("blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "cls_token", "mask_token", "pos_embed"):
        assert state[name].abs().max() <= 0.02
        assert state[name].std().item() == pytest.approx(0.0108, rel=0.2)  # of a normal that is cut at one deviation
    for number, block in enumerate(encoder.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert 0.95 * 0.02 < weight.abs().max().item() * math.sqrt(2 * number) <= 0.0200001
        assert block.gamma_1.unique().tolist() == pytest.approx([0.1])
    assert state["rel_pos_bias.relative_position_bias_table"].abs().max() == 0
    assert {norm.eps for norm in encoder.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    ("cls", "size", "options", "wanted"),  # reference: the official modules
    [
        (SwinEncoder, 192, {}, 86_725_304),
        (SwinEncoder, 192, {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "window_size": 12}, 195_159_540),
        (SimMIMViT, 224, {}, 85_666_128),
    ],
    ids=["swin_base", "swin_large", "vit_base"],
)
def test_parameter_counts_are_the_official_ones(cls: Any, size: int, options: dict[str, Any], wanted: int):
    with torch.device("meta"):
        encoder = cls(cls.Config(**options), Specs(views={"x": ViewSpec("x", size=(size, size))}))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == wanted
    stride = encoder.spec.stride[0]
    total = wanted + (encoder.spec.dim + 1) * 3 * stride**2
    assert total in (89_874_104, 199_881_204, 86_256_720)


# --- weight decay and layer decay ------------------------------------------------------------------------------------


@pytest.mark.parametrize("official", [True, False])
def test_timms_own_exemptions_of_bias_tables_do_not_count(official: bool):
    """timm's own exemptions, which name the tables, do not count."""
    found = {}
    for cls, options in ((SwinEncoder, {"absolute_position": True}), (SwinV2Encoder, {}), (SimMIMViT, {})):
        encoder = make(cls, decay_bias_tables=official, **options)
        groups = parameter_groups(encoder.named_parameters(), exempt_names(encoder))
        (exempt,) = (set(group["names"]) for group in groups if not group["decay"])
        found[cls] = {name for name, parameter in encoder.named_parameters() if name in exempt and parameter.ndim > 1}
    attentions = [f"swin.layers.{stage}.blocks.{block}.attn" for stage in range(3) for block in range(2)]
    tables = {
        SwinEncoder: {f"{attention}.relative_position_bias_table" for attention in attentions},
        SwinV2Encoder: {
            f"{attention}.{name}"
            for attention in attentions for name in ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight")
        },
        SimMIMViT: {"rel_pos_bias.relative_position_bias_table"},
    }  # fmt: skip
    always = {
        SwinEncoder: {"mask_token", "absolute_pos_embed"},
        SwinV2Encoder: {"mask_token"},
        SimMIMViT: {"cls_token"},  # its mask token does decay
    }
    assert found == {cls: names | (set() if official else tables[cls]) for cls, names in always.items()}


def test_layers_by_hand():
    """Two stages of 2 and 1 blocks, and a ViT of 2."""
    swin = {
        "mask_token": 0, "swin.patch_embed.norm.bias": 0, "swin.layers.0.blocks.0.mlp.fc1.weight": 1,
        "swin.layers.0.blocks.1.norm2.bias": 2,
        "swin.layers.1.downsample.reduction.weight": 2,  # with the last block of the stage that it ends
        "swin.layers.1.blocks.0.attn.qkv.weight": 3, "swin.norm.weight": 4,
        "absolute_pos_embed": 4,  # the official quirk
    }  # fmt: skip
    for cls in (SwinEncoder, SwinV2Encoder):
        encoder = make(cls, depths=(2, 1), num_heads=(1, 2), absolute_position=True)
        assert swin.keys() <= dict(encoder.named_parameters()).keys()
        assert {name: encoder.layer_of(name) for name in swin} == swin
        assert encoder.num_layers == 5
    vit = {"cls_token": 0, "mask_token": 0, "patch_embed.proj.bias": 0, "blocks.1.gamma_1": 2,
           "rel_pos_bias.relative_position_bias_table": 3, "norm.bias": 3}  # fmt: skip
    encoder = make(SimMIMViT, depth=2)
    assert {name: encoder.layer_of(name) for name in vit} == vit


# --- recipes and the whole model -------------------------------------------------------------------------------------


def recipe_with(encoder: dict[str, Any], **slots: Any) -> Recipe:
    sections = {
        "name": "test",
        "data": {"source": "digits"},
        "views": {"type": "image", "img_size": IMAGE},
        "masker": {"type": "random", "mask_ratio": 0.6, "mask_patch_size": 32, "rounding": "hide_ceil"},
        "encoder": encoder,
        "target": "pixels",
        "decoder": {"type": "linear", "init": "torch"},
        "loss": "l1",
        "optim": {"lr": 1e-3},
        "train": {"total_batch_size": 2, "steps": 1},
    }
    return Recipe.model_validate(sections | slots)


@pytest.mark.parametrize(("cls", "sizes"), KINDS, ids=lambda value: getattr(value, "name", ""))
def test_reconstructions_show_predictions_where_cells_are_hidden(cls: type[Encoder], sizes: dict[str, Any]):
    model = build_model(recipe_with({"type": cls.name, **sizes}), Registry())
    head = model.objective.heads["main"].decoder.head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]).repeat(len(head.bias) // 3))  # (row, column, channel): red
    batch = {"x": torch.full((2, 3, IMAGE, IMAGE), 128, dtype=torch.uint8)}
    step = make_step(model.recipe, torch.arange(2))
    rows = reconstruct(model.objective, model.views, step, batch)
    masks = model.objective.masker(step, model.views.prepare(step, batch)).masks["x"]
    assert masks.num_hidden == 3  # 2.4 of 4, rounded up
    for (image, masked, result), cells in zip(rows, masks.hidden, strict=True):
        hidden = cells.reshape(2, 2).repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(result[:, ~hidden], image[:, ~hidden])
        red = result[:, hidden]
        assert red[0].unique().numel() == 1
        assert red[0, 0] > image[0, 0, 0]
        assert masked.shape == image.shape


PROTOCOLS = {
    "simmim_finetune": 5e-3,
    "simmim_finetune_swin_large": 5e-3,
    "simmim_finetune_vit_base": 5e-3,
    "simmim_linear": 1.6,
}


def test_the_shipped_recipes_are_valid_and_have_the_official_rates():
    registry = Registry()
    peaks = {"simmim": 8e-4, "simmim_swin_base_800e": 4e-4, "simmim_swin_large": 4e-4, "simmim_vit_base": 4e-4}
    names = {info.name for info in registry.recipes() if info.plugin == "simmim"}
    assert names == {*peaks, *PROTOCOLS, "simmim_quickstart", "simmim_vit_quickstart"}
    for name, peak in PROTOCOLS.items():
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(peak)
        assert recipe.objective.type == "classify"
    for name, peak in peaks.items():
        recipe = load_recipe(name, registry=registry)
        curve = recipe.optim.lr_curve(recipe.train.total_batch_size)
        assert curve.start == pytest.approx(peak)
        assert recipe.optim.betas == (0.9, 0.999)
        assert (recipe.optim.lag_steps, recipe.optim.clip_grad_norm) == (1, 5.0)
        if name == "simmim":
            assert curve.warmup_from / curve.start == pytest.approx(1e-6 / 2e-4)
            assert curve.end / curve.start == pytest.approx(1e-5 / 2e-4)
            assert curve.counted_from == "run_start"
        else:
            assert curve.warmup_from / curve.start == pytest.approx(5e-7 / 1e-4)
            assert (curve.shape, curve.milestones, curve.gamma) == ("step", (700,), 0.1)
    for name in ("simmim_quickstart", "simmim_vit_quickstart"):
        load_recipe(name, registry=registry)


def test_the_encoder_section_for_swinv2_in_the_readme_builds():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = yaml.safe_load(re.search(r"```yaml\n(encoder:.*?)```", readme, re.DOTALL)[1])
    assert section["encoder"]["type"] == "simmim_swinv2"
    config = SwinV2Encoder.Config.model_validate({k: v for k, v in section["encoder"].items() if k != "type"})
    with torch.device("meta"):
        spec = SwinV2Encoder(config, Specs(views={"x": ViewSpec("x", size=(192, 192))})).spec
    assert (spec.dim, spec.grid, spec.stride) == (1024, Grid((6, 6)), (32, 32))
    small = {**section["encoder"], **SWIN}
    objective = build_model(recipe_with(small), Registry()).objective
    step = make_step(recipe_with(small), torch.arange(2))
    objective(step, {"x": torch.zeros(2, 3, IMAGE, IMAGE)}).losses["main"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_timms_beit_computes_what_our_vit_computes(images: Tensor):
    """The encoder without masks, whatever its position options."""
    for shared in (True, False):
        encoder = perturbed(make(SimMIMViT, relative_bias="shared" if shared else "per_block")).eval()
        timms = Beit(
            img_size=IMAGE, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=0, init_values=0.1,
            use_abs_pos_emb=False, use_shared_rel_pos_bias=shared, use_rel_pos_bias=not shared, global_pool="token",
        ).eval()  # fmt: skip
        state = {name: tensor for name, tensor in encoder.state_dict().items() if name != "mask_token"}
        timms.load_state_dict(state)
        latent = encoder(images, Mask.none(2, CELLS))
        sequence = torch.cat([latent.prefix, latent.tokens], dim=1)
        assert torch.allclose(sequence, timms.forward_features(images), atol=1e-4)


def test_specs_of_other_slots_fit(mask: Mask):
    """A mask on cells finer than the output grid is refused when the recipe is checked, with both sides named."""
    masker = {"type": "random", "mask_ratio": 0.6, "mask_patch_size": 4}
    with pytest.raises(Exception, match="masker 'random' and encoder 'simmim_swin' do not fit.*hidden in part"):
        build_model(recipe_with({"type": "simmim_swin", **SWIN}, masker=masker), Registry())
    assert replace(mask, equal=False).at(Grid((16, 16))).hidden.sum() == 2 * 3 * 64


def test_what_is_fine_tuned_has_the_size_of_the_published_models():
    """Parameters that train, of models with 1000 classes: those of timm's `swin_base_patch4_window7_224` and
    `beit_base_patch16_224`."""
    for name, count in (("simmim_finetune", 87_768_224), ("simmim_finetune_vit_base", 86_530_984)):
        changes = ["data.source=digits", "data.eval_source=null"]
        with torch.device("meta"):
            objective = build_model(load_recipe(name, changes, Registry()), Registry()).objective
        of_classes = (1000 - 10) * (objective.encoder.spec.dim + 1)
        assert sum(p.numel() for p in objective.parameters() if p.requires_grad) + of_classes == count


@torch.no_grad()
def test_fine_tuning_of_the_vit_begins_where_pre_training_ended(tmp_path: Path, images: Tensor):
    """The table that all blocks shared is in each of them; what follows the last block is new."""
    before = build_model(recipe_with({"type": "simmim_vit", **VIT}), Registry()).objective
    perturbed(before.encoder)
    save_file({name: tensor.contiguous() for name, tensor in before.state_dict().items()}, tmp_path / "run.safetensors")
    sizes = [f"encoder.{key}={value}" for key, value in {**VIT, "drop_path_rate": 0}.items()]
    changes = [f"views.img_size={IMAGE}", "data.source=digits", "data.eval_source=null"]
    recipe = load_recipe("simmim_finetune_vit_base", [*sizes, *changes, f"init={tmp_path}/run.safetensors"], Registry())
    after = build_model(recipe, Registry()).objective
    seen = [
        objective.encoder(images, Mask.none(2, objective.encoder.spec.grid), Ask(layers=frozenset({1}))).layers[1]
        for objective in (before, after)
    ]
    assert torch.equal(*seen)
    decoder = after.heads["main"].decoder
    assert decoder.fc_norm.weight.eq(1).all()
    assert decoder.head.weight.std() < 1e-4
