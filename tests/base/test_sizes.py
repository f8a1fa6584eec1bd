"""Numbers with a digit too many are errors, not machines without memory."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from mim_framework.assembly import cost
from mim_framework.assembly.builder import build_model
from mim_framework.base.errors import RecipeError
from mim_framework.base.section import Choice
from mim_framework.base.sizes import oversized
from mim_framework.contract.mask import Grid
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"encoder": {"depth": 10**9}}, "encoder.depth"),
        ({"encoder": {"depths": [2, 2000, 2]}}, "encoder.depths.1"),
        ({"views": {"img_size": 100_000}}, "views.img_size"),
        ({"views": {"img_size": [32, 100_000]}}, "views.img_size.1"),
        ({"decoder": {"decoder_embed_dim": 10**7}}, "decoder.decoder_embed_dim"),
        ({"encoder": {"mlp_ratio": 1e9}}, "encoder.mlp_ratio"),
        ({"anything": 10**13}, "anything"),
    ],
)
def test_a_number_is_bounded_by_the_last_word_of_its_key(data: dict[str, Any], key: str) -> None:
    (problem,) = oversized(data)
    assert str(problem).startswith(f"{key}: must be at most ")


def test_sizes_of_published_models_and_seeds_are_not_bounded() -> None:
    models = {"depth": 48, "embed_dim": 6144, "num_heads": 48, "img_size": 1536, "vocab_size": 8192, "mlp_ratio": 8}
    assert oversized({**models, "seed": 2**62, "train": {"total_batch_size": 65_536, "epochs": 1600.0}}) == []


def test_a_shipped_recipe_with_a_digit_too_many_is_refused_with_its_place() -> None:
    with pytest.raises(RecipeError, match="encoder.depth: must be at most 256, got 1000000000"):
        load_recipe("quickstart", ["encoder.depth=1000000000"])
    with pytest.raises(RecipeError, match=r"encoder 'mae_vit': depth: must be at most 256, got 100000"):
        Registry().resolve("encoder", Choice.model_validate({"type": "mae_vit", "depth": 100_000}))


def test_a_grid_that_no_device_could_attend_to_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid of 1024x1024 has 1,048,576 positions, at most 262,144"):
        Grid((1024, 1024))


def test_a_model_that_does_not_fit_the_machine_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(Recipe.model_validate(tiny.RECIPE), Registry())
    cost.refuse_too_large(model)
    monkeypatch.setattr(cost, "machine_memory", lambda: 1000)
    with pytest.raises(RecipeError, match="this model's weights would need 0 GiB, this machine has 0 GiB"):
        cost.refuse_too_large(model)
    monkeypatch.undo()
    monkeypatch.setattr(cost, "MAX_MODULES", 3)
    with pytest.raises(RecipeError, match="modules, at most 3 are allowed"):
        cost.refuse_too_large(model)
