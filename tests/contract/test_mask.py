"""Masks: ids, grids and the promises they keep."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.mask import Grid, Mask

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
