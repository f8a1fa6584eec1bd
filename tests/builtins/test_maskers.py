"""Built-in maskers."""

from __future__ import annotations

import pytest
import torch

from mim_framework.base import rng
from mim_framework.builtins.maskers import (
    MAX_ATTEMPTS,
    NUMBERS_PER_ATTEMPT,
    BlockMasker,
    NoMasker,
    RandomMasker,
    complete,
    draw_blocks,
)
from mim_framework.contract.mask import Grid
from mim_framework.contract.specs import EncoderSpec, Specs, ViewSpec
from mim_framework.contract.step import Step
from mim_framework.nn.masking import mask_from_noise


def specs(img_size: int = 64, stride: int = 16) -> Specs:
    side = img_size // stride
    views = {"x": ViewSpec("x", size=(img_size, img_size))}
    return Specs(views=views, encoder=EncoderSpec(8, Grid((side, side)), stride, 1, 1))


def random_masker(**options) -> RandomMasker:
    img_size = options.pop("img_size", 64)
    return RandomMasker(RandomMasker.Config(**options), specs(img_size))


def step_at(positions: list[int]) -> Step:
    return Step(0, 1, 0.0, 1.0, torch.tensor(positions), 0, None)


def test_mask_from_noise_by_hand():
    mask = mask_from_noise(torch.tensor([[0.9, 0.1, 0.7, 0.3]]), num_keep=2, grid=Grid((2, 2)))
    assert mask.ids_keep.tolist() == [[1, 3]]
    assert mask.hidden.tolist() == [[True, False, True, False]]


def test_ratio_rounds_as_mae_does_or_as_simmim_does():
    assert random_masker(mask_ratio=0.75).spec.num_hidden == 12
    assert random_masker(mask_ratio=0.6).spec.num_hidden == 10  # int(16 * 0.4) = 6 stay
    assert random_masker(mask_ratio=0.6, mask_patch_size=32, rounding="hide_ceil").spec.num_hidden == 3  # ceil(4 * 0.6)
    assert random_masker(mask_ratio=0.6, mask_patch_size=32, rounding="hide_floor").spec.num_hidden == 2
    assert random_masker(mask_ratio=0.9, img_size=160).num_keep == 9  # 100 * (1 - 0.9) is 9.999...


def test_masks_follow_the_position_and_nothing_else():
    masker = random_masker()
    together = masker(step_at([3, 8]), {}).masks["x"]
    alone = masker(step_at([8]), {}).masks["x"]
    together.validate()
    assert torch.equal(together.hidden[1:], alone.hidden)
    assert not torch.equal(together.hidden[0], together.hidden[1])


def test_every_patch_is_hidden_about_as_often():
    hidden = random_masker()(step_at(list(range(4000))), {}).masks["x"].hidden.float().mean(0)
    assert (hidden - 0.75).abs().max() < 0.03  # 4 standard errors


def test_a_shared_mask_is_one_row_for_all():
    mask = random_masker(shared=True)(step_at([3, 8, 9]), {}).masks["x"]
    mask.validate()
    assert mask.shared


def test_coarse_cells_cover_whole_units():
    mask = random_masker(mask_patch_size=32)(step_at([0]), {}).masks["x"].at(Grid((4, 4)))
    cells = mask.hidden.reshape(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    assert sorted(cells.int().sum(1).tolist()) == [0, 4, 4, 4]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mask_patch_size": 24}, "image size 64x64 is not a multiple of mask_patch_size 24"),
        ({"mask_ratio": 0.99}, "mask_ratio 0.99 leaves none of the 16 cells"),
        (
            {"mask_ratio": 0.01, "rounding": "keep_floor", "img_size": 32, "mask_patch_size": 32},
            "leaves none of the 1 cells",
        ),
    ],
)
def test_impossible_masks_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        random_masker(**options)


def test_no_masker_hides_nothing_and_predicts_everything():
    masker = NoMasker(NoMasker.Config(), specs())
    mask = masker(step_at([0, 1]), {}).masks["x"]
    assert not mask.hidden.any()
    assert mask.where.all()


# --- blocks; official statistics are in parity/ -----------------------------------------------------------------------


def block_masker(img_size: int = 224, **options) -> BlockMasker:
    return BlockMasker(BlockMasker.Config(**options), specs(img_size))


def rectangle(area: float, aspect: float, top: float, left: float) -> list[float]:
    """The uniform numbers of an attempt on a 4x4 grid: aspect 0 = widest, 0.5 = square."""
    return [area, aspect, top, left]


def picture(hidden: torch.Tensor) -> list[str]:
    return ["".join(".#"[cell] for cell in row) for row in hidden.reshape(4, 4).int().tolist()]


def test_blocks_by_hand():
    grid, square = Grid((4, 4)), 0.5
    rand = torch.tensor([[*rectangle(0.0, square, 0.0, 0.0), *rectangle(0.0, square, 0.5, 0.5)]])
    hidden = draw_blocks(rand, grid, 7, min_num_patches=4)
    assert picture(hidden) == ["##..", "###.", ".##.", "...."]  # 2x2 at (0, 0), then 2x2 at (1, 1)
    assert picture(draw_blocks(rand, grid, 6, min_num_patches=4))[2] == "...."  # the second would be one too many


def test_a_block_as_long_as_the_grid_or_without_a_new_patch_is_tried_again_by_hand():
    grid, square = Grid((4, 4)), 0.5
    too_long = rectangle(1.0, 0.0, 0.0, 0.0)  # area 7, aspect 0.3: 1 x 5
    small = rectangle(0.0, square, 0.0, 0.0)
    elsewhere = rectangle(0.0, square, 0.99, 0.99)
    hidden = draw_blocks(torch.tensor([[*too_long, *small, *small, *elsewhere]]), grid, 8, min_num_patches=4)
    assert picture(hidden) == ["##..", "##..", "..##", "..##"]


def test_after_ten_failures_an_image_is_finished_unless_told_to_go_on():
    grid = Grid((4, 4))
    small = rectangle(0.0, 0.5, 0.0, 0.0)
    rand = torch.tensor([[*(small * 11), *rectangle(0.0, 0.5, 0.99, 0.99)]])
    assert draw_blocks(rand, grid, 8, min_num_patches=4).sum() == 4
    assert draw_blocks(rand, grid, 8, min_num_patches=4, give_up=False).sum() == 8
    assert picture(draw_blocks(rand, grid, 8, min_num_patches=4, give_up=False, last_edge=False))[3] == "...."


def test_completion_hides_the_visible_patches_of_least_noise_by_hand():
    hidden = torch.tensor([[True, False, False, False], [False, False, False, False]])
    noise = torch.tensor([[0.9, 0.3, 0.1, 0.2], [0.4, 0.3, 0.1, 0.2]])
    assert complete(hidden, noise, 2).int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("rule", ["exact", "mmpretrain"])
def test_exact_rules_hide_the_same_number_in_every_image(rule: str):
    masker = block_masker(mask_ratio=0.4, rule=rule)
    mask = masker(step_at(list(range(64))), {}).masks["x"]
    mask.validate()
    assert masker.spec.equal
    assert mask.num_hidden == masker.spec.num_hidden == 78
    assert bool(mask.hidden.reshape(-1, 14, 14)[:, -1].any()) == (rule == "exact")


def test_stopping_short_hides_at_most_the_number_and_promises_nothing():
    masker = block_masker(num_hidden=75, min_num_patches=16, rule="stop_short")
    mask = masker(step_at(list(range(64))), {}).masks["x"]
    counts = mask.hidden.sum(1)
    assert not masker.spec.equal
    assert not mask.equal
    assert counts.max() == 75
    assert 60 < counts.min() < 75


def test_blocks_depend_on_the_position_alone():
    masker = block_masker()
    together = masker(step_at([5, 6, 7]), {}).masks["x"].hidden
    alone = masker(step_at([6]), {}).masks["x"].hidden
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_more_attempts_would_change_nothing():
    rand = rng.uniform(1, "mask", torch.arange(2000), 2 * MAX_ATTEMPTS * NUMBERS_PER_ATTEMPT)
    options = {"grid": Grid((14, 14)), "num_hidden": 75, "min_num_patches": 16}
    fewer = draw_blocks(rand[:, : MAX_ATTEMPTS * NUMBERS_PER_ATTEMPT], **options)
    assert torch.equal(draw_blocks(rand, **options), fewer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden": 196}, "num_hidden 196 hides 196 of the 196 patches"),
        ({"mask_ratio": 0.001}, "mask_ratio 0.001 hides 0 of the 196 patches"),
        ({"num_hidden": 10, "min_num_patches": 11}, "min_num_patches 11 is more than the 10 to hide"),
        ({"mask_patch_size": 15}, "image size 224x224 is not a multiple of mask_patch_size 15"),
    ],
)
def test_blocks_that_cannot_be_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        block_masker(**options)


# --- clips and several views -----------------------------------------------------------------------------------------

CLIP = ViewSpec("x", axes=("time", "height", "width"), size=(4, 8, 8))
OF_CLIPS = EncoderSpec(8, Grid((2, 4, 4)), (2, 2, 2), 1, 1)


def clip_masker(cls, **options):
    return cls(cls.Config(**options), Specs({"x": CLIP}, encoder=OF_CLIPS))


@pytest.mark.parametrize("cls", [RandomMasker, BlockMasker])
def test_a_tube_hides_a_cell_at_all_times(cls):
    masker = clip_masker(cls, tube=True, mask_ratio=0.5)
    mask = masker(step_at(list(range(3))), {}).masks["x"]
    assert (mask.grid, masker.spec.num_hidden) == (Grid((1, 4, 4)), 8)
    of_tokens = mask.at(Grid((2, 4, 4))).hidden.unflatten(1, (2, 16))
    assert torch.equal(of_tokens[:, 0], of_tokens[:, 1])
    assert of_tokens[:, 0].sum(1).tolist() == [8, 8, 8]


def test_cells_of_a_clip_are_hidden_one_by_one_without_a_tube():
    mask = clip_masker(RandomMasker, mask_ratio=0.5)(step_at(list(range(3))), {}).masks["x"]
    assert (mask.grid, mask.num_hidden) == (Grid((2, 4, 4)), 16)
    cells = clip_masker(RandomMasker, mask_patch_size=4)(step_at(list(range(1))), {}).masks["x"]
    assert cells.grid == Grid((2, 2, 2))


def test_what_does_not_fit_the_axes_is_refused():
    with pytest.raises(
        ValueError, match="masker 'block' draws rectangles, the grid is 2x4x4; of a clip give tube: true"
    ):
        clip_masker(BlockMasker)
    flat = Specs({"x": ViewSpec("x", size=(8, 8))}, encoder=EncoderSpec(8, Grid((4, 4)), 2, 1, 1))
    with pytest.raises(ValueError, match="tube needs a clip of .*; the grid of view 'x' is 4x4"):
        RandomMasker(RandomMasker.Config(tube=True), flat)


def test_several_views_are_masked_each_by_draws_of_its_own():
    views = {name: ViewSpec(name, size=(8, 8)) for name in ("x", "depth")}
    encoder = EncoderSpec(8, Grid((4, 4)), 2, 1, 1, views=("x", "depth"), grids={"depth": (Grid((2, 2)), (4, 4))})
    masker = RandomMasker(RandomMasker.Config(mask_ratio=0.5, views=("x", "depth")), Specs(views, encoder=encoder))
    assert (masker.spec.views, masker.spec.grid_of("depth")) == (("x", "depth"), Grid((2, 2)))
    masks = masker(step_at(list(range(4))), {}).masks
    assert [(mask.grid, mask.num_hidden) for mask in masks.values()] == [(Grid((4, 4)), 8), (Grid((2, 2)), 2)]
    alone = RandomMasker(RandomMasker.Config(mask_ratio=0.5), Specs(views, encoder=encoder))
    assert torch.equal(alone(step_at(list(range(4))), {}).masks["x"].hidden, masks["x"].hidden)
