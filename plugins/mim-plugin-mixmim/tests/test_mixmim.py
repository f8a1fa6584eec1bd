"""The components of MixMIM, by hand and by property. Official numbers are in parity/."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mim_plugin_mixmim import MixDecoder, MixEncoder, MixMasker, load_encoder
from mim_plugin_mixmim.blocks import Attention, Block, Stage, merge_places, relative_position_bias
from mim_plugin_mixmim.checkpoints import (
    MMPretrainCheckpoint,
    OfficialCheckpoint,
    SafetensorsCheckpoint,
    index_of_window,
)
from mim_plugin_mixmim.decoder import JoiningBlock
from mim_plugin_mixmim.masker import partner_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mim_framework import Ask, EncoderSpec, Grid, Latent, Mask, Masked, MaskerSpec, Specs, Step, TargetSpec, ViewSpec
from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.base.errors import CheckpointError, RecipeError
from mim_framework.contract.world import World
from mim_framework.convert import import_checkpoint
from mim_framework.data.order import BatchLayout
from mim_framework.evaluate.reconstruct import reconstruct
from mim_framework.layouts import unfold_to_places
from mim_framework.nn import hide_smallest
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.testing import run_ranks

GRID = Grid((4, 4))
"""32 pixels in patches of 4, merged once: cells of 8 pixels."""
VIEWS = Specs(views={"x": ViewSpec("x", size=(32, 32))})
TINY = {"patch_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": (4, 4)}


def make_encoder(**options) -> MixEncoder:
    torch.manual_seed(0)
    encoder = MixEncoder(MixEncoder.Config(**TINY | options), VIEWS)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias_table"):
                parameter.normal_()
    return encoder


def make_masker(**options) -> MixMasker:
    encoder = EncoderSpec(dim=32, grid=GRID, stride=8, depth=1, num_heads=1)
    return MixMasker(MixMasker.Config(**options), VIEWS.also(encoder=encoder))


def make_decoder(encoder: EncoderSpec, target: TargetSpec | None = None, **options) -> MixDecoder:
    torch.manual_seed(1)
    masker = MaskerSpec(GRID, equal=True, num_hidden=8, mixes=True)
    specs = VIEWS.also(encoder=encoder, masker=masker, target=target or TargetSpec("dense", 192, GRID))
    return MixDecoder(MixDecoder.Config(**({"embed_dim": 16, "depth": 2, "num_heads": 2} | options)), specs)


def make_step_at(positions: Tensor | range, index: int = 0) -> Step:
    positions = torch.as_tensor(list(positions)) if isinstance(positions, range) else positions
    return Step(index, 10, 0.0, 1.0, positions, seed=0, world=World())


def images_at(positions: Tensor | range) -> Tensor:
    """The image at a position is always the same."""
    drawn = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(p))) for p in positions]
    return torch.stack(drawn)


def mask_images(masker: MixMasker, positions: range, index: int = 0) -> Masked:
    return masker(make_step_at(positions, index), {"x": images_at(positions)})


def pixels_of(hidden: Tensor) -> Tensor:
    """hidden (B, 16) -> (B, 1, 32, 32)."""
    return hidden.reshape(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


# --- masker ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "partners"),
    [
        ([4, 5, 6, 7], [1, 0, 3, 2]),
        ([5, 6, 7], [0, 2, 1]),  # 4 is in another batch
        ([2, 3, 4], [1, 0, 2]),
        ([1, 2], [0, 1]),
        ([3], [0]),
    ],
)
def test_positions_2k_and_2k_plus_1_are_partners(positions: list[int], partners: list[int]):
    assert partner_rows(torch.tensor(positions)).tolist() == partners


def test_the_smallest_numbers_are_hidden():
    hidden = hide_smallest(torch.tensor([[0.9, 0.1, 0.7, 0.3], [0.2, 0.3, 0.4, 0.5]]), 2)
    assert hidden.tolist() == [[False, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_each_row_shows_its_own_image_and_its_partners_where_it_hides(scope: str):
    masked = mask_images(make_masker(scope=scope), range(6))
    mask, images = masked.masks["x"], images_at(range(6))
    mask.validate()
    assert (mask.num_hidden, mask.grid, mask.shared) == (8, GRID, scope == "batch")
    hidden = pixels_of(mask.hidden).expand_as(images)
    for row, partner in ((0, 1), (3, 2)):
        mixed = masked.views["x"][row]
        assert torch.equal(mixed[~hidden[row]], images[row][~hidden[row]])
        assert torch.equal(mixed[hidden[row]], images[partner][hidden[row]])
    assert torch.equal(masked.clean("x"), images)
    assert bool(mask.predict.all())
    assert mask.ids_predict is None


def test_a_mask_is_drawn_for_the_step_or_for_the_pair():
    of_step = mask_images(make_masker(), range(8)).masks["x"].hidden
    assert bool((of_step == of_step[0]).all())
    later = mask_images(make_masker(), range(8, 16), index=1).masks["x"].hidden
    assert not torch.equal(of_step[0], later[0])

    of_pairs = mask_images(make_masker(scope="pair"), range(8)).masks["x"].hidden
    assert torch.equal(of_pairs[0::2], of_pairs[1::2])
    assert len({tuple(row) for row in of_pairs[0::2].tolist()}) == 4
    noise = make_step_at(range(8)).rand("mask", 16)
    assert torch.equal(of_pairs[0::2], hide_smallest(noise[0::2], 8))


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_accumulation_and_ranks_do_not_change_what_is_mixed(scope: str):
    """16 images of step 3 at once, in micro-batches of 2, 4 and 8, and on two ranks."""
    total, index = 16, 3
    masker = make_masker(scope=scope)

    def rows(batch_size: int, rank: int = 0, world_size: int = 1) -> dict[int, tuple[Tensor, Tensor, int]]:
        layout = BatchLayout(total, batch_size, rank, world_size)
        found = {}
        for micro in range(layout.accum_steps):
            positions = layout.positions(index, micro)
            masked = mask_images(masker, positions, index)
            mask = masked.masks["x"]
            for row, position in enumerate(positions):
                found[position] = masked.views["x"][row], mask.hidden[row], positions[mask.partner[row]]
        return found

    whole = rows(total)
    assert sorted(whole) == list(range(48, 64))
    assert all(partner == position ^ 1 for position, (_, _, partner) in whole.items())
    on_ranks = run_ranks(lambda rank: rows(4, rank, 2))
    assert on_ranks[0].keys().isdisjoint(on_ranks[1])
    for parts in (rows(2), rows(4), rows(8), on_ranks[0] | on_ranks[1]):
        assert parts.keys() == whole.keys()
        for position, (mixed, hidden, partner) in parts.items():
            assert torch.equal(mixed, whole[position][0])
            assert torch.equal(hidden, whole[position][1])
            assert partner == whole[position][2]


def test_an_odd_batch_is_refused_in_training_and_mixed_with_itself_in_evaluation():
    masker = make_masker()
    with pytest.raises(RecipeError, match=r"micro-batch of 3 leaves one alone; use an even train.batch_size"):
        mask_images(masker, range(3))
    masked = mask_images(masker.eval(), range(3))
    masked.masks["x"].validate()
    assert masked.masks["x"].partner.tolist() == [1, 0, 2]
    assert torch.equal(masked.views["x"][2], images_at(range(3))[2])


def test_cells_may_be_larger_than_tokens():
    masker = make_masker(mask_patch_size=16, mask_ratio=0.3)
    assert (masker.spec.grid, masker.num_hidden) == (Grid((2, 2)), 1)
    masked = mask_images(masker, range(2))
    mask = masked.masks["x"]
    differs = (masked.views["x"] != masked.clean("x")).any(1)
    assert torch.equal(differs, mask.at(Grid((32, 32))).hidden.reshape(2, 32, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_patch_size": 12}, "image size 32x32 is not a multiple of mask_patch_size 12"),
        ({"mask_ratio": 0.05}, "mask_ratio 0.05 hides none of the 16 cells of 8 pixels"),
    ],
)
def test_masks_that_cannot_be_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_masker(**options)


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
def test_biases_and_their_gradient_are_those_of_an_index(window: int):
    table = torch.randn((2 * window - 1) ** 2, 3, requires_grad=True)
    index = index_of_window(window)
    by_index = table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)
    ours = relative_position_bias(table, window)
    assert torch.equal(ours, by_index)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((bias * weights).sum(), table)[0] for bias in (ours, by_index)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_the_index_by_hand():
    """A window of 2: the query at the top left sees the key at the bottom right at offset (-1, -1), row 0."""
    assert index_of_window(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_windows_are_cut_and_put_together_by_hand():
    stage = Stage(4, Grid((2, 4)), 1, 2, 4.0, [0.0], downsample=False)
    tokens = torch.arange(8.0).reshape(1, 8, 1)
    windows = stage.to_windows(tokens)
    assert windows[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert torch.equal(stage.from_windows(windows), tokens)


def test_tokens_of_two_images_are_kept_apart_by_hand():
    stage = Stage(4, Grid((2, 4)), 1, 2, 4.0, [0.0], downsample=False)
    mask = Mask(torch.tensor([[True, False]] * 2), Grid((1, 2)), equal=True, shared=True)
    assert not stage.apart(mask).any()  # each window lies in one cell
    fine = Mask(torch.tensor([[True, False, False, False, False, False, False, False]] * 2), Grid((2, 4)), shared=True)
    apart = stage.apart(fine)
    assert apart.shape == (1, 2, 1, 4, 4)
    assert apart[0, 0, 0].int().tolist() == [[0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert not apart[0, 1].any()


def test_places_are_merged_column_by_column():
    """Swin's order: top left, bottom left, top right, bottom right."""
    tokens = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7]).reshape(1, 8, 1)
    assert merge_places(tokens, Grid((2, 4)))[0].tolist() == [[0, 4, 1, 5], [2, 6, 3, 7]]


@torch.no_grad()
def test_attention_is_a_softmax_over_the_tokens_of_a_window():
    torch.manual_seed(0)
    attention = Attention(8, 2, window=2)
    x, apart = torch.randn(1, 3, 4, 8), torch.rand(1, 3, 1, 4, 4) < 0.4
    apart = (apart | apart.mT) & ~torch.eye(4, dtype=torch.bool)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 4)).unbind(3)
    bias = relative_position_bias(attention.relative_position_bias_table, 2)
    logits = torch.einsum("bwihd,bwjhd->bwhij", q, k) / math.sqrt(4) + bias
    weights = logits.masked_fill(apart, -torch.inf).softmax(-1)
    assert torch.allclose(attention(x, apart), torch.einsum("bwhij,bwjhd->bwihd", weights, v).flatten(-2), atol=1e-6)


def test_the_joining_block_gives_of_two_branches_what_whole_blocks_give():
    torch.manual_seed(0)
    joining = JoiningBlock(8, 2, 4.0)
    plain = Block(8, 2, 4.0)
    plain.load_state_dict(joining.state_dict())
    x, hidden = torch.randn(4, 1, 6, 8), torch.rand(2, 1, 6, 1) < 0.5
    shown, riding = plain(x).chunk(2)
    assert torch.allclose(joining(x, hidden), torch.where(hidden, shown, riding), atol=1e-6)


# --- encoder ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_an_image_never_reaches_the_tokens_of_its_partner(scope: str):
    """Every second image is replaced: in no layer do the tokens of the others change, wherever they lie."""
    encoder, masker = make_encoder(), make_masker(scope=scope)
    images = images_at(range(4))
    latents = []
    for second in (images[1::2], torch.full_like(images[1::2], 9.0)):
        images = images.clone()
        images[1::2] = second
        masked = masker(make_step_at(range(4)), {"x": images})
        latents.append(encoder(masked.views["x"], masked.masks["x"], Ask(layers=frozenset(range(3)))))
    of_first = masked.masks["x"].hidden.clone()
    of_first[0::2] = ~of_first[0::2]  # in its own row what is visible, in its partner's what is hidden
    fine = Mask(of_first, GRID).at(Grid((8, 8))).hidden
    pairs = [(latents[0].tokens, latents[1].tokens, of_first)]
    pairs += [(latents[0].layers[0], latents[1].layers[0], fine)]
    pairs += [(latents[0].layers[i], latents[1].layers[i], of_first) for i in (1, 2)]
    for before, after, own in pairs:
        assert torch.equal(before[own], after[own])
        assert not torch.isclose(before[~own], after[~own]).all(-1).any()


@torch.no_grad()
def test_an_image_mixed_with_itself_is_exact():
    """Alone in an evaluation: what stands at hidden cells does not reach the visible ones, nor the other way round."""
    encoder, masker = make_encoder().eval(), make_masker().eval()
    image = images_at(range(1))
    masked = masker(make_step_at(range(1)), {"x": image})
    mask = masked.masks["x"]
    before = encoder(masked.views["x"], mask).tokens
    for part in (mask.hidden, ~mask.hidden):
        after = encoder(image.masked_fill(pixels_of(part), 9.0), mask).tokens
        assert torch.equal(before[~part], after[~part])
        assert not torch.isclose(before[part], after[part]).all(-1).any()


@torch.no_grad()
def test_partners_need_not_stand_side_by_side():
    """The official pairing, i with B - 1 - i, gives the same tokens to the same mixtures."""
    encoder = make_encoder()
    masked = mask_images(make_masker(), range(4))
    mask, order = masked.masks["x"], torch.tensor([0, 2, 3, 1])  # pairs (0, 1), (2, 3) become (0, 3), (1, 2)
    moved = replace(mask, partner=torch.tensor([3, 2, 1, 0]))
    moved.validate()
    tokens = encoder(masked.views["x"][order], moved).tokens
    assert torch.allclose(tokens, encoder(masked.views["x"], mask).tokens[order], atol=1e-6)


@torch.no_grad()
def test_a_shared_mask_and_the_same_mask_in_every_row_give_the_same_tokens():
    encoder = make_encoder()
    masked = mask_images(make_masker(), range(4))
    mask = masked.masks["x"]
    assert torch.allclose(
        encoder(masked.views["x"], mask).tokens,
        encoder(masked.views["x"], replace(mask, shared=False)).tokens,
        atol=1e-6,
    )


@torch.no_grad()
def test_without_a_mask_it_is_a_plain_encoder():
    encoder, images = make_encoder(), images_at(range(2))
    latent = encoder(images, Mask.none(2, GRID))
    nobody_apart = Mask(torch.zeros(2, 16, dtype=torch.bool), GRID, partner=torch.tensor([1, 0]))
    assert torch.allclose(latent.tokens, encoder(images, nobody_apart).tokens, atol=1e-6)
    assert latent.ids is None
    assert latent.prefix is None


@torch.no_grad()
def test_asked_layers_are_those_before_the_merging_and_the_final_norm():
    encoder, images = make_encoder(), images_at(range(2))
    latent = encoder(images, Mask.none(2, GRID), Ask(layers=frozenset({0, 2})))
    assert latent.layers.keys() == {0, 2}
    for number, layer in latent.layers.items():
        dim, grid = encoder.spec.layers[number]
        assert layer.shape == (2, grid.num_patches, dim)
    assert torch.equal(encoder.final_norm(latent.layers[2]), latent.tokens)
    first, second = encoder.layers
    x = first.downsample(second.to_windows(merge_places(latent.layers[0], Grid((8, 8)))))
    for block in second.blocks:
        x = block(x)
    assert torch.allclose(second.from_windows(x), latent.layers[2], atol=1e-6)


def test_the_spec_says_what_the_encoder_can_do():
    spec = make_encoder().spec
    assert (spec.dim, spec.grid, spec.stride, spec.depth, spec.num_prefix_tokens) == (32, GRID, (8, 8), 3, 0)
    assert spec.layers == {0: (16, Grid((8, 8))), 1: (32, GRID), 2: (32, GRID)}
    assert spec.accepts == {"mixed", "none"}
    assert not spec.visible_only
    assert spec.lacks(Ask(layers=frozenset({3}), attn=frozenset({0}))) == "layers [3], attn [0]"


def test_initial_weights_are_the_official_ones():
    torch.manual_seed(0)
    encoder = MixEncoder(MixEncoder.Config(**TINY | {"embed_dim": 64}), VIEWS)
    block, merging = encoder.repeated_blocks()[0], encoder.layers[0].downsample
    bound = math.sqrt(6 / (64 + 3 * 64))  # Xavier on the fused matrix
    assert 0.98 * bound < block.attn.qkv.weight.abs().max() <= bound
    assert block.attn.qkv.bias.abs().max() == 0
    assert merging.reduction.weight.abs().max() <= math.sqrt(6 / (256 + 128))
    default = 1 / math.sqrt(3 * 4 * 4)  # PyTorch's for a convolution of 48 inputs
    assert 0.98 * default < encoder.patch_embed.proj.weight.abs().max() <= default
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.2)
    assert {norm.eps for norm in encoder.modules() if isinstance(norm, nn.LayerNorm)} == {1e-5}


def test_position_tables_are_saved_and_never_trained():
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec)
    for module, table in ((encoder, "absolute_pos_embed"), (decoder, "decoder_pos_embed")):
        assert table in module.state_dict()
        assert table not in dict(module.named_parameters())


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "in_total", "in_encoder"),  # reference: the official modules, position tables included
    [
        (128, (4, 8, 16, 32), 114_665_784, 87_319_352),
        (192, (6, 12, 24, 48), 223_468_244, 195_859_668),
        (352, (11, 22, 44, 88), 684_709_594, 656_445_658),
    ],
)
def test_parameter_counts_are_the_published_ones(embed_dim: int, num_heads: tuple, in_total: int, in_encoder: int):
    with torch.device("meta"):
        specs = Specs(views={"x": ViewSpec("x", size=(224, 224))})
        encoder = MixEncoder(MixEncoder.Config(embed_dim=embed_dim, num_heads=num_heads), specs)
        assert encoder.spec.grid == Grid((7, 7))
        target = TargetSpec("dense", 3072, encoder.spec.grid)
        decoder = MixDecoder(MixDecoder.Config(), specs.also(encoder=encoder.spec, target=target))
    count = lambda module: sum(tensor.numel() for tensor in module.state_dict().values())  # noqa: E731
    assert count(encoder) == in_encoder
    assert count(encoder) + count(decoder) == in_total


def test_stochastic_depth_grows_linearly_over_all_stages():
    encoder = make_encoder(drop_path_rate=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.repeated_blocks()]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_a_window_larger_than_the_grid_is_the_grid():
    assert [stage.window for stage in make_encoder(window_size=(8, 14)).layers] == [8, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (2,)}, r"depths \[1, 2\] and num_heads \[2\] need as many stages"),
        ({"window_size": (4, 4, 4)}, r"depths \[1, 2\] and window_size \[4, 4, 4\] need as many stages"),
        ({"patch_size": 5}, "image size 32x32 is not a multiple of 10, the stride of the last stage"),
        ({"num_heads": (2, 5)}, "width 32 of stage 1 is not a multiple of 5 heads"),
        ({"window_size": (3, 4)}, "window_size 3 of stage 0 does not divide its grid of 8x8 tokens; use one that does"),
        ({"embed_dim": 18}, "multiple of 4, got 18"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_encoder(**options)


def test_a_mask_without_partners_is_refused():
    mask = Mask(torch.tensor([[True] * 8 + [False] * 8] * 2), GRID, equal=True)
    with pytest.raises(ValueError, match="takes mixed images only, this mask has no partners"):
        make_encoder()(images_at(range(2)), mask)


# --- decoder ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_predictions_are_those_of_the_official_order_of_steps():
    """Both branches of every row at every position, un-mixed at the end, as in models_mixmim.py."""
    decoder = make_decoder(make_encoder().spec)
    mask = mask_images(make_masker(), range(4)).masks["x"]
    tokens, hidden = torch.randn(4, 16, 32), mask.hidden[..., None]
    x = decoder.decoder_embed(tokens)
    x = torch.cat([torch.where(hidden, decoder.mask_token, x), torch.where(hidden, x, decoder.mask_token)])
    x = x + decoder.decoder_pos_embed
    for block in decoder.decoder_blocks:
        plain = Block(16, 2, 4.0)
        plain.load_state_dict(block.state_dict())
        x = plain(x[:, None])[:, 0]
    own, others = decoder.decoder_pred(decoder.decoder_norm(x)).chunk(2)
    pred = decoder(Latent(tokens, GRID), mask)
    assert pred.ids is None
    assert torch.allclose(pred.values, torch.where(hidden, own, others[mask.partner]), atol=1e-5)


@torch.no_grad()
def test_no_position_is_predicted_from_itself():
    """An image's hidden half is predicted from its visible half alone and the other way round, whatever the partner."""
    encoder, masker = make_encoder(), make_masker(scope="pair")
    decoder = make_decoder(encoder.spec)
    images = images_at(range(4))
    hidden = masker(make_step_at(range(4)), {"x": images}).masks["x"].hidden

    def predict(images: Tensor) -> Tensor:
        masked = masker(make_step_at(range(4)), {"x": images})
        return decoder(encoder(masked.views["x"], masked.masks["x"]), masked.masks["x"]).values

    before = predict(images)
    for part in (hidden, ~hidden):
        changed = images.clone()
        changed[0] = changed[0].masked_fill(pixels_of(part)[0], 9.0)
        changed[1] = 5.0
        after = predict(changed)
        assert torch.equal(after[0][part[0]], before[0][part[0]])
        assert not torch.isclose(after[0][~part[0]], before[0][~part[0]]).all(-1).any()
        assert torch.equal(after[2:], before[2:])


def test_every_parameter_gets_a_gradient():
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec)
    masked = mask_images(make_masker(), range(2))
    latent = encoder(masked.views["x"], masked.masks["x"])
    decoder(latent, masked.masks["x"]).values.square().mean().backward()
    without = [name for module in (encoder, decoder) for name, p in module.named_parameters() if p.grad is None]
    assert without == []
    assert decoder.mask_token.grad.abs().max() > 0


def test_token_ids_can_be_predicted():
    decoder = make_decoder(make_encoder().spec, target=TargetSpec("ids", 10, GRID))
    assert (decoder.spec.kind, decoder.spec.dim) == ("probs", 10)


@pytest.mark.parametrize(
    ("encoder", "target", "options", "message"),
    [
        ({}, TargetSpec("dense", 48, Grid((2, 2))), {}, "the target's grid 2x2 is not the encoder's 4x4"),
        ({"visible_only": True}, None, {}, "needs an encoder with a token at every position"),
        ({}, None, {"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
    ],
)
def test_decoders_that_do_not_fit_are_refused(encoder: dict, target: TargetSpec, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_decoder(EncoderSpec(dim=32, grid=GRID, stride=8, depth=1, num_heads=1, **encoder), target, **options)


def test_autocast_keeps_the_residual_stream_in_full_precision():
    encoder = make_encoder()
    decoder = make_decoder(encoder.spec)
    masked = mask_images(make_masker(), range(2))
    view, mask = masked.views["x"], masked.masks["x"]
    with torch.autocast("cpu", torch.bfloat16):
        latent = encoder(view, mask, Ask(layers=frozenset({0, 1, 2})))
        pred = decoder(latent, mask)
    assert {layer.dtype for layer in latent.layers.values()} == {torch.float32}
    exact = decoder(encoder(view, mask), mask)
    assert torch.allclose(pred.values.float(), exact.values, atol=0.05)
    pred.values.float().square().mean().backward()
    assert decoder.mask_token.grad.dtype == torch.float32


# --- the whole step --------------------------------------------------------------------------------------------------

SLOTS = {
    "name": "tiny",
    "data": {"source": {"type": "digits"}, "workers": 0},
    "views": {"type": "image", "img_size": 32},
    "masker": {"type": "mixmim"},
    "encoder": {"type": "mixmim_swin", **{name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items()}},
    "target": {"type": "pixels"},
    "decoder": {"type": "mixmim_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2},
    "loss": "mse",
    "optim": {"lr": 1e-3},
    "train": {"total_batch_size": 4, "steps": 1, "device": "cpu", "precision": "float32"},
    "evaluate": [],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes) -> Path:
        file = tmp_path / "recipe_in.yaml"
        file.write_text(json.dumps(SLOTS | changes))
        return file

    return write


@torch.no_grad()
def test_the_loss_is_the_mean_over_every_position_of_every_image(recipe: Callable[..., Path]):
    model = build_model(load_recipe(recipe(), [], Registry()), Registry())
    objective, step, images = model.objective, make_step_at(range(4)), images_at(range(4))
    loss = objective(step, {"x": images}).losses["main"]
    masked = objective.masker(step, {"x": images})
    head = objective.heads["main"]
    pred = head.decoder(objective.encoder(masked.views["x"], masked.masks["x"]), masked.masks["x"]).values
    cells = images.reshape(4, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(4, 16, 192)
    assert loss.item() == pytest.approx((pred - cells).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_are_drawn_of_any_number_of_images(recipe: Callable[..., Path], count: int):
    model = build_model(load_recipe(recipe(), [], Registry()), Registry())
    batch = {"x": model.views.example(count)["x"]}
    rows = reconstruct(model.objective, model.views, make_step(model.recipe, torch.arange(count)), batch)
    assert len(rows) == count
    image, masked, picture = rows[-1]
    assert picture.shape == image.shape == (3, 32, 32)
    assert (masked == 0.5).all(0).sum() >= 8 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"masker": {"type": "random"}},
            "masker 'random' and encoder 'mixmim_swin' do not fit: the encoder takes mixed images only",
        ),
        ({"decoder": "linear"}, "masker 'mixmim' mixes images, decoder 'linear' cannot tell mixed images apart"),
        (
            {"masker": {"type": "mixmim", "mask_patch_size": 4}},
            "mask grid 8x8, token grid 4x4; a token of 8 pixels cannot be hidden in part",
        ),
        (
            {"masker": {"type": "none"}},
            "masker 'none' mixes no images, decoder 'mixmim_decoder' predicts from mixed images only",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_the_recipe_is_checked(
    recipe: Callable[..., Path], changes: dict, message: str
):
    with pytest.raises(RecipeError, match=message):
        build_model(load_recipe(recipe(**changes), [], Registry()), Registry())


# --- checkpoints -----------------------------------------------------------------------------------------------------


def state_of_ours(**options) -> dict[str, Tensor]:
    encoder = make_encoder(**options)
    decoder = make_decoder(encoder.spec)
    return {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()} | {
        f"heads.main.decoder.{name}": tensor for name, tensor in decoder.state_dict().items()
    }


def to_mmpretrain(official: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The name and the value of an official tensor in mmpretrain, written down the other way round than the plugin."""
    if official in ("mask_token", "decoder_pos_embed") or official.startswith(("decoder_embed.", "decoder_pred.")):
        return f"neck.{official}", tensor
    if official.startswith("decoder_norm."):
        return f"neck.ln1.{official.removeprefix('decoder_norm.')}", tensor
    part = "neck" if official.startswith("decoder_") else "backbone"
    name = official.replace("patch_embed.proj", "patch_embed.projection")
    if "blocks." in name:
        for ours, theirs in (
            ("norm1.", "ln1."), ("norm2.", "ln2."), ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
    if "downsample" in name:
        places = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]  # in raster order, then after the channels
        tensor = places.transpose(-1, -2).flatten(-2)
    return f"{part}.{name}", tensor


def test_the_places_of_a_merged_cell_by_hand():
    """Two channels a and b: mmpretrain has a at its four places in raster order, then b."""
    theirs = torch.tensor([[0, 1, 2, 3, 10, 11, 12, 13]])
    assert unfold_to_places(theirs).tolist() == [[0, 10, 2, 12, 1, 11, 3, 13]]


def test_mmpretrain_checkpoints_are_read():
    ours = state_of_ours()
    official = OfficialCheckpoint().export_state(ours)
    theirs = dict(to_mmpretrain(name, tensor) for name, tensor in official.items())
    assert {
        "backbone.layers.1.blocks.0.ffn.layers.0.0.weight",
        "backbone.norm.weight",
        "neck.decoder_blocks.0.ln1.bias",
        "neck.ln1.weight",
    } <= theirs.keys()
    layout = MMPretrainCheckpoint()
    imported = layout.import_state(theirs)
    assert imported.keys() == ours.keys()
    assert all(torch.equal(imported[name], tensor) for name, tensor in ours.items())
    slots = OfficialCheckpoint().to_recipe(official)
    slots["decoder"]["norm_eps"] = 1e-6
    assert layout.to_recipe(theirs) == slots
    with pytest.raises(ValueError, match="it can be read only"):
        layout.export_state(ours)


def test_of_all_installed_layouts_only_the_right_one_recognises_a_file():
    official = OfficialCheckpoint().export_state(state_of_ours())
    theirs = dict(to_mmpretrain(name, tensor) for name, tensor in official.items())
    layouts = {name: cls() for name, cls in Registry().classes("checkpoint_format").items()}
    for state, wanted in ((official, "mixmim_official"), (theirs, "mixmim_mmpretrain")):
        assert [name for name, layout in layouts.items() if layout.recognises(state)] == [wanted]
    shifted = official | {"layers.0.blocks.1.attn_mask": torch.zeros(1)}
    assert not OfficialCheckpoint().recognises(shifted)
    assert not OfficialCheckpoint().recognises({})


def test_all_options_of_the_encoder_are_read_from_the_shapes():
    state = OfficialCheckpoint().export_state(state_of_ours(mlp_ratio=2.0))
    slots = OfficialCheckpoint().to_recipe(state)
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
    assert slots["encoder"] == {"type": "mixmim_swin", **options, "mlp_ratio": 2.0}
    assert slots["views"]["img_size"] == 32
    assert slots["decoder"] == {
        "type": "mixmim_decoder", "embed_dim": 16, "depth": 2, "num_heads": None, "mlp_ratio": 4.0,
    }  # fmt: skip
    published = state | {"mask_token": torch.zeros(1, 1, 512)}
    assert OfficialCheckpoint().to_recipe(published)["decoder"]["num_heads"].value == 16  # a guess
    alone = {name: tensor for name, tensor in state.items() if not name.startswith(("mask_token", "decoder_"))}
    assert OfficialCheckpoint().to_recipe(alone)["decoder"] == {"type": "mixmim_decoder"}


def test_the_exported_encoder_is_rebuilt_from_its_file_alone(tmp_path: Path):
    state = state_of_ours()
    exported = SafetensorsCheckpoint().export_state(state)
    assert not any(name.startswith("decoder") or "index" in name for name in exported)
    assert not SafetensorsCheckpoint().recognises(exported)
    save_file(exported, tmp_path / "encoder.safetensors")
    loaded, images = load_encoder(tmp_path / "encoder.safetensors"), images_at(range(2))
    with torch.no_grad():
        assert torch.equal(loaded(images, Mask.none(2, GRID)).tokens, make_encoder()(images, Mask.none(2, GRID)).tokens)
    assert load_encoder(tmp_path / "encoder.safetensors", drop_path_rate=0.3).config.drop_path_rate == 0.3
    save_file({**exported, "extra": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds no MixMIM encoder.*unexpected \['extra'\]"):
        load_encoder(tmp_path / "other.safetensors")


def test_export_with_another_decoder_holds_the_encoder_alone():
    state = {name: tensor for name, tensor in state_of_ours().items() if name.startswith("encoder.")}
    exported = OfficialCheckpoint().export_state(state | {"heads.main.decoder.head.weight": torch.zeros(1)})
    assert exported["layers.0.blocks.0.attn.relative_position_index"].shape == (16, 16)
    assert "head.weight" not in exported


def test_positions_and_biases_are_resized_for_larger_images_and_windows(tmp_path: Path):
    """Plain bicubic, as the official loader does it: constant tables stay constant."""
    official = OfficialCheckpoint().export_state(state_of_ours())
    for name, tensor in official.items():
        if name.endswith(("bias_table", "pos_embed")):
            tensor.fill_(3.0)
    torch.save({"model": official}, tmp_path / "official.pth")
    options = {"decoder.num_heads": 2, "views.img_size": 64, "encoder.window_size": [8, 8]}
    report = import_checkpoint(tmp_path / "official.pth", tmp_path / "imported", options=options)
    assert report.resized["encoder.absolute_pos_embed"] == ((1, 64, 16), (1, 256, 16))
    assert report.resized["encoder.layers.1.blocks.0.attn.relative_position_bias_table"] == ((49, 4), (225, 4))
    assert OfficialCheckpoint.bias_tables == "bicubic"
    assert not report.missing
    weights = load_weights(tmp_path / "imported")
    for name in report.resized:
        assert torch.allclose(weights[name], torch.tensor(3.0))
    with pytest.raises(CheckpointError, match=r"does not tell decoder.num_heads"):
        import_checkpoint(tmp_path / "official.pth", tmp_path / "again")


def load_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


# --- recipes ---------------------------------------------------------------------------------------------------------


PROTOCOLS = {"mixmim_finetune": 2e-3, "mixmim_finetune_large": 4e-3, "mixmim_linear": 1.6}


def test_the_shipped_recipes_are_valid_and_have_the_official_rate():
    registry = Registry()
    names = {info.name for info in registry.recipes() if info.plugin == "mixmim"}
    assert names == {"mixmim_quickstart", "mixmim", "mixmim_large", *PROTOCOLS}
    for name, rate in PROTOCOLS.items():
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(rate)
        assert recipe.objective.type == "classify"
    for name in names - {"mixmim_quickstart", *PROTOCOLS}:
        recipe = load_recipe(name, registry=registry)
        assert recipe.optim.peak_lr(recipe.train.total_batch_size) == pytest.approx(1.2e-3)
        assert recipe.optim.betas == (0.9, 0.95)
        assert recipe.target.options["norm_pix_loss"] is True
        assert recipe.masker.options["scope"] == "batch"
    load_recipe("mixmim_quickstart", registry=registry)


def test_layers_of_fine_tuning_by_hand():
    """Two stages of 1 and 2 blocks: layers 0 to 4, and nothing is in the last one."""
    layers = {
        "patch_embed.proj.weight": 0,
        "layers.0.blocks.0.mlp.fc1.weight": 1,
        "layers.0.downsample.norm.weight": 2,
        "layers.1.blocks.0.norm1.bias": 2,
        "layers.1.blocks.1.norm1.bias": 3,
        "norm.weight": 3,
    }
    encoder = make_encoder(depths=(1, 2))
    assert layers.keys() <= dict(encoder.named_parameters()).keys()
    assert {name: encoder.layer_of(name) for name in layers} == layers
    assert encoder.num_layers == 5
