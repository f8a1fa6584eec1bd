"""`mim eval`: several evaluations of several subjects, beside raw pixels and the encoder before training."""

from __future__ import annotations

import re

import pytest
import yaml

from mim_framework.base.errors import CheckpointError, DataError, RecipeError
from mim_framework.checkpoints.checkpoint import find_latest, save_checkpoint
from mim_framework.commands.evaluate import Judged, evaluate, lines

TOP1 = {"raw_pixels": {"knn_top1": 1.0}, "untrained": {"knn_top1": pytest.approx(1 / 3)}, "trained": {"knn_top1": 1.0}}


def test_a_run_is_compared_with_raw_pixels_and_its_untrained_encoder(make_run, registry):
    run_dir = make_run()
    [judged] = evaluate(["knn"], [run_dir], registry=registry)
    assert judged == Judged(str(run_dir), {"train": 9, "test": 6}, TOP1)
    assert list(lines([judged])) == [
        "raw_pixels: 1.0000", "untrained: 0.3333", "trained: 1.0000", "images: 9 train, 6 test",
    ]  # fmt: skip


def test_a_checkpoint_of_a_run_is_a_subject_and_stands_beside_others_under_its_name(make_run, registry):
    run_dir = make_run()
    step = run_dir / "checkpoints" / "step_00000007"
    judged = evaluate(["knn"], [run_dir, step], ["knn.k=3"], registry)
    assert [each.numbers for each in judged] == [TOP1, TOP1]
    printed = list(lines(judged))
    assert printed[0] == f"{run_dir}: knn_top1"
    assert printed[4] == f"{step}: knn_top1"
    assert printed[-1] == "images: 9 train, 6 test"
    assert len(printed) == 9


def test_options_are_those_of_the_recipe_unless_they_are_given(make_run, registry):
    run_dir = make_run()
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["evaluate"][0]["k"] == 1
    [judged] = evaluate(["knn"], [run_dir], ["knn.max_train=1", "knn.forward_batch_size=2"], registry)
    assert judged.numbers["trained"] == {"knn_top1": pytest.approx(1 / 3)}  # all are what the one neighbour is


def test_other_images_can_be_named(make_run, registry, tmp_path):
    run_dir = make_run()
    [judged] = evaluate(["knn"], [run_dir], [f"data.eval_source.root={tmp_path}/train"], registry)
    assert judged.images == {"train": 9, "test": 9}


@pytest.mark.parametrize(
    ("names", "change", "text"),
    [
        (["knm"], (), "mim eval: evaluate.0.type: no evaluation 'knm' is installed, did you mean 'knn'"),
        (["knn"], ["knn.kk=3"], "override 'evaluate.knn.kk=3': evaluate.0.kk: unknown key, did you mean 'k'"),
        (["knn"], ["knn.k=0"], "override 'evaluate.knn.k=0': evaluate.0.k: must be greater than 0, got 0"),
        (["knn"], ["optim.lr=1"], "override 'optim.lr=1': changes none of the evaluations; write NAME.KEY=VALUE"),
    ],
)
def test_a_wrong_name_or_option_is_a_clear_error(make_run, registry, names, change, text):
    with pytest.raises(RecipeError, match=re.escape(text)):
        evaluate(names, [make_run()], change, registry)


def test_an_encoder_that_cannot_be_judged_so_is_told_before_data_is_read(make_run, registry, monkeypatch):
    run_dir = make_run()
    encoder = registry.find("encoder", "patches")
    before = encoder.__init__

    def without_class_token(self, config, specs):
        before(self, config, specs)
        self.spec = type(self.spec)(**{**vars(self.spec), "num_prefix_tokens": 0})

    monkeypatch.setattr(encoder, "__init__", without_class_token)
    with pytest.raises(
        RecipeError, match=r"evaluation 'knn' of .*colours: pool is 'cls', but the encoder has no class"
    ):
        evaluate(["knn"], [run_dir], ["knn.pool=cls"], registry)


def test_a_run_without_labels_is_told_how_to_have_them(make_run, registry):
    text = r"evaluation 'knn' of .*colours: it needs labelled images to learn from, source 'folder' has none\."
    with pytest.raises(DataError, match=text):
        evaluate(["knn"], [make_run(labels=False)], registry=registry)


def test_what_is_no_subject_is_refused(tmp_path, registry):
    with pytest.raises(RecipeError, match="gone is neither a run directory nor a checkpoint .* it does not exist"):
        evaluate(["knn"], ["gone"], registry=registry)
    with pytest.raises(RecipeError, match=r"is neither a run directory .* it has no recipe\.yaml"):
        evaluate(["knn"], [tmp_path], registry=registry)


def test_a_run_whose_model_has_no_encoder_is_refused(make_run, registry):
    run_dir = make_run()
    found = find_latest(run_dir / "checkpoints")
    renamed = {name.replace("encoder.", "student."): tensor for name, tensor in found.tensors("model").items()}
    save_checkpoint(run_dir / "checkpoints", found.step + 1, {"model": renamed}, found.state)
    with pytest.raises(CheckpointError, match=r"step_\d+: no name starting with 'encoder\.'"):
        evaluate(["knn"], [run_dir], registry=registry)


def test_a_run_of_an_earlier_version_is_read_and_told(make_run, registry, caplog):
    run_dir = make_run()
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["evaluate"] = {"knn": {"every_epochs": 20.0, "k": 3, "batch_size": 64}}
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    [judged] = evaluate(["knn"], [run_dir], registry=registry)
    assert judged.numbers == TOP1
    now = "evaluate: [{type: knn, every_epochs: 20.0, k: 3, forward_batch_size: 64}]"
    assert f"recipe.yaml was written by an earlier version; it now reads {now}" in caplog.text
