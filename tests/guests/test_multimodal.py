"""Masked autoencoding of an image and its edges as a guest: one encoder joins two views, each has a head."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mim_framework import Grid, Mask, Masked, RecipeError, Sample
from mim_framework.assembly.builder import Model, build_model
from mim_framework.assembly.cost import measure_cost
from mim_framework.assembly.preflight import make_step
from mim_framework.commands.evaluate import evaluate
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.testing import ComponentContract, RecipeContract
from mim_framework.testing.runs import SHORT, encoded
from mim_framework.training.trainer import Trainer, train

QUICKSTART = "multimodal_quickstart"
SMALL_DECODER = "{type: cross, embed_dim: 16, num_heads: 2}"
TINY = [
    "encoder.embed_dim=16", "encoder.depth=1", "encoder.num_heads=2",
    f"heads.x.decoder={SMALL_DECODER}", f"heads.edges.decoder={SMALL_DECODER}",
    *SHORT,
]  # fmt: skip
GRID = Grid((4, 4))
ALL, NONE = range(16), range(0)


@pytest.fixture(scope="module", autouse=True)
def multimodal(install_guest: Callable[[str], Path]) -> ModuleType:
    site = install_guest("mim-plugin-guest-multimodal")
    module = importlib.import_module("mim_plugin_guest_multimodal")
    assert module.__file__.startswith(str(site))
    return module


class TestComponents(ComponentContract):
    plugin = "guest_multimodal"


@pytest.mark.slow
class TestRecipes(RecipeContract):
    plugin = "guest_multimodal"
    recipes = (QUICKSTART,)


def recipe_of(*overrides: str) -> Any:
    return load_recipe(QUICKSTART, [*TINY, *overrides], Registry())


def built(*overrides: str) -> Model:
    return build_model(recipe_of(*overrides), Registry())


def hiding(positions: Any, batch_size: int) -> Mask:
    """The same positions of every sample hidden."""
    hidden = torch.zeros(batch_size, 16, dtype=torch.bool)
    hidden[:, list(positions)] = True
    return Mask(hidden, GRID, equal=True)


def noise_of(model: Model, batch_size: int = 2) -> dict[str, Tensor]:
    return model.views.prepare(None, model.views.example(batch_size))


def changed(view: Tensor, positions: Any) -> Tensor:
    """The view with other pixels in patches of 4x4, at the given positions."""
    view = view.clone()
    for position in positions:
        row, column = 4 * (position // 4), 4 * (position % 4)
        view[..., row : row + 4, column : column + 4] += 1
    return view


# --- two views -------------------------------------------------------------------------------------------------------


def test_edges_are_where_neighbours_differ(multimodal):
    image = torch.zeros(3, 3, 3, dtype=torch.uint8)
    image[:, 1, 1] = 100
    # Half of what a pixel differs from its right and its lower neighbour together; the last ones have none.
    assert multimodal.edges_of(image)[0].tolist() == [[0, 50, 0], [50, 100, 0], [0, 0, 0]]
    assert not multimodal.edges_of(torch.full((3, 4, 4), 200, dtype=torch.uint8)).any()


def test_both_views_show_the_same_crop(multimodal):
    views = multimodal.ImageAndEdges(multimodal.ImageAndEdges.Config(img_size=16))
    pixels = torch.randint(0, 256, (20, 30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sample = Sample(pixels.numpy(), "noise")
    for made in (views(sample, torch.rand(views.num_random)), views.evaluation_view(sample)):
        assert {name: tuple(view.shape) for name, view in made.items()} == {"x": (3, 16, 16), "edges": (1, 16, 16)}
        assert torch.equal(made["edges"], multimodal.edges_of(made["x"]))
        prepared = views.prepare(None, {name: view[None] for name, view in made.items()})
        assert torch.equal(prepared["edges"], made["edges"][None].float() / 255)


def test_each_view_is_hidden_by_draws_of_its_own():
    model = built()
    masked = model.objective.masker(make_step(model.recipe, torch.arange(8)), noise_of(model, 8))
    image, edges = masked.masks["x"], masked.masks["edges"]
    assert (image.num_hidden, edges.num_hidden) == (10, 10)  # 0.6 of 16, visible ones rounded down to 6
    assert not torch.equal(image.hidden, edges.hidden)


# --- one sequence ----------------------------------------------------------------------------------------------------


def test_the_visible_patches_of_both_views_are_one_sequence():
    model = built()
    views, encoder = noise_of(model), model.objective.encoder.eval()
    masks = {"x": hiding(range(12), 2), "edges": hiding(range(1, 16), 2)}
    latent = encoded(encoder, views, masks)
    assert latent.tokens.shape == (2, 4 + 1, 16)
    assert latent.of("x").ids.tolist() == [[12, 13, 14, 15]] * 2
    assert latent.of("edges").ids.tolist() == [[0]] * 2
    assert torch.equal(latent.of("edges").tokens, latent.tokens[:, 4:])
    assert torch.equal(latent.of("edges").layers[0][:, 1:], latent.layers[0][:, 5:])


def test_a_token_knows_the_visible_patches_of_the_other_view_and_no_hidden_one():
    model = built()
    views, encoder = noise_of(model), model.objective.encoder.eval()
    masks = {"x": hiding(range(8), 2), "edges": hiding(range(8, 16), 2)}

    def image_tokens(**other: Tensor) -> Tensor:
        return encoder({**views, **other}, masks).of("x").tokens

    tokens = image_tokens()
    assert torch.equal(image_tokens(edges=changed(views["edges"], range(8, 16))), tokens)
    assert torch.equal(image_tokens(x=changed(views["x"], range(8))), tokens)
    assert not torch.allclose(image_tokens(edges=changed(views["edges"], [0])), tokens, atol=1e-4)


def test_heads_are_of_their_views():
    model = built()
    views = noise_of(model)
    masks = {"x": hiding(range(12), 2), "edges": hiding([3], 2)}
    latent = model.objective.encode(Masked(masks, views))
    heads = model.objective.heads
    preds = {name: head.decoder(latent.of(head.view), masks[head.view]) for name, head in heads.items()}
    assert preds["x"].values.shape == (2, 12, 4 * 4 * 3)
    assert preds["edges"].values.shape == (2, 1, 4 * 4 * 1)
    assert preds["edges"].ids.tolist() == [[3], [3]]


def test_a_masker_must_mask_all_views_that_are_joined():
    with pytest.raises(RecipeError, match="the encoder joins x, edges, the masker masks x"):
        built("masker.views=[x]")


def test_the_cost_counts_the_positions_of_both_views():
    cost = measure_cost(recipe_of(), Registry())
    assert (cost.positions, cost.tokens) == (32, 12)


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart as it is."""
    folder = tmp_path_factory.mktemp("learned")
    return train(load_recipe(QUICKSTART, [f"output_dir={folder}", "evaluate=[]"], Registry()), Registry())


@pytest.mark.slow
def test_a_hidden_view_is_predicted_from_the_other_one(learned):
    from mim_framework.assembly.opened import load_run
    from mim_framework.data.sources.digits import DigitsSource

    run = load_run(learned)
    source = DigitsSource(DigitsSource.Config(split="test"))
    made = [run.views.evaluation_view(source.read(index)) for index in range(64)]
    views = run.views.prepare(None, {name: torch.stack([each[name] for each in made]) for name in made[0]})
    objective = run.objective.eval()

    @torch.no_grad()
    def loss(hidden_view: str, other_hidden: range, **replaced: Tensor) -> float:
        """Of one view, all of which is hidden, beside the other one."""
        masks = {name: hiding(ALL if name == hidden_view else other_hidden, 64) for name in ("x", "edges")}
        masked = Masked(masks, views)
        head = objective.heads[hidden_view]
        target = head.target(make_step(run.recipe, torch.arange(64)), masked)
        latent = objective.encode(Masked(masks, {**views, **replaced}))
        return float(head.measure(masked, latent, target).loss)

    for hidden_view, other in (("x", "edges"), ("edges", "x")):
        beside_the_other = loss(hidden_view, NONE)
        beside_that_of_another_digit = loss(hidden_view, NONE, **{other: views[other].roll(1, 0)})
        assert beside_the_other < 0.97 * beside_that_of_another_digit
        assert beside_the_other < 0.97 * loss(hidden_view, ALL)


@pytest.mark.slow
def test_a_digit_is_known_better_after_training_than_before(learned):
    [judged] = evaluate(["knn"], [learned])
    assert judged.numbers["trained"]["knn_top1"] > judged.numbers["untrained"]["knn_top1"] + 0.05


def test_it_trains_by_the_default_objective(tmp_path):
    with Trainer.opened(recipe_of(f"output_dir={tmp_path}"), Registry()) as trainer:
        batch = next(iter(trainer.loader))
        outcome = trainer.train_step(0, [batch])
    assert trainer.objective.name == "masked_prediction"
    assert {"loss", "loss/x", "loss/edges"} <= outcome.losses.keys()
