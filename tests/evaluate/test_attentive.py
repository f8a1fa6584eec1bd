"""Attentive heads find what the mean of tokens hides, and are what the papers say."""

from __future__ import annotations

import re

import pytest
import torch
from blobs import SPEC, blobs, subject_of
from torch import nn

from mim_framework.base.errors import DataError
from mim_framework.contract.evaluation import Features
from mim_framework.evaluate.attentive import Attentive
from mim_framework.evaluate.few_shot import FewShot
from mim_framework.evaluate.linear import Linear
from mim_framework.testing import run_ranks


def hidden_in_one_token(per_class: int, seed: int) -> Features:
    """One of nine tokens tells the class, and says that it does in its last place; the others are noise."""
    told = blobs(per_class, num_classes=2, dim=8, spread=0.1, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    x = torch.randn(len(told.y), 9, 8, generator=generator)
    x[..., 7] = -1.0
    place = torch.randint(9, (len(told.y),), generator=generator)
    x[torch.arange(len(x)), place] = 2 * told.x
    x[torch.arange(len(x)), place, 7] = 3.0
    return Features(x, told.y)


def numbers_of(train: Features, test: Features, **options) -> dict[str, float]:
    return Attentive(Attentive.Config(**{"batch_size": 32, "num_queries": 4, **options}))(subject_of(train, test))


@pytest.mark.parametrize(("head", "lr"), [("ep", 30.0), ("vjepa", 0.01), ("cae", 0.2), ("aim", 30.0)])
def test_a_head_finds_the_token_that_tells_and_their_mean_does_not(head, lr):
    train, test = hidden_in_one_token(100, 0), hidden_in_one_token(100, 1)
    numbers = numbers_of(train, test, head=head, lr=[lr], epochs=20)
    assert numbers["top1"] > 0.9
    assert numbers_of(train, test, head=head, lr=[lr], epochs=20) == numbers
    means = [Features(each.x.mean(1), each.y) for each in (train, test)]
    assert Linear(Linear.Config(steps=200, batch_size=32))(subject_of(*means))["top1"] < 0.7


def test_the_global_generator_is_left_as_it_was():
    before = torch.random.get_rng_state()
    numbers_of(hidden_in_one_token(10, 0), hidden_in_one_token(5, 1), epochs=1, lr=[0.1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_heads_that_diverge_are_told(caplog):
    train, test = hidden_in_one_token(10, 0), hidden_in_one_token(5, 1)
    with pytest.raises(DataError, match=re.escape("attentive: the heads diverged at lr 1e+30; give lower ones")):
        numbers_of(train, test, head="vjepa", epochs=8, lr=[1e30])
    assert numbers_of(train, test, head="vjepa", epochs=8, lr=[1e30, 1e-3])["lr"] == 1e-3
    assert "attentive: heads diverged at lr 1e+30; they are left out of the choice" in caplog.text


def test_a_best_rate_at_the_edge_is_told(caplog):
    train, test = hidden_in_one_token(100, 0), hidden_in_one_token(20, 1)
    numbers_of(train, test, epochs=2, lr=[1e-9])
    assert caplog.messages == []
    assert numbers_of(train, test, head="vjepa", epochs=20, batch_size=32, lr=[1e-9, 1e-3])["lr"] == 1e-3
    text = "attentive: the highest lr, 0.001, was the best; higher ones may be better: attentive.lr=[...]"
    assert caplog.messages == [text]


def test_the_rate_is_chosen_on_train_images_and_the_official_one_is_the_lowest_by_default():
    train, test = hidden_in_one_token(100, 0), hidden_in_one_token(50, 1)
    chosen = numbers_of(train, test, epochs=20, batch_size=32)
    assert chosen["lr"] in [pytest.approx(0.1 * 32 / 256 * factor) for factor in (1, 10, 100)]
    turned = Features(test.x, 1 - test.y)
    assert numbers_of(train, turned, epochs=20, batch_size=32)["lr"] == chosen["lr"]


def test_widths_that_do_not_fit_are_told_with_what_would():
    Attentive(Attentive.Config(num_queries=8)).check(SPEC)
    with pytest.raises(ValueError, match="width 8 is not a multiple of num_queries 32; use num_queries=8"):
        Attentive(Attentive.Config()).check(SPEC)
    Attentive(Attentive.Config(head="cae")).check(SPEC)
    with pytest.raises(ValueError, match="embed_dim 8 is not a multiple of num_heads 3"):
        Attentive(Attentive.Config(head="cae", num_heads=3)).check(SPEC)
    with pytest.raises(ValueError, match="the encoder does not hand out layers"):
        Attentive(Attentive.Config(layers=(1,))).check(SPEC)


def test_fewer_images_than_a_batch_are_one_batch():
    train = hidden_in_one_token(5, 0)
    steps = []
    original = nn.BatchNorm1d.forward

    def counted(self, x):
        if self.training:
            steps.append(len(x))
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm1d, "forward", counted)
        numbers_of(train, train, epochs=3, batch_size=64, lr=[0.1])
    assert steps == [10, 10, 10]


def test_every_rank_finds_the_same_numbers():
    tokens = subject_of(hidden_in_one_token(20, 0), hidden_in_one_token(10, 1))
    vectors = subject_of(blobs(20), blobs(10, seed=1))

    def numbers() -> list[dict[str, float]]:
        return [
            Attentive(Attentive.Config(epochs=3, num_queries=4))(tokens),
            Linear(Linear.Config(steps=20))(vectors),
            Linear(Linear.Config(solver="logistic"))(vectors),
            FewShot(FewShot.Config(n=(2,)))(vectors),
        ]

    assert run_ranks(lambda rank: numbers()) == [numbers()] * 2
