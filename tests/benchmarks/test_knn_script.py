"""kNN costs hardly more than the product and top-k that it consists of."""

from __future__ import annotations

import sys

import knn
import pytest
import torch


def test_both_sides_find_the_same_neighbours():
    train_x, train_y, test_x = knn.features(60, 7, 16, "cpu")
    normal = (torch.nn.functional.normalize(each) for each in (train_x, test_x))
    neighbours = knn.plain(*normal, chunk=3)
    votes = [train_y[row].bincount(minlength=knn.NUM_CLASSES) for row in neighbours]
    ours = knn.ours(train_x, train_y, test_x)
    assert neighbours.shape == (7, knn.K)
    assert all(vote[label] > 0 for vote, label in zip(votes, ours, strict=True))


@pytest.mark.slow
def test_knn_is_within_a_fifth_of_the_plain_product_and_top_k():
    mine, plain = knn.measure(10_000, 2000, 768, device="cpu", repeats=5, chunk=200)
    assert mine / plain < 1.2


def test_the_script_prints_the_ratio(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["knn.py", "--train", "50", "--test", "5", "--dim", "8", "--repeats", "1"])
    knn.main()
    assert "knn_predict " in capsys.readouterr().out
