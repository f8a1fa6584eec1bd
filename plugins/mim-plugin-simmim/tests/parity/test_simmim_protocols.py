"""Fine-tuning of our SimMIM against numbers of the official code (microsoft/SimMIM d3e29bc, timm 0.4.12).

Every `eval-finetune-simmim-*` file in `MIM_PARITY_DIR` is one case; by default those committed beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_simmim.checkpoints import COMPUTED, OfficialSwinCheckpoint, OfficialViTCheckpoint
from parity.harness import cases, of_committed_cases, read_json
from parity.protocols import (
    OUTPUT,
    Classes,
    Protocol,
    built,
    check_evaluation,
    check_groups,
    check_mixing,
    check_rates,
    read_protocol,
    run_protocol,
)
from torch import nn

from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

CASES = cases("eval-finetune-simmim-*.safetensors")
RECIPES = {"swin": "simmim_finetune", "vit": "simmim_finetune_vit_base"}
SCHEDULES = read_json("simmim_schedule.json")
COSINES = [each for each in SCHEDULES["schedules"]
           if each["setting"]["scheduler"] == "cosine" and not each["setting"]["accumulation_steps"]]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


def name_of_ours(kind: str, official: str) -> str | None:
    """Official names are those of its pre-training checkpoints without `encoder.`, and a head."""
    if official.endswith(COMPUTED):
        return None
    if official.startswith(("head.", "fc_norm.")):
        return f"heads.main.decoder.{official}"
    layout = OfficialSwinCheckpoint() if kind == "swin" else OfficialViTCheckpoint()
    return layout.our_name(f"encoder.{official}")


def fine_tuning(path: Path, tmp_path: Path, **changes: Any) -> Protocol:
    """The parts and the optimizer of a fine-tuning recipe at the sizes of a case."""
    config = read_protocol(path)[1]["config"]
    recipe = load_recipe(RECIPES[config["type"]], [], Registry()).model_dump(mode="json")
    sizes = {key: config[key] for key in ("patch_size", "embed_dim", "depth", "depths", "num_heads", "window_size")
             if key in config}  # fmt: skip
    mixing = {key: config[key] for key in ("mixup", "cutmix")} | {"label_smoothing": config["smoothing"]}
    slots = {
        "views": {"type": "image", "img_size": config["img_size"], **mixing},
        "encoder": {**recipe["encoder"], **sizes, "drop_path_rate": 0},
        "decoder": recipe["decoder"],
        "loss": recipe["loss"],
    }
    kept = ("type", "shape", "betas", "eps", "counted_from", "lag_steps", "layer_decay_of")
    optim = {key: recipe["optim"][key] for key in kept}
    optim |= {key: config[key] for key in ("layer_decay", "weight_decay", "warmup_lr")}
    optim["clip_grad_norm"] = config["clip_grad"]
    rename = lambda name: name_of_ours(config["type"], name)  # noqa: E731
    return built(path, tmp_path, slots, rename, **{**optim, **changes})


def compare(case: Protocol) -> None:
    """Groups, all steps, rates, and what is said of images in the end."""
    check_groups(case)
    found = run_protocol(case, case.config["iters_per_epoch"])
    assert found["losses"] == pytest.approx(case.tensors["out/losses"].tolist(), rel=OUTPUT)
    if "step/grad_norms" in case.tensors:
        assert found["norms"] == pytest.approx(case.tensors["step/grad_norms"].tolist(), rel=OUTPUT)
    check_rates(case, found["rates"])
    check_evaluation(case)


@of_committed_cases
def test_cases_of_fine_tuning_are_committed():
    assert {read_protocol(path)[1]["config"]["type"] for path in CASES} == {"swin", "vit"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_fine_tuning_ends_at_the_official_weights(path: Path, tmp_path: Path):
    """Features before the head, logits, losses, gradients, weights after steps, rates and decay of every parameter."""
    compare(fine_tuning(path, tmp_path))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_mixing_makes_the_official_images_and_targets(path: Path, tmp_path: Path):
    check_mixing(fine_tuning(path, tmp_path))


FAULTS: dict[str, dict[str, Any]] = {
    "norm eps": {},
    "layer decay": {"layer_decay": 0.9},
    "scaled warm-up and end": {"layer_decay_of": "rate"},
    "no lag": {"lag_steps": 0},
    "cosine after the warm-up": {"counted_from": "warmup_end"},
    "not clipped": {"clip_grad_norm": None},
    "other tables decay": {},
}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_fine_tuning_would_be_found(path: Path, tmp_path: Path, fault: str):
    case = fine_tuning(path, tmp_path, **FAULTS[fault])
    encoder = case.objective.encoder
    if fault == "norm eps":
        for module in case.objective.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5 if module.eps == 1e-6 else 1e-6
    if fault == "other tables decay":
        other = not encoder.config.decay_bias_tables
        encoder.config = encoder.config.model_copy(update={"decay_bias_tables": other})
    with pytest.raises(AssertionError):
        compare(case)


# --- the recipes themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["simmim_finetune", "simmim_finetune_swin_large", "simmim_finetune_vit_base"])
@pytest.mark.parametrize("official", COSINES, ids=lambda each: f"scale{each['setting']['scale']:g}")
def test_the_rate_of_every_iteration_is_the_official_one(recipe: str, official: dict[str, Any]):
    """With a recipe's own rule for the batch, shape, lag and start of the cosine, at the numbers of a setting."""
    setting = official["setting"]
    scale, per_epoch, epochs = setting["scale"], setting["iters_per_epoch"], setting["epochs"]
    changes = {
        "base_lr": setting["base_lr"], "warmup_epochs": setting["warmup_epochs"],
        "warmup_lr": setting["warmup_lr"] * scale, "min_lr": setting["min_lr"] * scale,
    }  # fmt: skip
    options = [f"optim.{key}={value}" for key, value in changes.items()]
    curve = load_recipe(recipe, options, Registry()).optim.lr_curve(setting["batch_size"] * setting["world_size"])
    rates = [value_at(curve, epoch_of(index, per_epoch), epochs, per_epoch) for index in range(epochs * per_epoch)]
    assert rates == pytest.approx(official["lr_per_iteration"], rel=1e-12)


@pytest.mark.parametrize("official", SCHEDULES["finetune_layer_decay"],
                         ids=lambda each: f"{each['encoder']}-{each['layer_decay']}")  # fmt: skip
def test_layer_and_decay_of_every_parameter_are_the_official_ones(official: dict[str, Any]):
    """Of a recipe with as many blocks as the official case, and a fine-tuning's own norm and head."""
    kind, names = official["encoder"], official["keys"]
    if kind == "swin":
        options = {"depths": official["depths"], "num_heads": [1, 2], "embed_dim": 8,
                   "absolute_position": "absolute_pos_embed" in names}  # fmt: skip
    else:
        position = "learned" if "pos_embed" in names else "none"
        options = {"depth": official["depth"], "num_heads": 1, "embed_dim": 8, "position": position}
    changes = [f"encoder.{key}={value}" for key, value in options.items()]
    recipe = load_recipe(RECIPES[kind], [*changes, f"optim.layer_decay={official['layer_decay']}"], Registry())
    with torch.device("meta"):
        objective = build_model(recipe, Registry(), with_weights=False, source=Classes(10)).objective
    [optimizer] = build_optimizers(recipe, objective, 2048).values()
    ours = {name: (group["lr_scale"], recipe.optim.weight_decay * group["decay_scale"])
            for group in optimizer.optimizer.param_groups for name in group["names"]}  # fmt: skip
    wanted = {name_of_ours(kind, name): (key["lr_scale"], key["weight_decay"]) for name, key in names.items()}
    assert ours.keys() == wanted.keys()
    assert {name: ours[name][1] for name in ours} == {name: wanted[name][1] for name in ours}
    assert {n: ours[n][0] for n in ours} == pytest.approx({n: wanted[n][0] for n in ours}, rel=1e-12)
