"""`mim eval`: several evaluations of several subjects, beside raw pixels and the encoder before training."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner

from mim_framework.base.errors import CheckpointError, DataError, RecipeError
from mim_framework.checkpoints.checkpoint import find_latest, save_checkpoint
from mim_framework.commands import evaluate as command
from mim_framework.commands.cli import main
from mim_framework.commands.evaluate import Named, Options, evaluate, source_of
from mim_framework.commands.evaluation_report import Judged, tables
from mim_framework.contract.evaluation import Evaluation
from mim_framework.testing import RegistryWith

TOP1 = {"raw_pixels": {"knn_top1": 1.0}, "untrained": {"knn_top1": pytest.approx(1 / 3)}, "trained": {"knn_top1": 1.0}}


class Constant(Evaluation):
    """Numbers that no image is read for."""

    name = "constant"
    needs = frozenset()
    of_pixels = False

    def __call__(self, subject):
        return {"layer0_rank": 12.5, "layer1_rank": 250.25, "nothing": float("nan"), "small": -2.5e-6}


def printed(judged: list[Judged]) -> list[str]:
    """The lines, with a bar between columns."""
    return [re.sub("  +", " | ", line) for line in tables(judged)]


def test_a_run_is_compared_with_raw_pixels_and_its_untrained_encoder(make_run, registry):
    run_dir = make_run()
    [judged] = evaluate(["knn"], [run_dir], registry=registry)
    assert (judged.subject, judged.step, judged.images) == (str(run_dir), 7, {"train": 9, "test": 6})
    assert judged.numbers == TOP1
    assert printed([judged]) == [
        "knn top1 | raw_pixels | untrained | trained",
        f"{run_dir} (step 7) | 1.0000 [0.6097, 1.0000] | 0.3333 [0.0968, 0.7000] | 1.0000 [0.6097, 1.0000]",
        "",
        "knn reads the mean of patch tokens of the encoder's output, as it hands it out",
        "images: 9 to learn from (folder), 6 to be tested on (folder)",
        "overlap: none of the 6 test images is among the 9 of pre-training",
        "in brackets: the 95 % interval, as the test images are a sample of many more",
        f"kept in {run_dir}/evaluations.jsonl",
    ]


def test_what_is_measured_next_is_told(make_run, registry):
    run_dir, told = make_run(), []
    evaluate(["knn"], [run_dir], registry=registry, progress=told.append)
    where = f"{run_dir} (step 7)"
    assert told == [f"{where}, {variant}: knn ..." for variant in ("raw pixels", "untrained", "trained")]


def test_many_numbers_of_a_subject_stand_in_one_table(make_run, monkeypatch):
    numbers = {f"number{index}": index + 0.5 for index in range(9)}
    monkeypatch.setattr(Constant, "__call__", lambda self, subject: numbers)
    run_dir = make_run()
    registry = RegistryWith(*(make_run.components), Constant)
    [judged] = evaluate(["constant"], [run_dir], registry=registry)
    table = [f"constant, {run_dir} (step 7) | untrained | trained"]
    assert printed([judged])[:11] == [*table, *(f"{name} | {x:.4f} | {x:.4f}" for name, x in numbers.items()), ""]


def test_a_checkpoint_of_a_run_is_a_subject_and_stands_beside_others(make_run, registry):
    run_dir = make_run()
    step = run_dir / "checkpoints" / "step_00000007"
    judged = evaluate(["knn"], [run_dir, step], ["knn.k=3"], registry)
    assert [each.numbers for each in judged] == [TOP1, TOP1]
    rows = printed(judged)
    assert [row.partition(" |")[0] for row in rows[:3]] == ["knn top1", f"{run_dir} (step 7)", f"{step} (step 7)"]
    assert len([row for row in rows if row.startswith("knn reads")]) == 2


def test_options_are_those_of_the_recipe_unless_they_are_given(make_run, registry):
    run_dir = make_run()
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["evaluate"][0]["k"] == 1
    text = r"train images of 1 \(max_train is 1; raise it\) are of one class, '(blue|green|red)'"
    with pytest.raises(DataError, match=text):
        evaluate(["knn"], [run_dir], ["knn.max_train=1", "knn.forward_batch_size=2"], registry)


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


def test_accuracy_is_of_a_classifier_and_the_best_checkpoint_of_a_run_that_keeps_it(make_run, registry):
    run_dir = make_run()
    text = (
        r"evaluation 'accuracy' of (.*colours): it is of a classifier that a run has trained, and \1 was trained by "
        r"objective 'masked_prediction'; train one from it, for example mim run mae_finetune init=\1, or use knn"
    )
    with pytest.raises(DataError, match=text):
        evaluate(["accuracy"], [run_dir], registry=registry)
    with pytest.raises(
        CheckpointError, match=r"colours has no best\.json: .* where checkpoint\.keep_best names a number"
    ):
        evaluate(["knn"], [run_dir], registry=registry, options=Options(checkpoint="best"))
    (run_dir / "best.json").write_text('{"checkpoint": "checkpoints/step_00000003"}')
    with pytest.raises(CheckpointError, match=r"best\.json names step_00000003, which is gone"):
        evaluate(["knn"], [run_dir], registry=registry, options=Options(checkpoint="best"))
    (run_dir / "best.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        evaluate(["knn"], [run_dir], registry=registry, options=Options(checkpoint="best"))


def test_what_is_no_subject_is_refused(tmp_path, registry):
    with pytest.raises(
        RecipeError, match=r"gone does not exist\. An encoder is named by a run directory, a checkpoint"
    ):
        evaluate(["knn"], ["gone"], registry=registry)
    with pytest.raises(RecipeError, match=r"is a folder without a recipe\.yaml or slots\.yaml"):
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


# --- other images ----------------------------------------------------------------------------------------------------


def test_an_unlabelled_run_is_judged_by_folders_of_class_folders(make_run, registry, tmp_path):
    run_dir = make_run(labels=False)
    recipe = (run_dir / "recipe.yaml").read_text()
    options = Options(train=f"{tmp_path}/train", test=f"{tmp_path}/test")
    [judged] = evaluate(["knn"], [run_dir], ["knn.k=1"], registry, options=options)
    assert judged.numbers == TOP1
    assert (run_dir / "recipe.yaml").read_text() == recipe


def test_a_source_that_divides_itself_gives_both_splits(make_run, registry):
    pytest.importorskip("sklearn")
    [judged] = evaluate(
        ["knn"], [make_run(labels=False)], ["knn.max_train=50"], registry, options=Options(test="digits")
    )
    assert judged.images == {"train": 1438, "test": 359}


def test_a_source_is_a_folder_a_url_a_name_or_a_mapping(tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    folder = {"type": "folder", "root": "images", "labels": True}
    assert source_of("images", "--train", registry, labels=True) == folder
    assert source_of("gone/images", "--train", registry, labels=True) == {**folder, "root": "gone/images"}
    assert source_of("s3://b/i", "--train", registry, labels=False) == {**folder, "root": "s3://b/i", "labels": False}
    assert source_of("digits", "--train", registry, labels=True) == {"type": "digits"}
    assert source_of("{type: digits, split: all}", "--train", registry, labels=True) == {
        "type": "digits",
        "split": "all",
    }
    with pytest.raises(RecipeError, match="--train imgs: there is no such folder, and no source 'imgs' is installed"):
        source_of("imgs", "--train", registry, labels=True)
    (tmp_path / "digits").mkdir()
    with pytest.raises(RecipeError, match="--test digits is a folder and a source; write ./digits or '{type: digits}'"):
        source_of("digits", "--test", registry, labels=True)


def test_images_to_learn_from_without_any_to_be_tested_on_are_refused(make_run, registry, tmp_path):
    with pytest.raises(DataError, match="needs labelled images to be tested on, source 'folder' keeps none aside"):
        evaluate(["knn"], [make_run()], ["data.eval_source=null"], registry, options=Options(train=f"{tmp_path}/train"))


def test_images_of_one_class_or_of_other_classes_are_refused(make_run, registry, tmp_path):
    run_dir = make_run()
    shutil.copytree(tmp_path / "train" / "red", tmp_path / "one" / "red")
    one = Options(train=f"{tmp_path}/one", test=f"{tmp_path}/one")
    with pytest.raises(DataError, match="it needs images of two classes at least, source 'folder' has one, 'red'"):
        evaluate(["knn"], [run_dir], registry=registry, options=one)
    shutil.copytree(tmp_path / "test", tmp_path / "others")
    (tmp_path / "others" / "red").rename(tmp_path / "others" / "pink")
    with pytest.raises(DataError, match="tested on have class 'pink', which those to learn from lack"):
        evaluate(["knn"], [run_dir], registry=registry, options=Options(test=f"{tmp_path}/others"))


def test_test_images_that_pre_training_saw_are_counted_and_named(make_run, registry, tmp_path):
    run_dir = make_run()
    shutil.copy(tmp_path / "train" / "red" / "100.png", tmp_path / "test" / "red" / "again.png")
    [judged] = evaluate(["knn"], [run_dir], registry=registry)
    assert judged.overlap.names == ("red/again.png",)
    told = "overlap: 1 of the 7 test images are also among those of pre-training: red/again.png"
    assert told in printed([judged])
    assert json.loads((run_dir / "evaluations.jsonl").read_text())["overlap"]["names"] == ["red/again.png"]
    [judged] = evaluate(["knn"], [run_dir], registry=registry, options=Options(test=f"{tmp_path}/train"))
    assert len(judged.overlap.names) == 9


def test_test_images_that_are_also_there_to_learn_from_are_counted_and_named(make_run, registry, tmp_path):
    run_dir = make_run()
    options = Options(train=f"{tmp_path}/test", test=f"{tmp_path}/test")
    [judged] = evaluate(["knn"], [run_dir], registry=registry, options=options)
    found = [line for line in printed([judged]) if "learn from: " in line]
    assert len(found) == 1
    assert found[0].startswith("overlap: 6 of the 6 test images are also among those to learn from: ")
    assert found[0].endswith(" and 1 more; of these the numbers are no test")
    record = json.loads((run_dir / "evaluations.jsonl").read_text())
    assert (record["overlap"]["names"], len(record["overlap"]["in_train"])) == ([], 6)


def test_pre_training_images_that_are_gone_are_told(make_run, registry, tmp_path):
    run_dir = make_run()
    (tmp_path / "train").rename(tmp_path / "moved")
    options = Options(train=f"{tmp_path}/moved", test=f"{tmp_path}/test")
    [judged] = evaluate(["knn"], [run_dir], registry=registry, options=options)
    assert "is not known: those of pre-training cannot be read: data.source.root: '" in str(judged.overlap)


# --- checkpoints, layers and several evaluations -------------------------------------------------------------------


def test_all_checkpoints_of_a_run_are_a_curve_and_the_first_weights_are_judged_once(make_run, registry):
    run_dir = make_run()
    found = find_latest(run_dir / "checkpoints")
    weights = found.tensors("model")
    weights["encoder.scale"].zero_()
    save_checkpoint(run_dir / "checkpoints", 9, {"model": weights}, found.state)
    judged = evaluate(["knn"], [run_dir], registry=registry, options=Options(checkpoint="all"))
    assert [(each.step, each.numbers["trained"]["knn_top1"]) for each in judged] == [
        (7, 1.0),
        (9, pytest.approx(1 / 3)),
    ]
    assert [each.numbers["untrained"] for each in judged] == [TOP1["untrained"]] * 2
    [of_step] = evaluate(["knn"], [run_dir], registry=registry, options=Options(checkpoint="7"))
    assert (of_step.step, of_step.numbers) == (7, TOP1)
    with pytest.raises(CheckpointError, match="--checkpoint 8: .*colours has no such checkpoint; it has 7, 9, or"):
        evaluate(["knn"], [run_dir], registry=registry, options=Options(checkpoint="8"))
    with pytest.raises(RecipeError, match="--checkpoint chooses among those of a run, and .*step_00000009 is one"):
        evaluate(
            ["knn"], [run_dir / "checkpoints" / "step_00000009"], registry=registry, options=Options(checkpoint="all")
        )


def test_numbers_of_layers_stand_below_each_other_and_what_is_not_measured_is_a_dash(make_run):
    run_dir = make_run()
    registry = RegistryWith(*(make_run.components), Constant)
    judged = evaluate(["knn", "constant"], [run_dir], registry=registry)
    rows = printed(judged)
    assert rows[3:9] == [
        "constant rank | untrained | trained",
        f"{run_dir} (step 7), layer 0 | 12.5000 | 12.5000",
        f"{run_dir} (step 7), layer 1 | 250.2 | 250.2",
        "",
        "constant nothing | untrained | trained",
        f"{run_dir} (step 7) | nan | nan",
    ]
    assert f"{run_dir} (step 7) | -2.5e-06 | -2.5e-06" in rows
    knn, constant = map(json.loads, (run_dir / "evaluations.jsonl").read_text().splitlines())
    assert constant["numbers"]["trained"]["nothing"] == {"value": None}
    assert constant["features"] == []
    assert knn["evaluation"] == "knn"


def test_layers_that_an_encoder_does_not_hand_out_are_refused(make_run, registry):
    with pytest.raises(RecipeError, match="evaluation 'knn' of .*: layers is 'each', but the encoder hands out none"):
        evaluate(["knn"], [make_run()], ["knn.layers=each"], registry)


# --- records and cache -----------------------------------------------------------------------------------------------


def test_a_record_says_what_was_measured_of_what_and_with_what(make_run, registry, tmp_path):
    run_dir = make_run()
    evaluate(["knn"], [run_dir], registry=registry)
    [record] = map(json.loads, (run_dir / "evaluations.jsonl").read_text().splitlines())
    assert record["numbers"]["trained"]["top1"] == {"value": 1.0, "low": pytest.approx(0.6097, abs=1e-4), "high": 1.0}
    assert record["options"] == {"layers": "last", "k": 1, "temperature": 0.07, "pool": "mean", "max_train": 50_000,
                                 "max_test": 10_000}  # fmt: skip
    assert record["features"] == [{"pool": "mean", "layers": "last", "final_norm": None}]
    assert (record["evaluation"], record["subject"], record["step"]) == ("knn", str(run_dir), 7)
    assert (record["origin"]["encoder"], len(record["weights_sha256"])) == ("patches", 64)
    test = record["data"]["test"]
    assert (test["source"], test["options"]["root"]) == ("folder", f"{tmp_path}/test")
    assert (test["num_images"], test["num_classes"], len(test["names"])) == (6, 3, 64)
    assert record["overlap"] == {"num_test": 6, "names": [], "not_compared": None, "in_train": []}
    assert {"torch", "mim-framework", "python"} <= record["versions"].keys()
    assert record["date"].endswith("+00:00")


def test_the_command_prints_tables_or_records(make_run, monkeypatch, registry, tmp_path):
    monkeypatch.setattr("mim_framework.commands.cli.Registry", lambda *_, **__: registry)
    run_dir = make_run()
    done = CliRunner().invoke(main, ["eval", "knn", str(run_dir), "--cache", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    assert "cache: 10 files, 0.0 MiB in" in done.stdout
    done = CliRunner().invoke(main, ["eval", "knn", str(run_dir), "--json"])
    assert (
        json.loads(done.stdout)["numbers"]
        == json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[1])["numbers"]
    )
    assert CliRunner().invoke(main, ["eval", "knn", "--json"]).exit_code == 2


def test_an_encoder_that_comes_from_no_run_needs_images_and_its_record_is_not_kept(
    make_run, registry, monkeypatch, tmp_path
):
    run_dir = make_run()
    opened = next(command.opened_subjects(str(run_dir), None, registry)).opened
    opened.recipe = None
    monkeypatch.setattr(command, "opened_subjects", lambda *_: iter([Named("timm:x", opened, None, None)]))
    with pytest.raises(RecipeError, match="timm:x comes from no run, so that there are no images to judge it by; name"):
        evaluate(["knn"], ["timm:x"], registry=registry)
    options = Options(train=f"{tmp_path}/train", test=f"{tmp_path}/test")
    judged = evaluate(["knn"], ["timm:x"], ["knn.k=1"], registry, options=options)
    assert judged[0].numbers == TOP1
    assert printed(judged)[-1] == "not kept, as there is no run directory; --json prints the record: timm:x"
    assert str(judged[0].overlap).endswith("is not known: the encoder comes from no run")
    assert not (run_dir / "evaluations.jsonl").exists()
    opened.origin = replace(opened.origin, kind="random")
    judged = evaluate(["knn"], ["timm:x"], ["knn.k=1"], registry, options=options)
    assert "timm:x has random weights: what stands under 'trained' is an untrained encoder" in printed(judged)
