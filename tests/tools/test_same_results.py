"""What the comparison of two checkouts calls the same."""

from __future__ import annotations

import json

import pytest
import torch
from as_installed import describe
from safetensors.torch import save_file
from same_results import (
    Comparison,
    Failed,
    by_case,
    difference_by_count,
    difference_by_name,
    hash_of,
    main,
    results_of,
    tensors_in,
)


def test_a_hash_tells_type_shape_and_bytes_apart():
    tensor = torch.tensor([[1.0, 2.0]])
    assert hash_of(tensor) == hash_of(tensor.clone())
    others = [tensor.double(), tensor.T, tensor.nextafter(torch.tensor(9.0)), torch.tensor([[2.0, 1.0]])]
    assert len({hash_of(each) for each in (tensor, *others)}) == 5


def test_a_hash_is_of_the_values_wherever_they_lie():
    table = torch.arange(6.0).view(2, 3)
    assert hash_of(table[:, 1]) == hash_of(torch.tensor([1.0, 4.0]))


def test_the_first_difference_by_name_is_told():
    before, after = {"step 1 loss": "0.5", "step 2 loss": "0.25"}, {"step 1 loss": "0.5", "step 2 loss": "0.125"}
    assert difference_by_name(before, before) == ""
    assert difference_by_name(before, after) == "1 of 2, first step 2 loss: 0.25 before, 0.125 after"
    assert difference_by_name(before, {"step 1 loss": "0.5"}) == (
        "1 of 2, first step 2 loss: 0.25 before, missing after"
    )
    assert difference_by_name({}, {}) == "nothing was compared"


def test_comparisons_are_counted_and_may_stand_in_another_order():
    one, two = Comparison("case", "test_a equal (2,)", "aa"), Comparison("case", "test_b equal (2,)", "bb")
    assert difference_by_count([one, two], [two, one]) == ""
    assert difference_by_count([one, two, two], [one, two]) == (
        "1 only before and 0 only after, first test_b equal (2,): 2 times before, 1 after"
    )
    assert difference_by_count([], []) == "nothing was compared"
    assert by_case([one, two]) == {"case": [one, two]}


def test_tensors_are_found_in_lists_and_mappings():
    a, b = torch.zeros(1), torch.ones(1)
    assert [each.item() for each in tensors_in([{"x": a, "name": "n"}, (b, None, 3)])] == [0.0, 1.0]


def test_results_are_the_losses_of_every_step_and_the_last_checkpoint(tmp_path):
    lines = [{"step": 1, "loss": 0.5, "images_per_s": 9.0}, {"step": 2, "loss": 0.25, "a/loss": 0.1, "lr": 0.01}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for step, value in (("step_00000001", 1.0), ("step_00000002", 2.0)):
        folder = tmp_path / "checkpoints" / step
        folder.mkdir(parents=True)
        save_file({"weight": torch.tensor([value])}, folder / "model.safetensors")
    assert results_of(tmp_path) == {
        "step 1 loss": "0.5", "step 2 loss": "0.25", "step 2 a/loss": "0.1", "step 2 lr": "0.01",
        "model: weight": hash_of(torch.tensor([2.0])),
    }  # fmt: skip


def test_a_run_without_a_checkpoint_is_no_result(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(Failed, match="left no checkpoint"):
        results_of(tmp_path)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["same_results.py", str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "is no checkout: it has no pyproject.toml" in capsys.readouterr().err


def test_a_checkout_is_described_as_if_it_were_installed(tmp_path):
    root, site = tmp_path / "root", tmp_path / "site"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\nname = "my-plugin"\nversion = "1.2"\n[project.entry-points.mim_framework]\nmine = "my_plugin"\n'
    )
    describe(root, site)
    folder = site / "my_plugin-1.2.dist-info"
    assert (folder / "METADATA").read_text() == "Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.2\n"
    assert (folder / "entry_points.txt").read_text() == "[console_scripts]\n[mim_framework]\nmine = my_plugin\n"
