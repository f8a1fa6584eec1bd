"""Somebody else's evaluation is one file and one hook: in a recipe, after a run, and in what is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny import RECIPE

from mim_framework.base.errors import PluginError
from mim_framework.commands.cli import main
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics

PROBE = '''
"""A linear probe."""

import torch
from pydantic import Field
from torch.nn.functional import cross_entropy

from mim_framework import Evaluation, Section, check_features, hookimpl


class LinearProbe(Evaluation):
    """Logistic regression on frozen, standardised features."""

    name = "probe"

    class Config(Section):
        layers: tuple[int, ...] = ()
        """Blocks whose outputs are used; by default the encoder's own output."""
        num_steps: int = Field(100, gt=0)
        """Gradient steps."""

    def check(self, encoder):
        check_features(encoder, "mean", self.config.layers)

    def __call__(self, subject):
        train, test = (subject.features(split, layers=self.config.layers) for split in ("train", "test"))
        mean, std = train.x.mean(0), train.x.std(0) + 1e-6
        weights = torch.zeros(train.x.shape[1], int(train.y.max()) + 1, device=subject.device, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=0.05)
        for _ in range(self.config.num_steps):
            loss = cross_entropy((train.x - mean) / std @ weights, train.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = ((test.x - mean) / std @ weights).argmax(1) == test.y
        return {"top1": right.float().mean().item(), "loss": loss.item()}


@hookimpl
def mim_evaluations():
    return [LinearProbe]
'''


@pytest.fixture
def mim(install_plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command where the probe is installed, in a folder with a recipe that uses it beside kNN."""
    install_plugin("probe", PROBE)
    monkeypatch.chdir(tmp_path)
    evaluate = [{"type": "knn", "every_epochs": 0}, {"type": "probe", "every_epochs": 0, "num_steps": 150}]
    Path("r.yaml").write_text(yaml.safe_dump({**RECIPE, "evaluate": evaluate}))
    return lambda *arguments: CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_a_run_measures_by_it_and_the_command_agrees_with_the_run(mim):
    assert mim("run", "r.yaml").exit_code == 0
    [knn] = [line for line in read_metrics(Path("runs/tiny/metrics.jsonl")) if "knn_top1" in line]
    [probe] = [line for line in read_metrics(Path("runs/tiny/metrics.jsonl")) if "probe_top1" in line]
    assert (knn["step"], probe["step"]) == (2, 2)
    assert 0.5 < probe["probe_top1"] <= 1  # ten digits, by their mean token
    printed = mim("eval", "knn,probe", "runs/tiny").stdout.splitlines()
    titles = [f"{name:<19}" for name in ("knn top1", "knn top5", "probe top1", "probe loss")]
    assert [line[:19] for line in printed[0:12:3]] == titles
    assert [line[:19] for line in printed[1:12:3]] == ["runs/tiny (step 2) "] * 4
    trained = [float(line.split("  ")[-1].split()[0]) for line in printed[1:12:3]]
    measured = (knn["knn_top1"], knn["knn_top5"], probe["probe_top1"], probe["probe_loss"])
    assert trained == [round(each, 4) for each in measured]
    assert "images: 1,438 to learn from (digits), 359 to be tested on (digits)" in printed
    mim("eval", "probe", "runs/tiny", "probe.num_steps=1")
    fewer = json.loads(Path("runs/tiny/evaluations.jsonl").read_text().splitlines()[-1])
    assert fewer["options"]["num_steps"] == 1
    assert fewer["numbers"]["trained"]["loss"]["value"] > probe["probe_loss"]


def test_what_it_cannot_judge_is_told_with_the_recipes_line(mim):
    result = mim("check", "r.yaml", "evaluate.probe.layers=[7]")
    assert result.exit_code == 1
    assert "evaluate.1: probe: layers [7] are none of the encoder's 1 blocks, which begin at 0" in result.stderr


def test_it_is_listed_and_its_options_are_in_the_schema(mim):
    assert "evaluation: probe" in mim("plugins", "list").stdout
    schema = json.loads(mim("schema").stdout)
    options = schema["$defs"]["evaluation.probe"]["properties"]
    assert list(options) == ["type", "every_epochs", "forward_batch_size", "layers", "num_steps"]
    assert {"$ref": "#/$defs/evaluation.probe"} in schema["properties"]["evaluate"]["anyOf"][0]["items"]["anyOf"]


def test_an_option_with_the_name_of_a_key_that_every_evaluation_has_is_refused(install_plugin):
    install_plugin("probe", PROBE.replace("num_steps: int", "every_epochs: int"))
    text = "LinearProbe.Config has a field 'every_epochs', a key that every evaluation has in a recipe; rename it"
    with pytest.raises(PluginError, match=text):
        Registry().load("probe")
