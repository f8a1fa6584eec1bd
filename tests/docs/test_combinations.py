"""Any masker, encoder, target, decoder and loss that fit together train; the others are refused by name."""

from __future__ import annotations

import itertools

import make_combinations
import pytest
from make_combinations import PAGE, Outcome, attempts, names_of, page

from mim_framework.registry.registry import Registry

pytestmark = pytest.mark.slow

NAMES = names_of(Registry())
PAIRS = list(itertools.product(NAMES["masker"], NAMES["encoder"]))
OUTCOMES: dict[tuple[str, str], list[Outcome]] = {}


@pytest.mark.parametrize(("masker", "encoder"), PAIRS)
def test_a_combination_trains_or_is_refused_with_both_names(masker: str, encoder: str):
    outcomes = OUTCOMES[masker, encoder] = list(attempts(Registry(), masker=masker, encoder=encoder))
    assert len(outcomes) == len(NAMES["target"]) * len(NAMES["decoder"]) * len(NAMES["loss"])
    unclear = [outcome for outcome in outcomes if outcome.refusal and not outcome.names_both_sides()]
    assert unclear == []


def test_every_component_takes_part_in_a_training():
    """All that is registered is of use to somebody."""
    every = itertools.chain.from_iterable(OUTCOMES[pair] if pair in OUTCOMES else _again(*pair) for pair in PAIRS)
    used = {(kind, name) for outcome in every if not outcome.refusal for kind, name in outcome.names.items()}
    assert {(kind, name) for kind, names in NAMES.items() for name in names} - used == set()


def test_the_table_in_the_docs_is_the_generated_one():
    outcomes = [outcome for pair in PAIRS for outcome in (OUTCOMES.get(pair) or _again(*pair))]
    assert PAGE.read_text() == page(outcomes), f"run python {make_combinations.__file__}"


def _again(masker: str, encoder: str) -> list[Outcome]:
    return list(attempts(Registry(), masker=masker, encoder=encoder))
