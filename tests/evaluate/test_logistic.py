"""Logistic regression is scikit-learn's, and its penalty is chosen on rows that it has not seen."""

from __future__ import annotations

import pytest
import torch
from blobs import blobs
from torch.nn.functional import cross_entropy

from mim_framework.evaluate.logistic import C_GRID, choose_and_fit, fit, in_its_rank


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_weights_are_those_of_scikit_learn(c: float):
    sklearn = pytest.importorskip("sklearn.linear_model")
    data = blobs(20, spread=0.6)
    ours = fit(data.x, data.y, c=c, num_classes=3)
    theirs = sklearn.LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(data.x.double().numpy(), data.y.numpy())
    assert torch.allclose(ours.weight, torch.from_numpy(theirs.coef_), atol=2e-4 * abs(theirs.coef_).max())
    bias = ours.bias - ours.bias.mean()  # one bias more on every class changes no score
    intercept = torch.from_numpy(theirs.intercept_)
    assert torch.allclose(bias, intercept - intercept.mean(), atol=1e-3 * (1 + abs(theirs.intercept_).max()))


def test_the_gradient_vanishes_at_the_end():
    data, c = blobs(20, spread=0.6), 0.5
    found = fit(data.x, data.y, c=c, num_classes=3)
    weight, bias = found.weight.requires_grad_(), found.bias.requires_grad_()
    loss = cross_entropy(data.x.double() @ weight.t() + bias, data.y) + weight.square().sum() / (2 * c * len(data.x))
    assert all(each.abs().max() < 1e-6 for each in torch.autograd.grad(loss, [weight, bias]))


def test_the_grid_has_45_values_from_a_millionth_to_a_hundred_thousand():
    assert len(C_GRID) == 45
    assert (C_GRID[0], C_GRID[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))


def test_a_penalty_that_fits_noise_is_not_chosen():
    """Half of the labels are wrong: only a strong penalty is right about rows that it has not seen."""
    data = blobs(60, num_classes=2, dim=40, spread=1.0)
    generator = torch.Generator().manual_seed(1)
    y = torch.where(torch.rand(len(data.y), generator=generator) < 0.4, 1 - data.y, data.y)
    held_out = torch.arange(len(y)) % 3 == 0
    classifier, c = choose_and_fit(data.x, y, held_out=held_out, num_classes=2, grid=(1e-3, 1e3))
    by_c = {each: fit(data.x[~held_out], y[~held_out], c=each, num_classes=2) for each in (1e-3, 1e3)}
    right = {each: int((found(data.x[held_out]).argmax(1) == y[held_out]).sum()) for each, found in by_c.items()}
    assert right[c] == max(right.values())
    whole = fit(data.x, y, c=c, num_classes=2)
    assert torch.allclose(classifier.weight, whole.weight, atol=1e-6)


def test_of_equal_penalties_the_strongest_is_chosen():
    data = blobs(20, spread=0.01)
    _, c = choose_and_fit(data.x, data.y, held_out=torch.arange(60) < 6, num_classes=3, grid=(10.0, 1.0, 100.0))
    assert c == 1.0


def test_a_search_among_the_directions_that_images_span_ends_where_the_whole_one_does():
    generator = torch.Generator().manual_seed(0)
    few, y = torch.randn(40, 3, generator=generator), torch.arange(40) % 3
    wide = few @ torch.randn(3, 50, generator=generator)
    coordinates, basis = in_its_rank(wide)
    assert (coordinates.shape, basis.shape) == ((40, 3), (50, 3))
    torch.testing.assert_close(coordinates @ basis.t(), wide.double(), atol=1e-5, rtol=1e-5)  # float32 was rounded
    found, c = choose_and_fit(wide, y, held_out=torch.arange(40) < 4, num_classes=3, grid=(0.1,))
    whole = fit(wide, y, c=c, num_classes=3)
    torch.testing.assert_close(found.weight, whole.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias, whole.bias, atol=1e-5, rtol=1e-4)
    assert in_its_rank(torch.zeros(4, 5))[0].shape == (4, 1)
