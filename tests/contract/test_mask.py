"""Masks and the other records that pass between slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Masked, Pred
from mim_framework.contract.specs import EncoderSpec, ViewSpec
from mim_framework.contract.step import Step
from mim_framework.contract.world import World

GRID = Grid((2, 2))


def mask_of(rows: list[list[int]], grid: Grid = GRID, **options) -> Mask:
    return Mask(torch.tensor(rows, dtype=torch.bool), grid, **options)


def test_ids_of_a_shuffle_by_hand():
    mask = Mask.from_shuffle(torch.tensor([[3, 1, 0, 2]]), num_keep=2, grid=GRID)
    assert mask.hidden.tolist() == [[True, False, True, False]]
    assert mask.ids_keep.tolist() == [[3, 1]]
    assert mask.ids_hidden.tolist() == [[0, 2]]
    assert mask.ids_restore.tolist() == [[2, 1, 3, 0]]
    assert (mask.num_keep, mask.num_hidden) == (2, 2)


def test_ids_derived_from_a_boolean_mask_are_in_raster_order():
    mask = mask_of([[1, 0, 1, 0], [0, 1, 1, 0]], equal=True)
    assert mask.ids_keep.tolist() == [[1, 3], [0, 3]]
    assert mask.ids_restore.gather(1, mask.ids_shuffle).tolist() == [[0, 1, 2, 3]] * 2


def test_ids_need_equal_rows():
    with pytest.raises(ValueError, match="ids_shuffle needs a mask whose rows hide the same number"):
        _ = mask_of([[1, 0, 0, 0], [1, 1, 0, 0]]).ids_keep


def test_float_masks_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="must be bool with True = hidden, got torch.float32"):
        Mask(torch.zeros(1, 4), GRID)
    with pytest.raises(ValueError, match=r"has shape \(1, 3\), the grid 2x2 needs \(B, 4\)"):
        Mask(torch.zeros(1, 3, dtype=torch.bool), GRID)
    with pytest.raises(ValueError, match=r"predict has shape \(1, 2\)"):
        mask_of([[1, 0, 0, 0]], predict=torch.ones(1, 2))


def test_a_finer_grid_repeats_and_a_coarser_one_counts():
    mask = mask_of([[1, 0, 0, 1]], equal=True)
    fine = mask.at(Grid((4, 4)))
    assert fine.hidden.reshape(4, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert (fine.equal, fine.num_hidden) == (True, 8)
    back = fine.at(GRID)
    assert back.hidden.tolist() == mask.hidden.tolist()
    assert back.where.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    quarter = mask_of([[1, 0, 0, 0]]).at(Grid((1, 1)))
    assert quarter.hidden.tolist() == [[False]]
    assert quarter.where.tolist() == [[0.25]]


def test_resampling_keeps_rows_and_columns_apart():
    mask = mask_of([[1, 0, 0, 0, 0, 0]], Grid((2, 3)))
    assert mask.at(Grid((2, 6))).hidden.int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert mask.at(Grid((2, 1))).where.tolist() == [[pytest.approx(1 / 3), 0.0]]
    with pytest.raises(ValueError, match="grid 2x3 to 4x4: one must divide"):
        mask.at(Grid((4, 4)))
    with pytest.raises(ValueError, match="another number of axes"):
        mask.at(Grid((6,)))


def test_complement_hides_what_was_visible():
    mask = Mask.from_shuffle(torch.tensor([[3, 1, 0, 2]]), num_keep=1, grid=GRID)
    other = mask.complement()
    assert other.hidden.tolist() == [[False, False, False, True]]
    assert sorted(other.ids_keep[0].tolist()) == [0, 1, 2]
    other.validate()


def test_validate_catches_broken_promises():
    with pytest.raises(ValueError, match=r"equal=True but hides \[1, 2\]"):
        mask_of([[1, 0, 0, 0], [1, 1, 0, 0]], equal=True).validate()
    with pytest.raises(ValueError, match="shared=True but its rows differ"):
        mask_of([[1, 0, 0, 0], [0, 1, 0, 0]], equal=True, shared=True).validate()
    Mask.none(3, GRID).validate()


def test_predicted_positions_are_ids_only_when_they_are_the_hidden_ones():
    mask = mask_of([[1, 0, 1, 0]], equal=True)
    assert mask.ids_predict.tolist() == [[0, 2]]
    assert mask.predicting(torch.ones(1, 4)).ids_predict is None
    assert Mask.none(1, GRID).ids_predict is None
    assert mask_of([[1, 0, 1, 0]]).ids_predict is None


def test_rows_that_hide_fewer_are_filled_up_with_visible_positions_of_no_weight():
    mask = mask_of([[1, 0, 1, 0], [0, 0, 1, 0]], max_hidden=2)
    assert mask.ids_predict.tolist() == [[0, 2], [2, 0]]
    assert mask.where.gather(1, mask.ids_predict).tolist() == [[True, True], [True, False]]
    assert mask.at(Grid((4, 4))).ids_predict.shape == (2, 8)
    assert mask.complement().ids_predict is None
    mask.validate()
    with pytest.raises(ValueError, match=r"max_hidden=1 but hides \[2, 1\]"):
        mask_of([[1, 0, 1, 0], [0, 0, 1, 0]], max_hidden=1).validate()


def test_pred_gathers_what_it_holds_and_refuses_the_rest():
    ids = torch.tensor([[2, 0]])
    everywhere = Pred(torch.arange(4.0).reshape(1, 4, 1), GRID)
    assert everywhere.at(ids).flatten().tolist() == [2.0, 0.0]
    assert Pred(torch.tensor([[7, 8, 9, 10]]), GRID).at(ids).tolist() == [[9, 7]]
    somewhere = Pred(torch.ones(1, 2, 1), GRID, ids)
    assert somewhere.at(ids) is somewhere.values
    with pytest.raises(ValueError, match="held for some positions only"):
        somewhere.at(None)
    with pytest.raises(ValueError, match="other positions"):
        somewhere.at(torch.tensor([[2, 0]]))


def test_asks_unite_and_encoders_say_what_they_lack():
    ask = Ask(layers=frozenset({1})) | Ask(layers=frozenset({3}), aux=frozenset({"bias"}))
    assert ask.layers == {1, 3}
    spec = EncoderSpec(8, GRID, 16, 4, 2, offers=Ask(layers=frozenset(range(4))))
    assert spec.lacks(ask) == "aux ['bias']"
    assert spec.lacks(Ask(layers=frozenset({2}))) == ""


def test_a_rewritten_view_keeps_its_original():
    clean, mixed = torch.zeros(1), torch.ones(1)
    masked = Masked({}, {"x": mixed, "y": clean}, originals={"x": clean})
    assert masked.clean("x") is clean
    assert masked.clean("y") is clean


def test_partners_are_kept_on_other_grids_and_their_promises_checked():
    mask = mask_of([[1, 0, 0, 1], [1, 0, 0, 1]], equal=True, partner=torch.tensor([1, 0]))
    mask.validate()
    assert mask.at(Grid((4, 4))).partner.tolist() == [1, 0]
    assert mask.at(Grid((1, 1))).partner.tolist() == [1, 0]
    assert mask.complement().partner.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"partners that are not mutual: \[1, 1\]"):
        mask_of([[1, 0, 0, 1], [0, 1, 1, 0]], partner=torch.tensor([1, 1])).validate()
    with pytest.raises(ValueError, match="partners that hide different positions"):
        mask_of([[1, 0, 0, 1], [0, 1, 1, 0]], partner=torch.tensor([1, 0])).validate()
    mask_of([[1, 0, 0, 1]], partner=torch.tensor([0])).validate()  # an image alone is mixed with itself


def test_a_shared_draw_is_the_same_for_all_samples_of_a_step_and_another_in_the_next():
    step = Step(3, 10, 0.0, 1.0, torch.arange(4), seed=0, world=World())
    other_rank = replace(step, positions=torch.arange(4, 8))
    assert step.rand_shared("mask", 5).shape == (1, 5)
    assert torch.equal(step.rand_shared("mask", 5), other_rank.rand_shared("mask", 5))
    assert not torch.equal(step.rand_shared("mask", 5), replace(step, index=4).rand_shared("mask", 5))


def test_only_a_view_of_images_has_a_size_and_channels():
    images = ViewSpec("x", (3, 32, 48))
    assert (images.in_chans, images.img_size) == (3, (32, 48))
    points = ViewSpec("x", (64, 33, 3), kind="points")
    for name in ("in_chans", "img_size"):
        with pytest.raises(ValueError, match="view 'x' holds points, images are needed"):
            getattr(points, name)
