"""Labels travel beside the views where a recipe asks for them, or it is told why they cannot."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from tiny import RECIPE

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step, preflight
from mim_framework.base.errors import BrokenImage, DataError, RecipeError
from mim_framework.base.section import Choice
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.contract.world import World
from mim_framework.data.labels import Labels
from mim_framework.data.loader import DataSection, Loader
from mim_framework.data.order import BatchLayout, SampleOrder
from mim_framework.data.views import ImageViews
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train


class Colours(Source):
    """Sample i is a picture of the colour i and the class i % 3; some are broken, some without a label."""

    name = "colours"

    class Config(Source.Config):
        broken: tuple[int, ...] = ()
        """Samples that cannot be read."""
        unlabelled: tuple[int, ...] = ()
        """Samples without a label."""
        classes: tuple[str, ...] | None = ("a", "b", "c")
        """Names of the classes."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.classes = config.classes

    def __len__(self) -> int:
        return 12

    def read(self, index: int) -> Sample:
        if index in self.config.broken:
            raise BrokenImage(str(index), "truncated", "half of it is missing")
        label = None if index in self.config.unlabelled else index % 3
        return Sample(np.full((8, 8, 3), index, np.uint8), f"{index}.png", label)


CLASSIFY = {
    **RECIPE, "data": {"source": "colours", "workers": 0}, "masker": "none", "target": "labels", "decoder": "pooled",
    "loss": "cross_entropy", "encoder": {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
}  # fmt: skip
REGISTRY = RegistryWith(Colours)


def colours(**options) -> Colours:
    return Colours(Colours.Config(**options))


def recipe(**changes) -> Recipe:
    return Recipe.model_validate({**CLASSIFY, **changes})


def source(**options) -> dict:
    return {"data": {"source": {"type": "colours", **options}, "workers": 0}}


def loader_of(source: Source, workers: int = 0, batch_size: int = 4, **views) -> Loader:
    return Loader(
        DataSection(source=Choice(type="colours"), workers=workers, max_broken=1), source,
        ImageViews(ImageViews.Config(img_size=8, **views)), seed=0, layout=BatchLayout(batch_size, batch_size),
        start_step=0, total_steps=6, device=torch.device("cpu"), companions=(Labels(3),),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_holds_the_label_of_each_image_also_of_a_replacement(workers: int):
    batches = list(loader_of(colours(broken=(2, 7)), workers))
    for batch in batches:
        assert batch.views["label"].tolist() == [int(image[0, 0, 0]) % 3 for image in batch.views["x"]]
    order = SampleOrder(0, 12).indices(range(24))
    labels = torch.cat([batch.views["label"] for batch in batches]).tolist()
    assert [label for label, index in zip(labels, order, strict=True) if index not in (2, 7)] == [
        index % 3 for index in order if index not in (2, 7)
    ]


def test_labels_travel_only_where_a_part_of_the_recipe_asks_for_them():
    assert [each.spec.name for each in build_model(recipe(), REGISTRY).companions] == ["label"]
    plain = Recipe.model_validate({**RECIPE, "data": source()["data"]})
    assert build_model(plain, REGISTRY).companions == ()
    mixed = Recipe.model_validate({**RECIPE, **source(), "views": {"type": "image", "img_size": 16, "mixup": 0.8}})
    assert build_model(mixed, REGISTRY).specs.view("label").shape == (3,)


def test_the_target_is_a_class_or_the_probabilities_of_mixed_classes():
    hard = build_model(recipe(), REGISTRY)
    spec = hard.objective.heads["main"].target.spec
    assert (spec.kind, spec.dim, spec.grid.shape, spec.grid.num_patches) == ("ids", 3, (), 1)
    views = {"type": "image", "img_size": 16, "mixup": 0.8, "label_smoothing": 0.1}
    soft = build_model(recipe(views=views), REGISTRY)
    assert soft.objective.heads["main"].target.spec.kind == "probs"
    for model in (hard, soft):
        assert preflight(model, torch.device("cpu"))["main"] == pytest.approx(np.log(3), abs=0.2)


def test_the_loss_is_the_cross_entropy_of_each_image():
    """Also against soft labels, and whatever is hidden of an image."""
    for options in ({"masker": "none"}, {"masker": {"type": "random", "mask_ratio": 0.5}}):
        model = build_model(recipe(views={"type": "image", "img_size": 16, "mixup": 1.0}, **options), REGISTRY)
        step = make_step(model.recipe, torch.arange(4))
        views = model.prepare(step, model.example(4))
        head = model.objective.heads["main"]
        masked = model.objective.masker(step, views)
        pred = head.decoder(model.objective.encode(masked), masked.masks["x"])
        by_hand = -(views["label"] * pred.values[:, 0].log_softmax(-1)).sum(-1).mean()
        assert model.objective(step, views).losses["main"].item() == pytest.approx(by_hand.item(), rel=1e-6)


# --- what cannot be is said ------------------------------------------------------------------------------------------


def test_a_source_without_labels_is_refused_before_the_model_is_built():
    with pytest.raises(DataError, match=r"data.source 'colours' gives no labels, .* data.source.labels=true"):
        build_model(recipe(**source(classes=None)), REGISTRY)


def test_a_first_sample_without_a_label_is_refused_before_the_first_step(tmp_path):
    """The broken one before it does not count."""
    options = source(broken=[0], unlabelled=[1])
    with pytest.raises(DataError, match=r"sample '1.png' has no label, .* without target 'labels'"):
        train(recipe(output_dir=str(tmp_path), **options), REGISTRY)
    Labels(3).check(colours(unlabelled=(5,)), World())


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_sample_without_a_label_stops_the_run_by_name(workers: int):
    with pytest.raises(DataError, match=r"^data.source: sample '5.png' has no label"):
        list(loader_of(colours(unlabelled=(5,)), workers))
    assert multiprocessing.active_children() == []


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(DataError, match=r"sample '2.png' has label 2, the source has 2 classes, numbered from 0"):
        Labels(2)(colours().read(2), 2, 0)


def test_pairs_need_an_even_micro_batch():
    with pytest.raises(DataError, match=r"train.batch_size: 5 images .* no multiple of 2, as views 'image' .* use 6"):
        loader_of(colours(), batch_size=5, mixup=0.8)
    assert len(list(loader_of(colours(), batch_size=5))) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"type": "labels", "num_classes": 5}}, r"data.source has 3 classes, num_classes says 5"),
        ({"decoder": "linear"}, r"decoder 'linear': target grid of whole images, encoder grid 4x4"),
        ({"target": "pixels", "loss": "mse"}, r"decoder 'pooled' predicts whole images, the target lives on grid 4x4"),
        ({"loss": "mse"}, r"loss 'mse' takes dense targets, target 'labels' gives ids"),
        ({"views": {"type": "beit", "img_size": 16, "second_size": 8, "mixup": 0.8}},
         r"views: beit: mixup, cutmix and label_smoothing are for .* there is tokenizer beside it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_labels_is_refused(changes: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        build_model(recipe(**changes), REGISTRY)


def test_the_class_token_is_pooled_where_there_is_one():
    model = build_model(recipe(decoder={"type": "pooled", "pool": "cls"}), REGISTRY)
    assert preflight(model, torch.device("cpu"))["main"] == pytest.approx(np.log(3), abs=0.2)
    swin = {
        "type": "simmim_swin",
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    }
    with pytest.raises(RecipeError, match=r"pool=cls, but the encoder has no class token; use pool=mean"):
        build_model(recipe(encoder={**swin, "window_size": 4}, decoder={"type": "pooled", "pool": "cls"}), REGISTRY)


def test_a_model_can_be_built_without_its_data_if_the_recipe_says_how_many_classes(tmp_path):
    gone = {"source": {"type": "folder", "root": str(tmp_path / "gone"), "labels": True}}
    with pytest.raises(RecipeError, match=r"data.source is not there to tell its classes; give target.num_classes"):
        build_model(recipe(data=gone), Registry())
    views = {"type": "image", "img_size": 16, "cutmix": 1.0}
    model = build_model(recipe(data=gone, views=views, target={"type": "labels", "num_classes": 7}), Registry())
    assert model.objective.heads["main"].decoder.head.out_features == 7


def test_stored_ids_of_unmixed_images_are_refused_beside_mixing(tmp_path):
    views = {"type": "image", "img_size": 16, "mixup": 0.8}
    data = {**source()["data"], "tokens": str(tmp_path), "views_per_image": 1}
    with pytest.raises(
        RecipeError, match=r"data.tokens: views 'image' mix or erase images, the ids are those of whole ones"
    ):
        build_model(recipe(views=views, data=data), REGISTRY)
