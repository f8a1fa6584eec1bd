"""What `health` measures of a run on plain colours, where every number is known, and of a run that trains."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny import RECIPE
from torch import Tensor

from mim_framework.assembly.opened import load_run
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base.errors import DataError
from mim_framework.commands.cli import main
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Pred
from mim_framework.contract.specs import TargetSpec
from mim_framework.contract.world import World
from mim_framework.evaluate.base import EncoderSubject
from mim_framework.evaluate.health.evaluation import Health, fitted, gradient_norms
from mim_framework.evaluate.health.loss import Constant
from mim_framework.evaluate.health.pictures import attention_map, token_colours
from mim_framework.evaluate.health.report import MEANINGS
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import run_ranks
from mim_framework.training.evaluations import in_short
from mim_framework.training.trainer import train

CPU = torch.device("cpu")
TRAINED_ON, KEPT_ASIDE = (100, 150, 200), (120, 160)
"""Shades of each of the three colours."""


def health(subject, **options) -> dict[str, float]:
    return Health(Health.Config(**{"lidar_images": 4, "lidar_views": 3, **options}))(subject)


def subject_of(run, **options) -> EncoderSubject:
    options = {"method": run.method(), "batch_size": 4, **options}
    splits = evaluation_splits(run.recipe, Registry(), run.source)
    return EncoderSubject(run.objective.encoder, run.views, splits, device=CPU, **options)


@pytest.fixture
def run(make_run, registry):
    return load_run(make_run(), registry=registry)


@pytest.fixture
def subject(run):
    return subject_of(run)


# --- numbers by hand -------------------------------------------------------------------------------------------------


def error(shade: int, prediction: tuple[float, float, float]) -> float:
    """Mean squared error of a colour of this shade, whose first channel is the one that is lit."""
    pixel = (shade / 255, 0.0, 0.0)
    return sum((a - b) ** 2 for a, b in zip(pixel, prediction, strict=True)) / 3


def test_the_loss_is_that_of_images_kept_aside_beside_the_mean_patch_of_training(subject):
    numbers = health(subject)
    white = sum(error(shade, (1, 1, 1)) for shade in KEPT_ASIDE) / 2
    assert numbers["loss"] == pytest.approx(white, rel=1e-6)
    mean = sum(TRAINED_ON) / 3 / 255 / 3  # each channel is lit in a third of the images
    assert numbers["trivial_loss"] == pytest.approx(
        sum(error(shade, (mean,) * 3) for shade in KEPT_ASIDE) / 2, rel=1e-5
    )
    mean_square = sum((shade / 255) ** 2 for shade in TRAINED_ON) / 3 / 3
    assert numbers["target_spread"] == pytest.approx(1 - mean**2 / mean_square, rel=1e-5)
    assert numbers["position_loss"] >= 0.9 * numbers["trivial_loss"]  # positions tell nothing of plain colours


def test_features_of_colours_have_as_many_directions_as_there_are_colours(subject):
    numbers = health(subject)
    assert numbers["images"] == 6
    assert 2 < numbers["rankme"] < 3.1
    assert numbers["effective_rank"] == pytest.approx(2, abs=0.3)  # without their mean
    assert numbers["token_variance_within"] == pytest.approx(0, abs=1e-9)
    assert numbers["token_content"] == pytest.approx(1)
    assert numbers["alignment"] == pytest.approx(0, abs=1e-9)  # every crop of a colour is that colour
    assert "typical_weight" not in numbers  # the encoder has no matrix


def test_what_cannot_be_measured_is_left_out_and_said_once(subject, caplog):
    evaluation = Health(Health.Config(lidar_images=0))
    for _ in range(2):
        numbers = evaluation(subject)
    assert not {"lidar", "alpha"} & numbers.keys()
    assert not any(name.startswith(("attention_entropy", "norms_at_start")) for name in numbers)
    said = [record.message for record in caplog.records]
    assert said == [
        "evaluation 'health' leaves out alpha: fewer than 5 eigenvalues from rank 11 on",
        "evaluation 'health' leaves out attention_entropy: the encoder does not hand out its attention",
        "evaluation 'health' leaves out norms_at_start/encoder: it has no normalisation layer with scales",
    ]


def test_without_the_method_only_features_are_judged(run, caplog):
    numbers = health(subject_of(run, method=None))
    assert not {"loss", "trivial_loss", "grad_norm_spikes"} & numbers.keys()
    assert "leaves out loss: only the encoder is here; `mim eval health RUN --report` opens the method" in caplog.text


def test_a_method_that_reads_labels_beside_the_images_has_no_loss_here(run, caplog):
    numbers = health(subject_of(run, method=replace(run.method(), beside=frozenset({"label"}))))
    assert "loss" not in numbers
    assert "leaves out loss: the method reads label beside images of training" in caplog.text


def test_without_labels_the_guess_is_fitted_to_other_images_of_the_same_source(make_run, registry, caplog):
    subject = subject_of(load_run(make_run(labels=False), registry=registry))
    assert health(subject, loss_images=4).keys() >= {"loss", "trivial_loss"}
    assert "trivial_loss" not in health(subject, loss_images=9)
    assert "leaves out trivial_loss/main: no image is left to fit a constant to" in caplog.text


def test_nothing_changes_the_model_and_the_numbers_are_the_same_each_time(run, subject):
    run.objective.train()
    before = {name: tensor.clone() for name, tensor in run.objective.state_dict().items()}
    first, second = health(subject), health(subject_of(run, batch_size=3))
    assert first == {name: pytest.approx(value, rel=1e-5, abs=1e-7) for name, value in second.items()}
    assert all(module.training for module in run.objective.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.objective.state_dict().items())


def test_two_ranks_measure_what_one_does(run):
    def numbers(world: World) -> dict[str, float]:
        return health(subject_of(run, world=world))

    alone = numbers(World())
    for found in run_ranks(lambda rank: numbers(World(rank, 2, rank))):
        assert found == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in alone.items()}


def test_a_single_image_is_too_few(run, monkeypatch):
    subject = subject_of(run)
    monkeypatch.setattr(type(subject.source("test")), "__len__", lambda self: 1)
    with pytest.raises(DataError, match="'health' needs two images, split 'test' has 1 that can be read"):
        health(subject)


# --- guesses that look at nothing ------------------------------------------------------------------------------------


class Ids:
    spec = TargetSpec("ids", 3, Grid((2,)))


def test_the_guess_of_ids_is_how_often_each_was_hidden():
    constant = Constant(Ids())
    hidden = torch.tensor([[True, True], [True, False], [False, True]])
    constant.add(torch.tensor([[0, 0], [0, 2], [2, 1]]), Mask(hidden, Grid((2,))))  # hidden ones: 0, 0, 0, 1
    logits = constant.everywhere()
    assert logits.shape == (1, 2, 3)
    assert logits[0, 0].exp().tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])  # one more of each
    assert constant.by_position() is None
    assert constant.facts()["target_perplexity"] == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


class Vectors:
    spec = TargetSpec("dense", 1, Grid((2,)))


@pytest.mark.parametrize("at_hidden_only", [False, True])
def test_the_mean_of_each_position_is_that_of_its_hidden_values(at_hidden_only):
    constant, mask = Constant(Vectors()), Mask(torch.tensor([[True, False], [True, False]]), Grid((2,)), equal=True)
    values: Tensor | Pred = torch.tensor([[[1.0], [50.0]], [[3.0], [70.0]]])
    if at_hidden_only:
        values = Pred(values[:, :1], Grid((2,)), mask.ids_predict)
    constant.add(values, mask)
    assert constant.everywhere().tolist() == [[[2], [2]]]
    assert constant.by_position().tolist() == [[[2], [2]]]  # nothing is known of the second one but the mean
    assert constant.facts() == {"target_spread": pytest.approx(1 - 4 / 5)}


# --- parts -----------------------------------------------------------------------------------------------------------


def test_alpha_is_fitted_to_what_is_no_rounding():
    eigenvalues = torch.arange(1, 31, dtype=torch.float64) ** -1.0
    eigenvalues[20:] = 1e-15
    law = fitted(eigenvalues, (11, 100))
    assert (law.first, law.last, law.alpha) == (11, 20, pytest.approx(1))
    assert fitted(eigenvalues, (18, 100)) is None
    with pytest.raises(ValueError, match=re.escape("must be [first, last] with 5 ranks at least, counted from 1")):
        Health.Config(alpha_ranks=(3, 5))


def test_gradient_norms_are_found_under_all_their_names():
    lines = [{"step": 1, "grad_norm": 1.0, "loss": 9.0}, {"step": 2, "health_loss": 1.0}, {"step": 3, "grad_norm": 2.0}]
    assert gradient_norms(lines) == [[1.0, 2.0]]
    assert gradient_norms([{"grad_norm/a": 1.0, "p/grad_norm/b": 2.0}]) == [[1.0], [2.0]]


def test_many_numbers_are_not_all_put_on_the_console():
    assert in_short({"top1": 0.5}) == "top1 0.5"
    assert in_short({f"n{i}": i for i in range(10)}).endswith("n7 7 and 2 more in metrics.jsonl")


def test_tokens_that_differ_in_one_direction_are_of_two_colours():
    tokens = torch.tensor([[[0.0, 0.0], [0.0, 5.0]], [[0.0, 5.0], [0.0, 0.0]]])
    colours = token_colours(tokens)
    assert colours.shape == (2, 2, 3)
    assert colours[..., 0].tolist() == [[0, 1], [1, 0]]
    assert colours[..., 1:].unique().tolist() == [0]


def test_where_attention_looks_is_that_of_the_class_token_if_there_is_one():
    attention = torch.tensor([[[[0.0, 0.2, 0.8], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]])
    assert attention_map(attention, 1).tolist() == [[pytest.approx(0.25), 1]]
    assert attention_map(attention, 0)[0].tolist() == pytest.approx([0, 1, 0.8 / 2.2])


# --- in a run, and after it ------------------------------------------------------------------------------------------

OPTIONS = {"max_images": 40, "lidar_images": 6, "lidar_views": 3, "token_images": 8, "loss_images": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    entry = {"type": "health", "every_epochs": 0.001, **OPTIONS}  # after every step
    recipe = {**RECIPE, "evaluate": [entry], "log": {**RECIPE["log"], "tensorboard": True}, "output_dir": str(folder)}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    registry = Registry()
    return train(load_recipe(folder / "tiny.yaml", [], registry), registry)


def test_a_run_logs_its_health_and_leaves_a_report(trained):
    first, line = [line for line in read_metrics(trained) if "health_rankme" in line]
    assert (first["step"], line["step"]) == (1, 2)
    assert any(b"health_rankme" in file.read_bytes() for file in (trained / "tensorboard").iterdir())
    assert line["health_images"] == 40
    assert line["health_norms_at_start/encoder"] == 0
    assert 0.9 < line["health_attention_entropy/0"] <= 1
    assert line.keys() >= {f"health_{name}" for name in ("rankme", "lidar", "loss", "trivial_loss", "position_loss")}
    names = {name.removeprefix("health_").split("/")[0] for name in line if name.startswith("health_")}
    assert names <= MEANINGS.keys()
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<svg" in page
    text = (trained / "report.md").read_text()
    files = re.findall(r"\]\((report/[^)]+)\)", text)
    assert len(files) > 8
    assert all((trained / file).stat().st_size > 100 for file in files)


def test_the_report_of_a_finished_run_has_the_numbers_of_its_end(trained):
    before = (trained / "report.md").read_text()
    (trained / "report.md").unlink()
    result = CliRunner().invoke(main, ["eval", "health", str(trained), "--report"])
    assert result.exit_code == 0, result.output
    assert f"report: {trained}/report.html" in result.output
    after = (trained / "report.md").read_text()

    def numbers(text: str) -> dict[str, float]:
        return {name: float(value) for name, value in re.findall(r"^\| (\S+) \| ([-+.e\d]+) \|", text, re.MULTILINE)}

    assert len(numbers(before)) > 30
    assert numbers(after) == {name: pytest.approx(value, rel=2e-3) for name, value in numbers(before).items()}


def test_wrong_use_of_the_report_is_told(trained, tmp_path):
    result = CliRunner().invoke(main, ["eval", "knn", str(trained), "--report"])
    assert result.exit_code == 2
    assert "--report is for health alone, not for knn" in result.output
    result = CliRunner().invoke(main, ["eval", "health", str(trained), "--report", "--json", "--checkpoint", "all"])
    assert result.exit_code == 2
    assert "--report takes a run as it is; leave --json, --checkpoint out" in result.output
    result = CliRunner().invoke(main, ["eval", "health", str(tmp_path), "--report"])
    assert result.exit_code == 1
    assert "is no run directory: it has no recipe.yaml" in result.output
    result = CliRunner().invoke(main, ["eval", "health", str(trained), "health.pool=max", "--report"])
    assert result.exit_code == 1
    assert "pool" in result.output
