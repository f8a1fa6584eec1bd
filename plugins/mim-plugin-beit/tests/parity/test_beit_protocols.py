"""Fine-tuning and linear probing of our BEiT against numbers of the official code (microsoft/unilm 768a3c8).

Every `eval-finetune-beit_*` and `eval-linear-beit_*` file in `MIM_PARITY_DIR` is one case; by default those committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.harness import cases, curve_per_iteration, of_committed_cases, read_json, relative
from parity.protocols import (
    OUTPUT,
    Classes,
    Protocol,
    built,
    check_evaluation,
    check_first_gradients,
    check_groups,
    check_mixing,
    check_rates,
    check_state,
    read_protocol,
    run_protocol,
    step_at,
)
from torch import Tensor, nn

from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.data.labels import LABEL
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

FINE_TUNING, PROBES = cases("eval-finetune-beit_*.safetensors"), cases("eval-linear-beit_*.safetensors")
LAYER_DECAY = [
    case
    for case in read_json("beit_layer_decay.json")["cases"]
    if case["use_rel_pos_bias"] and case["use_mean_pooling"]
]
NONE: dict[str, Any] = {}
SCHEDULES = read_json("eval-schedules.json")["schedules"]

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


def our_name(official: str) -> str | None:
    """Official name, of fine-tuning or of the linear probe -> ours; indices of bias tables follow from the sizes."""
    if official.endswith("relative_position_index"):
        return None
    official = official.removeprefix("classifier.").removeprefix("encoder.")
    if official.startswith("linear."):
        _, number, inside = official.split(".")
        return f"heads.block{number}.decoder.head.{inside}"
    return f"heads.main.decoder.{official}" if official.startswith(("head.", "fc_norm.")) else f"encoder.{official}"


def encoder_of(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sizes = {key: config[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    return {"type": "beit", **sizes, "layer_scale": config.get("init_values", 0.1), **changes}


def fine_tuning(path: Path, tmp_path: Path, encoder: Mapping[str, Any] = NONE, **changes: Any) -> Protocol:
    """A case in the slots of `beit_finetune`."""
    config = read_protocol(path)[1]["config"]
    tables = {"relative_bias": "per_block", "decay_bias_tables": not config["no_decay_on_rel_pos_bias"], **encoder}
    pooling = {"pool": "mean", "norm": "new"} if config["use_mean_pooling"] else {"pool": "cls", "norm": "encoder"}
    mixing = {"mixup": config["mixup"], "cutmix": config["cutmix"], "label_smoothing": config["smoothing"]}
    slots = {
        "views": {"type": "image", "img_size": config["img_size"], **mixing},
        "encoder": encoder_of(config, mlp_ratio=config["mlp_ratio"], **tables),
        "decoder": {"type": "classifier", **pooling, "init_std": 2e-5},
        "loss": "cross_entropy",
    }
    optim = {key: config[key] for key in ("layer_decay", "weight_decay")}
    optim |= {"clip_grad_norm": config["clip_grad"], "warmup_inclusive": True}
    return built(path, tmp_path, slots, our_name, **{**optim, **changes})


def steps_per_epoch(case: Protocol) -> int:
    return len(case.metadata["lr_schedule_all_steps"]) // case.config["epochs"]


def check_fine_tuning(case: Protocol) -> None:
    """Features before the head, logits, losses, gradients, weights after steps, rates and decay of every parameter."""
    check_groups(case)
    found = run_protocol(case, steps_per_epoch(case))
    assert found["losses"] == pytest.approx(case.tensors["out/losses"].tolist(), rel=OUTPUT)
    assert found["norms"] == pytest.approx(case.tensors["step/grad_norms"].tolist(), rel=OUTPUT)
    check_rates(case, found["rates"])
    check_evaluation(case)


@of_committed_cases
def test_cases_of_protocols_are_committed():
    assert {path.stem for path in FINE_TUNING} >= {"eval-finetune-beit_a", "eval-finetune-beit_b"}
    assert PROBES


@pytest.mark.parametrize("path", FINE_TUNING, ids=lambda path: path.stem)
def test_fine_tuning_ends_at_the_official_weights(path: Path, tmp_path: Path):
    check_fine_tuning(fine_tuning(path, tmp_path))


@pytest.mark.parametrize("path", [path for path in FINE_TUNING if read_protocol(path)[1]["config"]["mixup"]],
                         ids=lambda path: path.stem)  # fmt: skip
def test_mixing_makes_the_official_images_and_targets(path: Path, tmp_path: Path):
    check_mixing(fine_tuning(path, tmp_path))


FAULTS: dict[str, dict[str, Any]] = {
    "norm eps": {},
    "tanh GELU": {},
    "norm carried over": {},
    "class token in the mean": {},
    "layer decay": {"layer_decay": 0.9},
    "only the peak scaled": {"layer_decay_of": "peak"},
    "warm-up without its end": {"warmup_inclusive": False},
    "no clipping": {"clip_grad_norm": None},
    "tables do not decay": {"encoder": {"decay_bias_tables": False}},
}


def shows(path: Path, fault: str) -> bool:
    """Whether a case can show it: in a warm-up from 0 nothing tells what the factor of a layer scales."""
    config = read_protocol(path)[1]["config"]
    if fault == "only the peak scaled":
        return config["start_epoch"] >= config["warmup_epochs"]
    clipped = config["clip_grad"] and config["clip_grad"] < read_protocol(path)[0]["step/grad_norms"].max()
    return config["start_epoch"] == 0 and config["use_mean_pooling"] and bool(clipped)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_fine_tuning_would_be_found(tmp_path: Path, fault: str):
    path = next((path for path in FINE_TUNING if shows(path, fault)), None)
    if path is None:
        pytest.skip("no case shows it")
    case = fine_tuning(path, tmp_path, **FAULTS[fault])
    decoder = case.objective.heads["main"].decoder
    for module in case.objective.modules():
        if fault == "norm eps" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    if fault == "norm carried over":
        decoder.fc_norm = nn.Sequential(nn.LayerNorm(decoder.head.in_features), decoder.fc_norm)
    if fault == "class token in the mean":
        decoder.num_prefix_tokens = 0
    with pytest.raises(AssertionError):
        check_fine_tuning(case)


# --- linear probes ---------------------------------------------------------------------------------------------------


def probe(path: Path, tmp_path: Path, decoder: Mapping[str, Any] = NONE, **changes: Any) -> Protocol:
    """A case with the heads and the optimizer of `beit_linear`."""
    config = read_protocol(path)[1]["config"]
    shipped = load_recipe("beit_linear", [], Registry())
    names = list(shipped.heads)[: config["depth"]]
    heads = {
        name: {
            "target": "labels",
            "loss": "cross_entropy",
            "decoder": {"type": "classifier", **shipped.heads[name].decoder.options, **decoder},
        }
        for name in names
    }
    slots = {
        "views": {"type": "image", "img_size": config["img_size"]},
        "encoder": encoder_of(config),
        "heads": heads,
        "train": {"total_batch_size": config["batch"], "epochs": config["epochs"], "frozen": ["encoder.*"]},
    }
    optim = shipped.optim.model_dump(include={"type", "weight_decay", "per_epoch", "min_lr", "warmup_epochs"})
    return built(path, tmp_path, slots, our_name, **{**optim, **changes})


def run_probe(case: Protocol) -> None:
    """Every step: features, logits, the loss of each block, first gradients, rates, weights where the file has them."""
    objective, [optimizer] = case.objective.train(), build_optimizers(case.recipe, case.objective, 1).values()
    seen: list[tuple[Tensor, Tensor]] = []  # in the order of the heads, step after step
    for head in objective.heads.values():
        head.decoder.head.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    for index, rate in enumerate(case.metadata["lr_per_step"]):
        images, labels = (case.tensors[f"input/{name}"][index] for name in ("images", "labels"))
        step = step_at(case, index, case.config["steps_per_epoch"], len(images))
        losses = objective(step, {"x": images, LABEL: labels}).losses
        assert [loss.item() for loss in losses.values()] == pytest.approx(
            case.tensors["out/losses"][index].tolist(), rel=OUTPUT
        )
        sum(losses.values()).backward()
        if index == 0:
            for number, (features, logits) in enumerate(seen):
                assert relative(features, case.tensors[f"out/feature_layer{number}"]) < OUTPUT
                assert relative(logits, case.tensors[f"out/logits_first_layer{number}"]) < OUTPUT
            check_first_gradients(case)
        optimizer.schedule(step)
        assert optimizer.lr == pytest.approx(rate, rel=1e-9)
        optimizer.step()
        objective.zero_grad()
        check_state(case, index + 1)


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_the_linear_probe_of_every_block_ends_at_the_official_weights(path: Path, tmp_path: Path):
    case = probe(path, tmp_path)
    trained = {name for name, parameter in case.objective.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in case.group("param") if name.startswith("heads.")}
    run_probe(case)


@pytest.mark.parametrize("path", PROBES[:1], ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "changes", [{"per_epoch": False}, {"min_lr": 1e-3}, {"decoder": {"layer": -1}}], ids=lambda changes: str(changes)
)
def test_a_wrong_linear_probe_would_be_found(path: Path, tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(AssertionError):
        run_probe(probe(path, tmp_path, **changes))


# --- the recipes -----------------------------------------------------------------------------------------------------


def per_iteration(name: str, official: dict[str, Any]) -> list[float]:
    recipe = load_recipe(name, [], Registry())
    assert recipe.train.epochs == official["epochs"]
    return curve_per_iteration(recipe.optim.lr_curve(recipe.train.total_batch_size), official)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("beit_finetune", "beit_finetune_base"), ("beit_finetune_vit_large", "beit_finetune_large")],
)
def test_the_learning_rate_of_every_iteration_of_a_recipe_is_the_official_one(name: str, schedule: str):
    assert per_iteration(name, SCHEDULES[schedule]) == pytest.approx(SCHEDULES[schedule]["lr_per_iteration"], rel=1e-12)


def test_the_learning_rate_of_every_epoch_of_the_linear_probe_is_the_official_one():
    """Which has them by a recurrence that loses digits where the rate nears 0."""
    official = SCHEDULES["dino_and_beit_linear"]
    ours = per_iteration("beit_linear", {**official, "iters_per_epoch": 3})
    assert ours == pytest.approx([rate for rate in official["lr_per_epoch"] for _ in range(3)], rel=1e-9)


def rules_of(name: str, official: dict[str, Any], *changes: str) -> dict[str, tuple[float, float]]:
    """(factor of the rate, weight decay) of every parameter that a shipped recipe trains, at another size."""
    sizes = ["depth=4", "embed_dim=16", "num_heads=2", "position=learned"]
    exempt = f"decay_bias_tables={str(not official['disable_weight_decay_on_rel_pos_bias']).lower()}"
    small = ["views.img_size=32", *(f"encoder.{change}" for change in (*sizes, exempt)), *changes]
    recipe = load_recipe(name, small, Registry())
    model = build_model(recipe, Registry(), source=Classes(10))
    [optimizer] = build_optimizers(recipe, model.objective, 1).values()
    decay = recipe.optim.weight_decay
    return {
        parameter: (group["lr_scale"], decay * group["decay_scale"])
        for group in optimizer.optimizer.param_groups
        for parameter in group["names"]
    }


OF_DECAY = {0.65: "beit_finetune", 0.75: "beit_finetune_vit_large"}


@pytest.mark.parametrize("official", LAYER_DECAY, ids=lambda case: f"{case['layer_decay']}-"
                         f"{'exempt' if case['disable_weight_decay_on_rel_pos_bias'] else 'all'}")  # fmt: skip
def test_a_recipe_scales_and_decays_every_parameter_as_the_official_code(official: dict[str, Any]):
    name = OF_DECAY.get(official["layer_decay"], "beit_finetune")
    change = [] if official["layer_decay"] in OF_DECAY else [f"optim.layer_decay={official['layer_decay']}"]
    wanted = {our_name(key): (rule["lr_scale"], rule["weight_decay"]) for key, rule in official["keys"].items()}
    assert rules_of(name, official, *change) == wanted
    assert rules_of(name, official, "optim.layer_decay=0.7") != wanted


PARAMETERS = {"beit_finetune": 86_530_984, "beit_finetune_vit_large": 304_430_568, "beit_linear": 12 * 1_537_000}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_trains_as_many_parameters_as_the_official_model_has(name: str):
    with torch.device("meta"):
        model = build_model(load_recipe(name, [], Registry()), Registry(), source=Classes(1000))
    assert sum(p.numel() for p in model.objective.parameters() if p.requires_grad) == PARAMETERS[name]
