"""The codebook alone: nearest codes, updates, k-means and revival, on a few vectors."""

from __future__ import annotations

import pytest
import torch
from mim_plugin_beitv2.codebook import (
    EMACodebook,
    counts_and_sums,
    directions,
    first_centers,
    nearest_codes,
    spherical_k_means,
)
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mim_framework.assembly.preflight import make_step
from mim_framework.contract.step import Step
from mim_framework.recipe.recipe import Recipe

RIGHT, UP, LEFT = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def book_of(*codes: list[float], decay: float = 0.5, **options: int | bool) -> EMACodebook:
    book = EMACodebook(len(codes), 2, decay, **options)
    book.codes.copy_(torch.tensor(codes))
    return book


def see(book: EMACodebook, *vectors: list[float]) -> None:
    """One optimizer step whose only image has these vectors."""
    book(torch.tensor([vectors]))
    book.take()
    book.update(step_of(0))


def step_of(*positions: int) -> Step:
    recipe = {"name": "run", "data": {"source": "digits"}, "masker": "none", "encoder": "vit", "optim": {"lr": 1}}
    head = {"target": "pixels", "decoder": "linear", "loss": "mse", "train": {"total_batch_size": 1, "steps": 1}}
    return make_step(Recipe.model_validate(recipe | head), torch.tensor(positions))


def unit_vectors(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_nearest_codes_by_hand():
    codes = torch.tensor([RIGHT, UP, LEFT])
    vectors = torch.tensor([[[0.8, 0.6], [0.6, 0.8]], [[-0.8, 0.6], [0.0, -1.0]]])
    assert nearest_codes(vectors, codes)[:, 0].tolist() == [0, 2]
    assert nearest_codes(vectors, codes)[0].tolist() == [0, 1]


def test_the_nearest_of_many_is_that_of_least_distance_however_many_are_compared_at_a_time(monkeypatch):
    vectors, codes = unit_vectors(300, 8), unit_vectors(40, 8, seed=1)
    wanted = torch.cdist(vectors, codes).argmin(1)
    assert torch.equal(nearest_codes(vectors, codes), wanted)
    monkeypatch.setattr("mim_plugin_beitv2.codebook.VECTORS_AT_ONCE", 7)
    assert torch.equal(nearest_codes(vectors, codes), wanted)


def test_ids_are_found_in_full_precision_under_autocast():
    vectors, codes = unit_vectors(500, 8), unit_vectors(64, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(vectors, codes), nearest_codes(vectors.double(), codes.double()))
        blurred = (vectors @ codes.t()).argmax(1)
    assert not torch.equal(blurred, nearest_codes(vectors, codes))


def test_counts_and_sums_are_those_of_one_hot_products():
    vectors, ids = unit_vectors(50, 4), torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(2))
    counts, sums = counts_and_sums(vectors, ids, 9)
    assert torch.equal(counts, one_hot(ids, 9).sum(0).float())
    assert torch.allclose(sums, one_hot(ids, 9).float().t() @ vectors, atol=1e-6)


def test_directions_by_hand():
    counts, sums = torch.tensor([2.0, 0.0]), torch.tensor([[0.0, 6.0], [0.0, 0.0]])
    assert directions(counts, sums, otherwise=torch.tensor([RIGHT, LEFT])).tolist() == [UP, LEFT]


def test_a_used_code_moves_by_its_share_whatever_the_number_of_its_vectors():
    half_way = [0.5**0.5, 0.5**0.5]
    for vectors in ([UP], [UP] * 5):
        book = book_of(half_way, LEFT)
        see(book, *vectors)
        wanted = normalize(torch.tensor([half_way]) + torch.tensor([UP]), dim=-1)
        assert torch.allclose(book.codes[:1], wanted)
        assert book.codes[1].tolist() == LEFT


def test_a_forward_pass_only_counts_and_an_evaluation_not_even_that():
    book = book_of(RIGHT, LEFT)
    book(torch.tensor([[UP, RIGHT, RIGHT]]))
    assert book.codes.tolist() == [RIGHT, LEFT]
    assert book.counts.tolist() == [3, 0]
    assert book.sums[0].tolist() == [2, 1]
    book.eval()(torch.tensor([[LEFT]]))
    assert book.counts.tolist() == [3, 0]


def test_micro_batches_add_up_and_a_skipped_step_is_forgotten():
    whole, parts = (EMACodebook(16, 4, 0.9) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    vectors = unit_vectors(6, 10, 4)
    whole(vectors)
    parts(unit_vectors(2, 10, 4, seed=5))
    parts.take()  # and no update: its loss was not finite
    for part in vectors.split(2):
        parts(part)
    for book in (whole, parts):
        book.take()
        book.update(step_of(0))
    assert torch.allclose(parts.codes, whole.codes, atol=1e-7)
    assert parts.counts.sum() == 0


def test_codes_stay_on_the_sphere():
    book = EMACodebook(16, 4, 0.9)
    for seed in range(20):
        see(book, *unit_vectors(100, 4, seed=seed).tolist())
    assert torch.allclose(book.codes.norm(dim=-1), torch.ones(16), atol=1e-6)


def test_only_what_a_run_depends_on_is_in_a_checkpoint():
    assert EMACodebook(4, 2, 0.9).state_dict().keys() == {"codes", "initted"}
    assert EMACodebook(4, 2, 0.9, revive_after=3).state_dict().keys() == {"codes", "initted", "idle_steps"}
    assert EMACodebook(4, 2, 0.9, begins_from_data=True).initted.item() == 0


# --- k-means ---------------------------------------------------------------------------------------------------------


def test_k_means_by_hand():
    """Two clusters, and a center that nothing is near to."""
    samples = torch.tensor([[0.8, 0.6], [0.8, -0.6], LEFT])
    lonely = [-0.28, -0.96]
    centers, counts = spherical_k_means(samples, torch.tensor([[0.96, 0.28], [-0.6, 0.8], lonely]))
    assert counts.tolist() == [2, 1, 0]
    assert torch.allclose(centers, torch.tensor([RIGHT, LEFT, lonely]), atol=1e-6)


def test_first_centers_are_different_samples_where_there_are_enough():
    samples = unit_vectors(50, 4)
    centers = first_centers(samples, 50, seed=3)
    assert {tuple(row) for row in centers.tolist()} == {tuple(row) for row in samples.tolist()}
    assert not torch.equal(centers, samples)
    assert torch.equal(first_centers(samples, 50, seed=3), centers)
    assert not torch.equal(first_centers(samples, 50, seed=4), centers)
    assert len(first_centers(samples, 80, seed=3)) == 80


def test_k_means_begins_a_codebook_and_uses_all_of_it():
    book = EMACodebook(16, 4, 0.9, begins_from_data=True)
    samples = unit_vectors(400, 4)
    book.begin_from(samples, step_of(0))
    assert book.initted.item() == 1
    assert torch.allclose(book.codes.norm(dim=-1), torch.ones(16), atol=1e-6)
    assert nearest_codes(samples, book.codes).unique().numel() == 16


# --- revival ---------------------------------------------------------------------------------------------------------


def test_a_code_that_was_not_used_for_long_becomes_a_vector_of_the_batch():
    book = book_of(RIGHT, LEFT, revive_after=2)
    vectors = torch.tensor([[[0.8, 0.6], [0.8, -0.6]]])
    for done in (1, 2):
        book(vectors)
        book.keep_spares(vectors, step_of(7))
        book.take()
        book.update(step_of(0))
        assert (book.codes[1].tolist() == LEFT) == (done == 1)
    assert book.codes[1].tolist() in vectors[0].tolist()
    assert book.idle_steps.tolist() == [0, 0]


def test_codes_are_never_replaced_unless_asked():
    book = book_of(RIGHT, LEFT)
    for _ in range(5):
        see(book, RIGHT)
    assert book.codes[1].tolist() == LEFT


def test_replacements_do_not_depend_on_how_a_step_is_divided():
    whole, parts = (EMACodebook(8, 4, 0.9, revive_after=1) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    vectors = normalize(whole.codes[:1] + 0.1 * unit_vectors(6, 5, 4), dim=-1)  # one code takes them all
    whole(vectors)
    whole.keep_spares(vectors, step_of(*range(6)))
    for rows in ([4, 5], [0, 1], [2, 3]):
        parts(vectors[rows])
        parts.keep_spares(vectors[rows], step_of(*rows))
    for book in (whole, parts):
        book.take()
        book.update(step_of(0))
        assert len(nearest_codes(vectors.flatten(0, 1), book.codes).unique()) >= 7
    assert torch.equal(parts.codes[1:], whole.codes[1:])


def test_fewer_vectors_than_dead_codes_replace_as_many_as_there_are():
    book = book_of(RIGHT, LEFT, [-0.6, -0.8], [-0.8, -0.6], revive_after=1)
    vectors = torch.tensor([[[0.8, 0.6], UP]])
    book(vectors)
    book.keep_spares(vectors, step_of(0))
    book.take()
    book.update(step_of(0))
    assert sorted(map(tuple, book.codes[1:3].tolist())) == sorted(map(tuple, vectors[0].tolist()))
    assert book.codes[3].tolist() == pytest.approx([-0.8, -0.6])
    assert book.idle_steps.tolist() == [0, 0, 0, 1]


# --- how codes are used ----------------------------------------------------------------------------------------------


def test_usage_and_perplexity_by_hand():
    book = book_of(RIGHT, UP, LEFT, [0.0, -1.0])
    see(book, RIGHT, RIGHT, UP, UP)
    usage, perplexity = book.usage()
    assert usage.item() == 0.5
    assert perplexity.item() == pytest.approx(2.0)
    book.start_window()
    assert book.window.sum() == 0
    assert book.last_window.tolist() == [2, 2, 0, 0]
