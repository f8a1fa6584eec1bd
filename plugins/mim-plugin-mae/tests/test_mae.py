"""The components of MAE, by hand and by property. Official numbers are in parity/."""

from __future__ import annotations

import math

import pytest
import torch
from mim_plugin_mae import MAEDecoder, MAEEncoder
from mim_plugin_mae.checkpoints import MMPretrainCheckpoint, OfficialCheckpoint, TimmCheckpoint
from mim_plugin_mae.decoder import LastBlock
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from mim_framework import Ask, EncoderSpec, Grid, Latent, Mask, MaskerSpec, Specs, TargetSpec, ViewSpec, gather_tokens
from mim_framework.builtins.losses import CrossEntropyLoss
from mim_framework.nn import Block, attend, mask_from_noise
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

GRID = Grid((4, 4))
VIEWS = Specs(views={"x": ViewSpec("x", size=(16, 16))})


def make_encoder(**options) -> MAEEncoder:
    torch.manual_seed(0)
    options = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4} | options
    return MAEEncoder(MAEEncoder.Config(**options), VIEWS)


def make_decoder(encoder: EncoderSpec, num_hidden: int = 12, target: TargetSpec | None = None, **options) -> MAEDecoder:
    torch.manual_seed(1)
    masker = MaskerSpec(GRID, equal=True, num_hidden=num_hidden)
    specs = VIEWS.also(encoder=encoder, masker=masker, target=target or TargetSpec("dense", 48, GRID))
    return MAEDecoder(MAEDecoder.Config(**({"embed_dim": 16, "depth": 2, "num_heads": 2} | options)), specs)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask() -> Mask:
    return mask_from_noise(torch.rand(2, 16, generator=torch.Generator().manual_seed(3)), num_keep=4, grid=GRID)


# --- encoder ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_patches_are_embedded_as_by_the_convolution_and_selected_exactly(images: Tensor, mask: Mask):
    encoder = make_encoder()
    everywhere = encoder.embed(images, None)
    convolved = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    assert torch.allclose(everywhere, convolved, atol=1e-6)
    assert torch.allclose(encoder.embed(images, mask.ids_keep), gather_tokens(convolved, mask.ids_keep), atol=1e-6)


@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_encoder(images: Tensor, mask: Mask):
    encoder = make_encoder()
    hidden = mask.hidden.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    before, after = encoder(images, mask), encoder(images.masked_fill(hidden, 99.0), mask)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.ids, mask.ids_keep)
    assert not torch.allclose(before.tokens, encoder(images.masked_fill(~hidden, 99.0), mask).tokens)


@torch.no_grad()
def test_the_order_of_visible_patches_does_not_matter(images: Tensor, mask: Mask):
    encoder = make_encoder()
    in_raster_order = Mask(mask.hidden, GRID, equal=True)
    shuffled, sorted_ = encoder(images, mask), encoder(images, in_raster_order)
    order = mask.ids_keep.argsort(dim=1)
    assert torch.allclose(gather_tokens(shuffled.tokens, order), sorted_.tokens, atol=1e-5)


@torch.no_grad()
def test_a_mask_on_coarser_cells_is_refined_to_patches(images: Tensor):
    coarse = Mask(torch.tensor([[True, False, True, True]] * 2), Grid((2, 2)), equal=True)
    latent = make_encoder()(images, coarse)
    assert latent.ids.tolist() == [[2, 3, 6, 7]] * 2


@torch.no_grad()
def test_asked_layers_attention_and_projections_belong_together(images: Tensor, mask: Mask):
    encoder = make_encoder()
    both = frozenset({0, 1})
    latent = encoder(images, mask, Ask(layers=both, attn=both, qkv=both))
    plain = encoder(images, mask)
    assert torch.equal(latent.tokens, plain.tokens)
    assert not plain.layers
    assert not plain.attn
    assert not plain.qkv
    normed = encoder.norm(latent.layers[1])
    assert torch.allclose(torch.cat([latent.prefix, latent.tokens], dim=1), normed, atol=1e-6)

    assert latent.qkv[1].shape == (3, 2, 4, 5, 8)
    q, k, v = latent.qkv[1]
    assert torch.allclose(latent.attn[1], (q @ k.mT / math.sqrt(8)).softmax(-1), atol=1e-6)
    block = encoder.repeated_blocks()[1]
    attended = (latent.attn[1] @ v).transpose(1, 2).flatten(2)
    x = latent.layers[0] + block.attn.proj(attended)
    x = x + block.mlp(block.norm2(x))
    assert torch.allclose(x, latent.layers[1], atol=1e-5)


def test_the_spec_says_what_the_encoder_can_do():
    spec = make_encoder(depth=3).spec
    assert (spec.dim, spec.grid, spec.stride, spec.depth, spec.num_prefix_tokens) == (32, GRID, (4, 4), 3, 1)
    assert spec.visible_only
    assert spec.accepts == {"equal", "none"}
    assert spec.lacks(Ask(layers=frozenset({2}), attn=frozenset({0}), qkv=frozenset({1}))) == ""
    assert spec.lacks(Ask(layers=frozenset({3}))) == "layers [3]"


def test_initial_weights_are_the_official_ones():
    encoder = make_encoder(embed_dim=64, num_heads=4)
    qkv = encoder.repeated_blocks()[0].attn.qkv
    bound = math.sqrt(6 / (64 + 3 * 64))  # Xavier on the fused matrix
    assert 0.98 * bound < qkv.weight.abs().max() <= bound
    assert qkv.bias.abs().max() == 0
    bound = math.sqrt(6 / (64 + 48))  # as a linear layer of 3 * 4 * 4 inputs
    assert 0.98 * bound < encoder.patch_embed.proj.weight.abs().max() <= bound
    assert 0 < encoder.patch_embed.proj.bias.abs().max() <= 1 / math.sqrt(48)  # PyTorch's default for convolutions
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert {norm.eps for norm in encoder.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}


def test_position_tables_are_saved_and_never_trained():
    encoder = make_encoder()
    assert "pos_embed" in encoder.state_dict()
    assert "pos_embed" not in dict(encoder.named_parameters())
    assert encoder.pos_embed[0, 0].abs().max() == 0  # the class token has no position


@pytest.mark.parametrize(
    ("model", "in_total", "in_encoder"),  # reference: the official modules, position tables included
    [
        ({"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16}, 111_907_840, 85_798_656),
        ({"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}, 657_074_508, 630_764_800),
    ],
)
def test_parameter_counts_are_the_published_ones(model: dict, in_total: int, in_encoder: int):
    with torch.device("meta"):
        specs = Specs(views={"x": ViewSpec("x", size=(224, 224))})
        encoder = MAEEncoder(MAEEncoder.Config(**model), specs)
        grid = encoder.spec.grid
        specs = specs.also(encoder=encoder.spec, masker=MaskerSpec(grid, equal=True, num_hidden=1))
        target = TargetSpec("dense", 3 * model["patch_size"] ** 2, grid)
        decoder = MAEDecoder(MAEDecoder.Config(), specs.also(target=target))
    count = lambda module: sum(tensor.numel() for tensor in module.state_dict().values())  # noqa: E731
    assert count(encoder) == in_encoder
    assert count(encoder) + count(decoder) == in_total


def test_stochastic_depth_grows_linearly():
    encoder = make_encoder(depth=3, drop_path_rate=0.2)
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.repeated_blocks()] == pytest.approx(
        [0.0, 0.1, 0.2]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "image size 16x16 is not a multiple of patch_size 5"),
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
        ({"embed_dim": 30, "num_heads": 5}, "multiple of 4, got 30"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_encoder(**options)


def test_a_mask_whose_rows_differ_is_refused(images: Tensor):
    with pytest.raises(ValueError, match="equal=True"):
        make_encoder()(images, Mask(torch.zeros(2, 16, dtype=torch.bool), GRID))


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_the_last_block_gives_the_wanted_tokens_of_the_whole_block_and_their_gradients():
    torch.manual_seed(0)
    decoder = make_decoder(make_encoder().spec, embed_dim=32, num_heads=4)
    last = decoder.repeated_blocks()[-1]
    assert isinstance(last, LastBlock)
    x, ids = torch.randn(2, 17, 32, requires_grad=True), torch.tensor([[3, 16, 1], [5, 2, 9]])
    weights = torch.randn(2, 3, 32)
    gradients = []
    for out in (last(x, ids), gather_tokens(last(x), ids)):
        gradients.append(torch.autograd.grad((out * weights).sum(), [x, *last.parameters()]))
    assert torch.allclose(last(x, ids), gather_tokens(last(x), ids), atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_our_blocks_are_timms():
    torch.manual_seed(0)
    ours = make_encoder().repeated_blocks()[0]
    assert isinstance(ours, Block)
    timms = vision_transformer.Block(
        32, 4, qkv_bias=True, norm_layer=lambda dim, **options: nn.LayerNorm(dim, eps=1e-6, **options)
    )
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.allclose(ours(x)[0], timms(x), atol=1e-6)


def test_attention_in_bfloat16_on_a_cpu_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8).bfloat16().requires_grad_().unbind(0)
    exact = scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.allclose(attend(q, k, v).float(), exact, atol=0.03)
    ours = torch.autograd.grad(attend(q, k, v).float().sum(), [q, k, v], retain_graph=True)
    theirs = torch.autograd.grad(exact.sum(), [q, k, v])
    assert all(torch.allclose(a.float(), b.float(), atol=0.05) for a, b in zip(ours, theirs, strict=True))


# --- decoder ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mask_tokens_stand_where_nothing_was_seen_by_hand():
    decoder = make_decoder(make_encoder().spec)
    decoder.mask_token.fill_(-1.0)
    x = torch.tensor([[[7.0], [1.0], [2.0]]]).expand(1, 3, 16)  # class token, then positions 5 and 0
    sequence = decoder.insert_mask_tokens(x, torch.tensor([[5, 0]]))
    assert sequence[0, :, 0].tolist() == [7.0, 2.0, -1, -1, -1, -1, 1.0, *[-1] * 10]


@torch.no_grad()
def test_predictions_at_hidden_positions_are_those_of_a_prediction_everywhere(images: Tensor, mask: Mask):
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec)
    latent = encoder(images, mask)
    hidden_only = decoder(latent, mask)
    everywhere = decoder(latent, mask.predicting(torch.ones_like(mask.hidden)))
    assert everywhere.ids is None
    assert everywhere.values.shape == (2, 16, 48)
    assert hidden_only.ids is mask.ids_predict
    assert torch.allclose(hidden_only.values, everywhere.at(mask.ids_hidden), atol=1e-5)


def test_every_parameter_gets_a_gradient(images: Tensor, mask: Mask):
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec)
    decoder(encoder(images, mask), mask).values.square().mean().backward()
    without = [name for module in (encoder, decoder) for name, p in module.named_parameters() if p.grad is None]
    assert without == []


def test_with_a_token_at_every_position_there_is_no_mask_token():
    """After an encoder that replaces hidden tokens, and after MAE's own when nothing is hidden."""
    full = EncoderSpec(dim=32, grid=GRID, stride=4, depth=1, num_heads=1)
    decoder = make_decoder(full)
    assert decoder.mask_token is None
    assert "mask_token" not in decoder.state_dict()
    assert decoder.decoder_pos_embed.shape == (1, 16, 16)
    tokens = torch.randn(2, 16, 32)
    mask = Mask(torch.tensor([[True] * 12 + [False] * 4] * 2), GRID, equal=True)
    pred = decoder(Latent(tokens, GRID), mask)
    pred.values.sum().backward()
    assert pred.values.shape == (2, 12, 48)
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert make_decoder(make_encoder().spec, num_hidden=0).mask_token is None


def test_token_ids_can_be_predicted(images: Tensor, mask: Mask):
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec, target=TargetSpec("ids", 10, GRID))
    assert (decoder.spec.kind, decoder.spec.dim) == ("probs", 10)
    latent = encoder(images, mask)
    loss = CrossEntropyLoss(CrossEntropyLoss.Config(), VIEWS)
    with torch.no_grad():
        decoder.decoder_pred.weight.zero_()
    value = loss(decoder(latent, mask), torch.randint(10, (2, 16)), mask, latent).loss
    assert value.item() == pytest.approx(math.log(10))


def test_a_target_on_another_grid_is_refused():
    with pytest.raises(ValueError, match="the target's grid 2x2 is not the encoder's 4x4"):
        make_decoder(make_encoder().spec, target=TargetSpec("dense", 48, Grid((2, 2))))


def test_autocast_keeps_the_residual_stream_in_full_precision(images: Tensor, mask: Mask):
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec)
    with torch.autocast("cpu", torch.bfloat16):
        latent = encoder(images, mask, Ask(layers=frozenset({0, 1})))
        pred = decoder(latent, mask)
    assert {layer.dtype for layer in latent.layers.values()} == {torch.float32}
    exact = decoder(encoder(images, mask), mask)
    assert torch.allclose(pred.values.float(), exact.values, atol=0.05)
    pred.values.float().square().mean().backward()
    assert decoder.mask_token.grad.dtype == torch.float32


# --- checkpoints -----------------------------------------------------------------------------------------------------


def state_of_ours() -> dict[str, Tensor]:
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec)
    return {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()} | {
        f"heads.main.decoder.{name}": tensor for name, tensor in decoder.state_dict().items()
    }


def to_mmpretrain(official: str) -> str:
    """The name of an official tensor in mmpretrain, written down the other way round than the plugin has it."""
    if official in ("mask_token", "decoder_pos_embed") or official.startswith(("decoder_embed.", "decoder_pred.")):
        return f"neck.{official}"
    part = "neck" if official.startswith("decoder_") else "backbone"
    name = official.replace("patch_embed.proj", "patch_embed.projection")
    name = name if part == "neck" else name.replace("blocks.", "layers.", 1)
    for ours, theirs in (
        ("decoder_norm.", "ln1."), ("norm1.", "ln1."), ("norm2.", "ln2."),
        ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return f"{part}.{'ln1.' + name.removeprefix('norm.') if name.startswith('norm.') else name}"


def test_mmpretrain_checkpoints_are_read():
    ours = state_of_ours()
    official = OfficialCheckpoint().export_state(ours)
    theirs = {to_mmpretrain(name): tensor for name, tensor in official.items()}
    assert {
        "backbone.layers.1.ffn.layers.0.0.weight",
        "neck.decoder_blocks.0.ln1.bias",
        "neck.ln1.weight",
    } <= theirs.keys()
    layout = MMPretrainCheckpoint()
    assert layout.recognises(theirs)
    assert not OfficialCheckpoint().recognises(theirs)
    imported = layout.import_state(theirs)
    assert imported.keys() == ours.keys()
    assert all(imported[name] is tensor for name, tensor in ours.items())
    assert layout.to_recipe(theirs) == OfficialCheckpoint().to_recipe(official)
    with pytest.raises(ValueError, match="it can be read only"):
        layout.export_state(ours)


def test_layouts_recognise_their_own_and_no_beit_or_mff():
    official = OfficialCheckpoint().export_state(state_of_ours())
    theirs = {to_mmpretrain(name): tensor for name, tensor in official.items()}
    assert OfficialCheckpoint().recognises(official)
    assert not MMPretrainCheckpoint().recognises(official)
    assert not TimmCheckpoint().recognises(official)
    assert not OfficialCheckpoint().recognises(official | {"blocks.0.gamma_1": torch.ones(32)})
    assert not MMPretrainCheckpoint().recognises(theirs | {"backbone.proj_weights": torch.ones(4)})
    assert not OfficialCheckpoint().recognises({})


def test_the_number_of_heads_is_known_for_published_widths_only():
    state = OfficialCheckpoint().export_state(state_of_ours())
    assert OfficialCheckpoint().to_recipe(state)["encoder"]["num_heads"] is None
    state |= {"cls_token": torch.zeros(1, 1, 768), "blocks.0.mlp.fc1.weight": torch.zeros(3072, 768)}
    options = OfficialCheckpoint().to_recipe(state)["encoder"]
    assert (options["num_heads"].value, options["mlp_ratio"], options["depth"]) == (12, 4.0, 2)


def test_export_with_another_decoder_holds_the_encoder_alone():
    state = state_of_ours()
    foreign = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    foreign |= {"heads.main.decoder.head.weight": torch.zeros(1)}
    exported = OfficialCheckpoint().export_state(foreign)
    assert exported.keys() == TimmCheckpoint().export_state(state).keys()
    assert "blocks.0.attn.qkv.weight" in exported


# --- recipes ---------------------------------------------------------------------------------------------------------


RATES_OF_PROTOCOLS = {
    "mae_linear": 6.4,
    "mae_finetune": 2e-3,
    "mae_finetune_vit_large": 4e-3,
    "mae_partial": 4e-3,
    "mae_low_shot": 2e-3,
    "mae_finetune_quickstart": 2e-3,
    "mae_linear_quickstart": 6.4,
}


def test_the_shipped_recipes_are_valid_and_have_the_official_rate():
    registry = Registry()
    names = {info.name for info in registry.recipes() if info.plugin == "mae"}
    assert names == {"quickstart", "mae", "mae_vit_large", "mae_vit_huge", *RATES_OF_PROTOCOLS}
    for name in names - {"quickstart", *RATES_OF_PROTOCOLS}:
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(2.4e-3)
        assert recipe.optim.betas == (0.9, 0.95)
        assert recipe.target.options["norm_pix_loss"] is True
    for name, rate in RATES_OF_PROTOCOLS.items():
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(rate)
        assert recipe.objective.type == "classify"
    load_recipe("quickstart", registry=registry)


def test_position_of_the_final_norm_for_fine_tuning(images: Tensor):
    """The last layer is handed out before the final norm, which fine-tuning with average pooling replaces."""
    encoder = make_encoder()
    latent = encoder(images, Mask.none(2, GRID), Ask(layers=frozenset({1})))
    normed = layer_norm(latent.layers[1], (32,), encoder.norm.weight, encoder.norm.bias, eps=1e-6)
    assert torch.allclose(normed[:, 1:], latent.tokens, atol=1e-6)
    assert latent.ids is None
