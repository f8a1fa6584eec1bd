"""Mutated recipes come as far as a model and a step, where the faults of a check would be; none ends in a traceback."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import mutation
import pytest
import yaml

from mim_framework.registry.registry import Registry


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [info.path.read_text() for info in Registry().recipes()]


def deep(seed: int, texts: list[str]) -> bytes:
    return mutation.deeply_mutated(random.Random(seed), texts)


def test_a_seed_gives_the_same_recipe_on_digits_and_another_seed_another(texts):
    recipes = [deep(seed, texts) for seed in range(30)]
    assert recipes == [deep(seed, texts) for seed in range(30)]
    assert len(set(recipes)) > 25  # some mutations meet, or change nothing
    assert {yaml.safe_load(recipe)["data"]["source"] for recipe in recipes} == {"digits"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_recipes_with_extreme_values_come_as_far_as_a_step_and_none_ends_in_a_traceback(tmp_path: Path, texts):
    file, registry, reached = tmp_path / "mutated.yaml", Registry(), Counter()
    with mutation.little_memory():
        for seed in range(1000, 1040):
            file.write_bytes(deep(seed, texts))
            found = mutation.outcome(lambda: mutation.check_recipe(file, registry))
            assert found.traceback == ""
            assert found.seconds < mutation.SECONDS
            assert len(found.refused) < 10_000
            reached[mutation.reached(file, registry)] += 1
    assert reached["step"] >= 12  # 3 of 10, of which half were seen
