"""`mim eval` judges whatever names an encoder: one that comes from no run gives the numbers of its run."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from mim_framework.base.errors import RecipeError
from mim_framework.commands.cli import main
from mim_framework.commands.evaluate import Options, evaluate
from mim_framework.convert import export_run, import_checkpoint

DIGITS = Options(train="digits", test="{type: digits, split: test}")


def test_an_export_and_an_import_are_judged_as_their_run_is(make_run, tmp_path):
    folder, _ = make_run()
    file = export_run(folder, "official")
    import_checkpoint(file, tmp_path / "imported")
    judged = evaluate(["knn"], [folder, file, tmp_path / "imported"], options=DIGITS)
    trained = [each.made[0].numbers["trained"] for each in judged]
    assert trained[0] == trained[1] == trained[2]
    assert [each.step for each in judged] == [9, 9, None]


def test_a_model_of_timm_is_judged_without_its_untrained_self_if_it_is_random():
    subject, test = "timm:test_resnet,random,img_size=32", "{type: digits, split: test}"
    command = ["eval", "knn", subject, "--train=digits", f"--test={test}"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "raw_pixels" in result.output
    assert "untrained  " not in result.output  # no column of the table


def test_a_checkpoint_can_be_chosen_of_a_run_alone():
    options = Options(train="digits", test=DIGITS.test, checkpoint="9")
    with pytest.raises(RecipeError, match="--checkpoint chooses .* of a run, and timm:test_vit,random is none"):
        evaluate(["knn"], ["timm:test_vit,random"], options=options)
