"""What passes between slots beside masks: predictions, asks, rewritten views, partners."""

from __future__ import annotations

import pytest
import torch

from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Masked, Pred
from mim_framework.contract.specs import EncoderSpec

GRID = Grid((2, 2))


def mask_of(rows: list[list[int]], grid: Grid = GRID, **options) -> Mask:
    return Mask(torch.tensor(rows, dtype=torch.bool), grid, **options)


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
