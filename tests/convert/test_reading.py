"""Foreign files are data: what they hold is read, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mim_framework.base.errors import CheckpointError
from mim_framework.convert import read_checkpoint

WEIGHTS = {"norm.weight": torch.tensor([1.0, 2.0])}


class Payload:
    """What an attacker would put into a file: loading it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_training_checkpoint_with_a_namespace_and_numpy_numbers_is_read(tmp_path: Path):
    options = Namespace(blr=1.5e-4, norm_pix_loss=True, input_size=224, mask_ratio=np.float64(0.75), seed=np.int64(3))
    torch.save({"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 7, "args": options}, tmp_path / "full.pth")
    foreign = read_checkpoint(tmp_path / "full.pth")
    assert foreign.state.keys() == WEIGHTS.keys()
    assert foreign.state["norm.weight"].tolist() == [1.0, 2.0]
    assert foreign.options == vars(options)


def test_weights_are_found_under_state_dict_bare_and_behind_a_distributed_wrapper(tmp_path: Path):
    for name, content in {
        "a.pth": {"state_dict": WEIGHTS, "meta": {"epoch": 1}},
        "b.pth": WEIGHTS,
        "c.pth": {"model": {"module.norm.weight": WEIGHTS["norm.weight"]}},
        "deepspeed.pth": {"module": WEIGHTS, "epoch": 1},
    }.items():
        torch.save(content, tmp_path / name)
        assert read_checkpoint(tmp_path / name).state.keys() == WEIGHTS.keys()
    save_file(WEIGHTS, tmp_path / "d.safetensors")
    assert read_checkpoint(tmp_path / "d.safetensors").state.keys() == WEIGHTS.keys()


def test_files_of_the_old_torch_format_are_read(tmp_path: Path):
    content = {"model": WEIGHTS, "args": Namespace(epochs=800)}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pth").options == {"epochs": 800}


@pytest.mark.parametrize("where", ["args", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, where: str, zipped: bool):
    canary = tmp_path / "canary"
    content = {"model": WEIGHTS, "args": None} | {where: Payload(canary)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.pth is refused: .* loading it would run 'posix\.system'"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not canary.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the control: loaded carelessly, it does run
    assert canary.exists()


def test_a_plain_pickle_payload_is_refused_and_does_not_run(tmp_path: Path):
    canary = tmp_path / "canary"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match=r"evil\.pkl (is refused|is neither)"):
        read_checkpoint(tmp_path / "evil.pkl")
    assert not canary.exists()


def test_a_payload_inside_an_allowed_namespace_is_refused(tmp_path: Path):
    canary = tmp_path / "canary"
    torch.save({"model": WEIGHTS, "args": Namespace(hook=Payload(canary))}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="is refused"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not canary.exists()


def test_other_files_end_in_an_error_that_names_them(tmp_path: Path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth holds a list, not a dictionary"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "log.pth")
    with pytest.raises(CheckpointError, match=r"log\.pth holds no weights; its keys are epoch, loss"):
        read_checkpoint(tmp_path / "log.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(
        CheckpointError,
        match=r"page\.pth is neither a safetensors file nor a torch checkpoint of",
    ):
        read_checkpoint(tmp_path / "page.pth")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"page\.safetensors cannot be read as safetensors"):
        read_checkpoint(tmp_path / "page.safetensors")
    with pytest.raises(CheckpointError, match=r"absent\.pth cannot be read"):
        read_checkpoint(tmp_path / "absent.pth")
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be read"):
        read_checkpoint(tmp_path / "cut.pth")


def test_a_yacs_configuration_is_read_as_a_plain_dictionary_without_yacs(tmp_path, monkeypatch):
    class CfgNode(dict):
        """Pickles as yacs' own does: by class, items and attributes."""

        def __init__(self, values):
            super().__init__(values)
            self.__dict__["_immutable"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs = ModuleType("yacs.config")
    yacs.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    torch.save(
        {"model": {"a": torch.ones(2)}, "config": CfgNode({"DATA": CfgNode({"IMG_SIZE": 192})})}, tmp_path / "f.pth"
    )
    monkeypatch.undo()
    assert "yacs" not in sys.modules
    assert read_checkpoint(tmp_path / "f.pth").state["a"].tolist() == [1, 1]


# --- wrappers --------------------------------------------------------------------------------------------------------


def under(prefix: str, weights: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("content", "key", "prefix"),
    [
        ({"model": under("_orig_mod.")}, "model", "_orig_mod."),
        ({"model": under("module._orig_mod.")}, "model", "module._orig_mod."),
        ({"state_dict": under("model."), "epoch": 3, "pytorch-lightning_version": "2.4"}, "state_dict", "model."),
        ({"model_ema": WEIGHTS, "epoch": 3}, "model_ema", ""),
        ({"state_dict_ema": under("module."), "epoch": 3}, "state_dict_ema", "module."),
        ({"teacher": under("module."), "epoch": 3}, "teacher", "module."),
        ({"student": WEIGHTS}, "student", ""),
        ({"ema": {"shadow": WEIGHTS}, "rng": {"cpu": 3}}, "ema.shadow", ""),
        (under("model_ema.module."), "", "model_ema.module."),
        (under("net._orig_mod."), "", "net._orig_mod."),
    ],
)
def test_known_wrappers_are_taken_off_whatever_the_trainer(tmp_path: Path, content, key: str, prefix: str):
    torch.save(content, tmp_path / "w.pth")
    foreign = read_checkpoint(tmp_path / "w.pth")
    assert foreign.state.keys() == WEIGHTS.keys()
    assert (foreign.key, foreign.prefix) == (key, prefix)


def test_several_sets_of_weights_are_listed_and_one_is_chosen(tmp_path: Path):
    content = {
        "teacher": WEIGHTS | {"a.b": torch.zeros(1)},
        "student": under("backbone."),
        "optimizer": {"m": torch.zeros(1)},
    }
    torch.save(content, tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=r"teacher \(2 tensors\), student \(1 tensor\); .* --key teacher"):
        read_checkpoint(tmp_path / "dino.pth")
    assert read_checkpoint(tmp_path / "dino.pth", key="student", prefix="backbone").state.keys() == WEIGHTS.keys()
    with pytest.raises(CheckpointError, match=r"under key 'techer', did you mean 'teacher'.*student \(1 tensor\)"):
        read_checkpoint(tmp_path / "dino.pth", key="techer")
    with pytest.raises(CheckpointError, match=r"no name begins with 'encoder\.'; there are backbone\. \(1 tensor\)"):
        read_checkpoint(tmp_path / "dino.pth", key="student", prefix="encoder.")


def test_the_main_weights_are_taken_before_averaged_ones_which_are_told(tmp_path: Path):
    torch.save({"model_ema": WEIGHTS, "model": WEIGHTS}, tmp_path / "both.pth")
    foreign = read_checkpoint(tmp_path / "both.pth")
    assert (foreign.key, foreign.others) == ("model", {"model_ema": 1})


def test_a_folder_is_no_file_and_its_files_are_named(tmp_path: Path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is a folder; name a file in it: model\.safetensors"):
        read_checkpoint(tmp_path)


def test_options_are_plain_values_by_dotted_names_wherever_a_script_keeps_them(tmp_path: Path):
    content = {
        "model": WEIGHTS,
        "cfg": "AUG:\n  MASK_RATIO: 0.4\n",
        "hyper_parameters": {"lr": 1e-3, "size": (3, 4)},
        "args": {"lr": 2e-3, "dtype": np.float64(0.5), "device": torch.float32},
    }
    torch.save(content, tmp_path / "w.pth")
    options = read_checkpoint(tmp_path / "w.pth").options
    wanted = {"AUG.MASK_RATIO": 0.4, "lr": 2e-3, "size": [3, 4], "dtype": 0.5, "device": "torch.float32"}
    assert options == wanted
    torch.save({"model": WEIGHTS, "cfg": "model = dict(type='MAE')", "args": "{"}, tmp_path / "text.pth")
    assert read_checkpoint(tmp_path / "text.pth").options == {}
