"""The ViT with mask tokens, by property and against timm's BEiT. Official numbers are in mim-plugin-beit's tests."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.beit import Beit
from torch import Tensor

from mim_framework import Ask, Grid, Mask, Specs, ViewSpec
from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.vit import MaskTokenViT
from mim_framework.contract.specs import TargetSpec
from mim_framework.nn.positions import relative_position_index

GRID = Grid((4, 4))
VIEWS = Specs(views={"x": ViewSpec("x", size=(16, 16))})
KINDS = [
    {"position": "learned"},
    {"position": "sincos", "qkv_bias": "none"},
    {"position": "none", "relative_bias": "shared", "qkv_bias": "qv", "layer_scale": 0.1},
    {"position": "learned", "relative_bias": "per_block", "qkv_bias": "qv", "final_norm": False},
]


def make(**options) -> MaskTokenViT:
    torch.manual_seed(0)
    options = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4} | options
    encoder = MaskTokenViT(MaskTokenViT.Config(**options), VIEWS)
    with torch.no_grad():
        for parameter in encoder.parameters():  # so that nothing is zero or one
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return encoder


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask() -> Mask:
    hidden = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    return Mask(hidden, GRID)


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS)
def test_hidden_pixels_do_not_reach_the_tokens(options: dict, images: Tensor, mask: Mask):
    encoder = make(**options)
    hidden = mask.hidden.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    tokens = encoder(images, mask).tokens
    assert tokens.shape == (2, 16, 32)
    assert torch.equal(tokens, encoder(images.masked_fill(hidden, 99.0), mask).tokens)
    assert not torch.allclose(tokens, encoder(images.masked_fill(~hidden, 99.0), mask).tokens)


@pytest.mark.parametrize("options", KINDS)
def test_every_parameter_gets_a_gradient_even_if_nothing_is_hidden(options: dict, images: Tensor):
    encoder = make(**options)
    encoder(images, Mask.none(2, GRID)).tokens.square().mean().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("bias", ["shared", "per_block"])
def test_it_is_timms_beit(bias: str, images: Tensor):
    ours = make(position="none", relative_bias=bias, qkv_bias="qv", layer_scale=0.1)
    theirs = Beit(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, use_abs_pos_emb=False, init_values=0.1,
        use_shared_rel_pos_bias=bias == "shared", use_rel_pos_bias=bias == "per_block", num_classes=0,
        global_pool="token",
    )  # fmt: skip
    assert theirs.load_state_dict(ours.state_dict(), strict=False).unexpected_keys == ["mask_token"]
    latent = ours(images, Mask.none(2, GRID))
    sequence = torch.cat([latent.prefix, latent.tokens], dim=1)
    assert torch.allclose(sequence, theirs.forward_features(images), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS)
def test_asked_layers_attention_and_projections_belong_together(options: dict, images: Tensor, mask: Mask):
    encoder = make(**options)
    both = frozenset({0, 1})
    latent = encoder(images, mask, Ask(layers=both, attn=both, qkv=both))
    assert torch.equal(latent.tokens, encoder(images, mask).tokens)
    normed = encoder.final_norm(latent.layers[1])
    assert torch.equal(torch.cat([latent.prefix, latent.tokens], dim=1), normed)
    block = encoder.repeated_blocks()[1]
    assert latent.qkv[1].shape == (3, 2, 4, 17, 8)
    attended = block.attn.proj((latent.attn[1] @ latent.qkv[1][2]).transpose(1, 2).flatten(2))
    x = latent.layers[0] + (attended if block.gamma_1 is None else block.gamma_1 * attended)
    expanded = block.mlp(block.norm2(x))
    x = x + (expanded if block.gamma_2 is None else block.gamma_2 * expanded)
    assert torch.allclose(x, latent.layers[1], atol=1e-5)


def test_relative_positions_by_hand():
    index = relative_position_index(Grid((1, 2)))
    assert index.tolist() == [
        [5, 3, 3],
        [4, 1, 0],
        [4, 2, 1],
    ]  # the class token: as query 3, as key 4, both 5


def test_initial_weights_are_truncated_normal_and_rescaled_by_depth_if_a_method_asks():
    torch.manual_seed(0)
    config = MaskTokenViT.Config(patch_size=4, embed_dim=64, depth=2, num_heads=4)
    encoder = MaskTokenViT(config, VIEWS)
    assert encoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    before = encoder.blocks[1].mlp.fc2.weight.clone()
    assert before.std().item() == pytest.approx(0.02, rel=0.05)
    encoder.rescale_by_depth()
    assert torch.allclose(encoder.blocks[1].mlp.fc2.weight, before / math.sqrt(4))
    assert encoder.blocks[0].attn.qkv.bias.abs().max() == 0


def test_autocast_keeps_the_residual_stream_in_full_precision(images: Tensor, mask: Mask):
    encoder = make(position="none", relative_bias="shared", qkv_bias="qv", layer_scale=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        latent = encoder(images, mask, Ask(layers=frozenset({1})))
    assert latent.layers[1].dtype == torch.float32
    assert torch.allclose(latent.tokens.float(), encoder(images, mask).tokens, atol=0.1)
    latent.tokens.float().square().mean().backward()
    assert encoder.rel_pos_bias.relative_position_bias_table.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "image size 16x16 is not a multiple of patch_size 5"),
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_linear_decoder_can_normalise_and_begin_as_pytorch_does(images: Tensor, mask: Mask):
    encoder = make(final_norm=False)
    specs = Specs(encoder=encoder.spec, target=TargetSpec("dense", 5, GRID))
    decoder = LinearDecoder(LinearDecoder.Config(norm=True, init="torch"), specs)
    assert decoder.head.bias.abs().max() > 0
    latent = encoder(images, mask)
    by_hand = decoder.head(torch.nn.functional.layer_norm(latent.tokens, (32,), eps=1e-6))
    assert torch.allclose(decoder(latent, mask).values, by_hand, atol=1e-6)
    plain = LinearDecoder(LinearDecoder.Config(), specs)
    assert plain.head.bias.abs().max() == 0
    assert set(plain.state_dict()) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("options", KINDS)
def test_layers_are_the_embedding_each_block_and_the_rest(options: dict):
    encoder = make(**options)
    first, last = {"patch_embed", "cls_token", "mask_token", "pos_embed"}, {"norm", "rel_pos_bias"}
    assert encoder.num_layers == 4
    for name, _ in encoder.named_parameters():
        top, _, rest = name.partition(".")
        layer = 0 if top in first else 3 if top in last else 1 + int(rest.split(".")[0])
        assert encoder.layer_of(name) == layer, name
