"""A run makes those evaluations that are due, from one pass over the images, and tells what it leaves out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny import RECIPE

from mim_framework.base.errors import DataError, RecipeError
from mim_framework.base.section import Section
from mim_framework.builtins.vit import MaskTokenViT
from mim_framework.contract.components import Source
from mim_framework.contract.evaluation import Evaluation
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import Specs
from mim_framework.contract.world import World
from mim_framework.data.views import ImageViews
from mim_framework.evaluate.knn import KNN
from mim_framework.evaluate.splits import Splits
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.evaluations import Evaluations, Planned
from mim_framework.training.trainer import train


class Shades(Source):
    """Ten images of rising brightness, in two classes."""

    name = "shades"

    def __len__(self):
        return 10

    def read(self, index):
        return Sample(Image.new("RGB", (8, 8), (25 * index,) * 3), str(index), index // 5)


class Count(Evaluation):
    """How many images there are, labels or not."""

    name = "count"
    needs = frozenset()

    def __call__(self, subject):
        return {"images": float(len(subject.features("train", labelled=False).x)), "answer": 42.0}


class NoImages(Evaluation):
    """Finds nothing to read."""

    name = "nothing"

    def __call__(self, subject):
        raise DataError("the disk is gone")


class Particular(Count):
    """Refuses every encoder."""

    name = "particular"

    def check(self, encoder):
        raise ValueError(f"width {encoder.dim} is no prime; use encoder.embed_dim=17")


@pytest.fixture
def passes():
    return []


@pytest.fixture
def made(passes):
    """Evaluations of a tiny encoder, whose passes are counted; with what they log and note."""
    views = ImageViews(ImageViews.Config(img_size=8))
    config = MaskTokenViT.Config(patch_size=4, embed_dim=16, depth=1, num_heads=2)
    encoder = MaskTokenViT(config, Specs(views=views.specs))
    encoder.register_forward_hook(lambda module, arguments, latent: passes.append(len(arguments[0])))

    def make(*plan: Planned, labels: bool = True, encoder=encoder, world: World = World()):
        source = Shades(Section())
        both = frozenset({"train", "test"})
        splits = Splits({"train": source, "test": source}, both) if labels else Splits({"train": source}, frozenset())
        evaluations = Evaluations(list(plan), encoder, views, splits, device=torch.device("cpu"), world=world)
        logged, noted = [], []

        def run_due(done: int, *due: float) -> None:
            evaluations.run_due(
                done, lambda every: every in due, log=lambda *line: logged.append(line), note=noted.append
            )

        return run_due, logged, noted

    return make


def planned(cls: type[Evaluation], every_epochs: float = 1.0, batch_size: int = 256) -> Planned:
    config = KNN.Config(k=5) if cls is KNN else cls.Config()  # there are ten images
    return Planned(cls(config), every_epochs, batch_size)


def test_only_what_is_due_is_made(made, passes):
    run_due, logged, _ = made(planned(Count, 1.0), planned(KNN, 2.0))
    run_due(5)
    assert (logged, passes) == ([], [])
    run_due(6, 1.0)
    assert logged == [(6, {"count_images": 10.0, "count_answer": 42.0})]
    run_due(7, 2.0)
    assert [list(numbers) for _, numbers in logged[1:]] == [["knn_top1"]]


def test_evaluations_that_are_due_together_share_one_pass_of_the_smallest_batches(made, passes):
    run_due, logged, noted = made(planned(Count, batch_size=6), planned(KNN, batch_size=100))
    run_due(3, 1.0)
    assert passes == [6, 4, 6, 4]  # ten images to learn from, ten to be tested on
    assert [name for _, numbers in logged for name in numbers] == ["count_images", "count_answer", "knn_top1"]
    assert noted[0] == "step 3: count images 10, answer 42"
    run_due(4, 1.0)  # the encoder has learned meanwhile
    assert passes == [6, 4, 6, 4] * 2


def test_what_needs_labels_is_left_out_without_them_and_told_once(made):
    run_due, logged, noted = made(planned(KNN), planned(Count), labels=False)
    run_due(1, 1.0)
    run_due(2, 1.0)
    assert [step for step, _ in logged] == [1, 2]
    assert [text for text in noted if "left out" in text] == [
        "evaluation 'knn' is left out: it needs labelled images to learn from, source 'shades' has none. In a recipe, "
        "data.source.labels=true and data.eval_source={type: folder, root: FOLDER, labels: true} give them; `mim eval` "
        "takes them by --train SOURCE --test SOURCE too"
    ]


def test_without_an_encoder_nothing_is_measured_and_that_is_told(made):
    run_due, logged, noted = made(planned(Count), encoder=None)
    run_due(1, 1.0)
    assert (logged, noted) == ([], ["evaluation 'count' is left out: the objective has no part `encoder`"])


def test_images_that_cannot_be_read_cost_an_evaluation_and_not_the_run(made):
    run_due, logged, noted = made(planned(NoImages), planned(Count))
    run_due(9, 1.0)
    assert [step for step, _ in logged] == [9]
    assert noted[0] == "step 9: no nothing: the disk is gone"


@pytest.mark.parametrize("layers", ["last", "each"])
def test_two_ranks_log_the_numbers_of_one_and_share_the_passes(made, passes, layers):
    """Ten images: with batches of 3, rank 0 and rank 1 make two passes for each split."""
    count = Planned(Count(Section()), 1.0, 3, "last")
    knn = Planned(KNN(KNN.Config(k=3)), 1.0, 3, layers)

    def numbers(world: World) -> tuple[list, list, list[int]]:
        passes.clear()
        run_due, logged, noted = made(count, knn, world=world)
        run_due(4, 1.0)
        return logged, noted, list(passes)

    alone = numbers(World())
    ranks = run_ranks(lambda rank: numbers(World(rank, 2, rank)))
    assert [name for _, line in alone[0] for name in line if name.startswith("knn")] == [
        "knn_top1" if layers == "last" else "knn_layer0_top1"
    ]
    assert [each[:2] for each in ranks] == [alone[:2]] * 2
    assert sum(alone[2]) == sum(ranks[0][2]) + sum(ranks[1][2]) > 0


# --- in a recipe -----------------------------------------------------------------------------------------------------


def write(folder: Path, evaluate: list) -> Path:
    (folder / "r.yaml").write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder), "evaluate": evaluate}))
    return folder / "r.yaml"


def test_every_evaluation_is_made_at_the_end_of_a_run(tmp_path):
    registry = RegistryWith(Count)
    evaluate = [{"type": "knn", "every_epochs": 0, "max_train": 40, "max_test": 20}, "count"]
    run_dir = train(load_recipe(write(tmp_path, evaluate), [], registry), registry)
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" not in line]
    assert [sorted(line.keys() - {"step", "time"}) for line in lines] == [
        ["knn_top1", "knn_top5"],
        ["count_answer", "count_images"],
    ]
    assert {line["step"] for line in lines} == {2}
    assert lines[1]["count_images"] == 1438


def test_an_encoder_that_an_evaluation_refuses_is_told_with_the_line_before_data_is_read(tmp_path, monkeypatch):
    registry = RegistryWith(Particular)
    recipe = load_recipe(write(tmp_path, ["particular"]), [], registry)
    source = registry.find("source", "digits")
    monkeypatch.setattr(source, "read", lambda self, index: pytest.fail("data was read"))
    text = r"r\.yaml:\d+:\d+: evaluate\.0: particular: width 16 is no prime; use encoder\.embed_dim=17"
    with pytest.raises(RecipeError, match=text):
        train(recipe, registry)


def test_a_run_of_an_earlier_version_goes_on(tmp_path, caplog):
    file = write(tmp_path, [])
    run_dir = train(load_recipe(file, [], Registry()), Registry())
    written = run_dir / "recipe.yaml"
    written.write_text(re.sub(r"^evaluate: \[\]$", "evaluate:\n  knn: null", written.read_text(), flags=re.MULTILINE))
    assert "knn: null" in written.read_text()
    train(load_recipe(file, [], Registry()), Registry())
    assert "was written by an earlier version; it now reads evaluate: []" in caplog.text
    assert "evaluate: []" in written.read_text()
