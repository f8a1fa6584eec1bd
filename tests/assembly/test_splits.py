"""Which images encoders are judged by: those that a source keeps aside, or others, with classes matched by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import RECIPE

from mim_framework.assembly.builder import build_source
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.evaluate.knn import KNN
from mim_framework.evaluate.splits import Splits
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

pytest.importorskip("sklearn")
REGISTRY = Registry()


def folder(root: Path, *names: str) -> str:
    """Images below a folder that is a labelled source, as a recipe writes it."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return json.dumps({"type": "folder", "root": str(root), "labels": True})


@pytest.fixture
def splits(tmp_path) -> Callable[..., Splits]:
    def of(*overrides: str) -> Splits:
        (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
        recipe = load_recipe(tmp_path / "r.yaml", overrides, REGISTRY)
        return evaluation_splits(recipe, REGISTRY, build_source(recipe, REGISTRY))

    return of


def labels(source: Source) -> list[int | None]:
    return [source.read(index).label for index in range(len(source))]


def test_a_source_that_keeps_images_aside_is_judged_by_them(splits):
    found = splits()
    assert {split: len(source) for split, source in found.sources.items()} == {"train": 1438, "test": 359}
    assert found.labelled == {"train", "test"}


def test_a_folder_learns_from_itself_and_is_tested_on_another(splits, tmp_path):
    train = folder(tmp_path / "a", "cat/1.png", "cat/2.png", "dog/1.png")
    found = splits(f"data.source={train}", f"data.eval_source={folder(tmp_path / 'b', 'cat/9.png', 'dog/9.png')}")
    assert {split: labels(source) for split, source in found.sources.items()} == {"train": [0, 0, 1], "test": [0, 1]}


def test_a_run_without_labels_is_judged_by_two_other_sources(splits, tmp_path):
    train, test = folder(tmp_path / "a", "cat/1.png", "dog/1.png"), folder(tmp_path / "b", "dog/9.png", "cat/9.png")
    unlabelled = f"data.source={{type: folder, root: {tmp_path}}}"
    found = splits(unlabelled, f"data.eval_train_source={train}", f"data.eval_source={test}")
    assert found.lacks(KNN(KNN.Config())) == ""
    assert {split: len(source) for split, source in found.sources.items()} == {"train": 2, "test": 2}


@pytest.mark.parametrize("key", ["data.eval_source", "data.eval_train_source"])
def test_another_source_that_divides_itself_gives_both_splits(splits, tmp_path, key):
    folder(tmp_path / "a", "1.png")
    found = splits(f"data.source={{type: folder, root: {tmp_path}/a}}", f"{key}=digits")
    assert {split: len(source) for split, source in found.sources.items()} == {"train": 1438, "test": 359}


def test_each_of_two_sources_that_divide_themselves_gives_its_part_and_another_choice_is_told(splits, caplog):
    found = splits("data.eval_train_source=digits", "data.eval_source=digits")
    assert {split: len(source) for split, source in found.sources.items()} == {"train": 1438, "test": 359}
    assert splits("data.eval_source={type: digits, split: test}").sources["test"].config.split == "test"
    assert caplog.messages == []
    splits("data.eval_source={type: digits, split: all}")
    assert caplog.messages == [
        "data.eval_source: source 'digits' divides itself; the part to be tested on is taken, not split='all'"
    ]


def test_classes_are_matched_by_name_and_those_without_a_test_image_are_told(splits, tmp_path, caplog):
    train = folder(tmp_path / "a", "cat/1.png", "cow/1.png", "dog/1.png")
    test = folder(tmp_path / "b", "cow/9.png", "dog/8.png", "dog/9.png")
    found = splits(f"data.source={train}", f"data.eval_source={test}").sources["test"]
    assert (found.classes, labels(found)) == (["cat", "cow", "dog"], [1, 2, 2])
    assert [each.label for each in found.read_many([2, 0])] == [2, 1]
    assert found.identity() == found.inner.identity()
    assert caplog.messages == ["evaluation: there are no test images of 1 classes: 'cat'"]


def test_classes_that_only_the_test_images_have_are_named(splits, tmp_path):
    train, test = folder(tmp_path / "a", "cat/1.png"), folder(tmp_path / "b", "cat/1.png", "cow/1.png", "dog/1.png")
    with pytest.raises(DataError) as error:
        splits(f"data.source={train}", f"data.eval_source={test}")
    assert str(error.value) == (
        "the images to be tested on have 2 classes 'cow', 'dog', which those to learn from lack; they have 'cat': name "
        "the classes alike, or leave them out"
    )


def test_a_source_that_cannot_be_read_is_told_by_its_own_key(splits, tmp_path):
    for key in ("data.eval_source", "data.eval_train_source"):
        with pytest.raises(DataError, match=rf"^{key}\.root: '.*gone' does not exist"):
            splits(f"{key}={{type: folder, root: {tmp_path}/gone}}")


class Plain(Source):
    name = "plain"

    def __init__(self, *classes: str) -> None:
        super().__init__(Section())
        self.classes = classes or None

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Sample:
        return Sample(b"", "0", 0)


@pytest.mark.parametrize(
    ("splits_", "text"),
    [
        (
            Splits.of(Plain()),
            "it needs labelled images to learn from, source 'plain' has",
        ),
        (Splits.of(Plain("a", "b")), "it needs labelled images to be tested on, source 'plain' keeps none aside. In"),
        (Splits.of_pair(Plain(), Plain("a", "b")), "it needs labelled images to learn from, source 'plain' has"),
        (
            Splits.of_pair(Plain("a", "b"), Plain()),
            "it needs labelled images to be tested on, source 'plain' has",
        ),
        (
            Splits.of_pair(Plain("a"), Plain("a")),
            "it needs images of two classes at least, source 'plain' has one, ",
        ),
        (Splits.of_pair(Plain("a", "b"), Plain("a", "b")), ""),
    ],
)
def test_what_an_evaluation_lacks_is_one_sentence_with_the_cure(splits_, text):
    assert splits_.lacks(KNN(KNN.Config())).startswith(text)
    assert bool(splits_.lacks(KNN(KNN.Config()))) == bool(text)
