"""Built-in maskers."""

from __future__ import annotations

import pytest
import torch

from mim_framework.builtins.maskers import NoMasker, RandomMasker, mask_from_noise
from mim_framework.components import Specs
from mim_framework.records import EncoderSpec, Grid, Step, ViewSpec


def specs(img_size: int = 64, stride: int = 16) -> Specs:
    side = img_size // stride
    views = {"x": ViewSpec("x", (3, img_size, img_size))}
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
