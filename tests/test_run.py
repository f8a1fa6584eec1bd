"""The numbers of a run: steps, epochs, batch arithmetic, precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mim_framework.errors import RecipeError
from mim_framework.run import Run, batch_layout, run_length, uses_bfloat16
from mim_framework.train_config import TrainSection


def recipe(**train):
    section = TrainSection(**{"total_batch_size": 64, "epochs": 4, **train})
    return SimpleNamespace(train=section, location=lambda where: f"r.yaml: {where}")


def test_an_epoch_is_the_number_of_whole_batches():
    assert run_length(recipe(), 1281) == (20, 80)
    assert run_length(recipe(epochs=0.5), 640) == (10, 5)
    assert run_length(recipe(epochs=None, steps=7), 640) == (10, 7)
    assert run_length(recipe(epochs=800, total_batch_size=4096), 1_281_167) == (312, 249_600)  # as the official run


def test_a_set_smaller_than_a_batch_has_one_step_an_epoch():
    assert run_length(recipe(), 10) == (1, 4)


def test_the_micro_batch_is_derived_or_checked():
    assert batch_layout(recipe(), 0, 4).batch_size == 16
    layout = batch_layout(recipe(batch_size=4), 1, 2)
    assert (layout.batch_size, layout.accum_steps, layout.rank) == (4, 8, 1)
    with pytest.raises(RecipeError, match=r"64 images do not divide into 3 ranks; use 63, for example"):
        batch_layout(recipe(), 0, 3)


def test_epochs_count_steps_in_the_order_of_the_official_arithmetic():
    run = Run(None, recipe(), None, None, None, None, None, steps_per_epoch=3, total_steps=12)
    assert [run.epoch(index) for index in (0, 1, 3, 5)] == [0.0, 1 / 3, 1.0, 2 / 3 + 1]
    assert run.epochs == 4
    assert [done for done in range(1, 13) if run.due(done, 2)] == [6, 12]
    assert not any(run.due(done, 0) for done in range(1, 13))
    assert [done for done in range(1, 7) if run.due(done, 0.5)] == [2, 4, 6]


def test_precision_is_what_was_asked_for():
    cpu = torch.device("cpu")
    assert uses_bfloat16("bfloat16", cpu)
    assert not uses_bfloat16("float32", cpu)
    assert not uses_bfloat16("auto", torch.device("mps"))
