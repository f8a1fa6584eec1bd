"""Linear probing and fine-tuning of our MAE against numbers of the official code (facebookresearch/mae, efb2a806).

Every `eval-linprobe_*` and `eval-finetune_*` file in `MIM_PARITY_DIR` is one case; by default those committed beside
this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_mae import MAEEncoder
from parity.harness import cases, named, of_committed_cases, read_json, relative
from parity.protocols import (
    OUTPUT,
    Protocol,
    built,
    check_evaluation,
    check_groups,
    check_mixing,
    check_numbers,
    check_rates,
    check_state,
    read_protocol,
    run_protocol,
    step_at,
)
from torch import Tensor, nn

from mim_framework.assembly.builder import build_optimizers
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.base.section import Section
from mim_framework.builtins.classification import Classifier, Classify
from mim_framework.builtins.losses import CrossEntropyLoss
from mim_framework.builtins.maskers import NoMasker
from mim_framework.builtins.targets import LabelTarget
from mim_framework.contract.components import Encoder, Head, Parts
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec, Specs, ViewSpec
from mim_framework.data.labels import LABEL
from mim_framework.data.views import resize_and_center, sides_of_crop
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import Optimizer, OptimSection

FINE_TUNING, PROBES = cases("eval-finetune_*.safetensors"), cases("eval-linprobe_*.safetensors")
ONLY_IMAGES = [path for path in PROBES if not read_protocol(path)[1]["config"]["features_only"]]
ONLY_FEATURES = [path for path in PROBES if path not in ONLY_IMAGES]
EXEMPT = [{"parameters": ["encoder.cls_token", "encoder.pos_embed"], "weight_decay": 0}]
WEIGHT_OF_PROBE = 1e-6

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


def our_name(official: str) -> str | None:
    """`head` is a layer in fine-tuning, and a batch norm with a layer in linear probing."""
    if official.startswith("head.0."):
        return official.replace("head.0.", "heads.main.decoder.batch_norm.")
    if official.startswith(("head.", "fc_norm.")):
        return f"heads.main.decoder.{official.replace('head.1.', 'head.')}"
    return f"encoder.{official}"


def slots(config: dict[str, Any], *, probe: bool) -> dict[str, Any]:
    """The parts of the recipes `mae_linear` and `mae_finetune` at the size of a case."""
    sizes = {key: config[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    mean = {"pool": "mean", "norm": "new"} if config["global_pool"] else {"pool": "cls", "norm": "encoder"}
    smoothing = 0.0 if probe else config["smoothing"]
    mixing = {key: config.get(key, 0.0) for key in ("mixup", "cutmix")}
    return {
        "views": {"type": "image", "img_size": config["img_size"], "label_smoothing": smoothing, **mixing},
        "encoder": {"type": "mae_vit", **sizes, "learn_positions": not probe},
        "decoder": {"type": "classifier", **mean, "batch_norm": probe, "init_std": 0.01 if probe else 2e-5},
        "loss": "cross_entropy",
    }


def fine_tuning(path: Path, tmp_path: Path, **changes: Any) -> Protocol:
    config = read_protocol(path)[1]["config"]
    optim = {key: config[key] for key in ("layer_decay", "weight_decay")}
    optim |= {"clip_grad_norm": config["clip_grad"], "multipliers": EXEMPT}
    return built(path, tmp_path, slots(config, probe=False), our_name, **{**optim, **changes})


def steps_per_epoch(case: Protocol) -> int:
    rates = len(case.metadata["lr_schedule_all_steps"]) if "lr_schedule_all_steps" in case.metadata else None
    return case.config["steps_per_epoch"] if rates is None else rates // case.config["epochs"]


@of_committed_cases
def test_cases_of_protocols_are_committed():
    assert FINE_TUNING
    assert ONLY_IMAGES
    assert ONLY_FEATURES


@pytest.mark.parametrize("path", FINE_TUNING, ids=lambda path: path.stem)
def test_fine_tuning_ends_at_the_official_weights(path: Path, tmp_path: Path):
    """Features before the head, logits, losses, gradients, weights after steps, rates and decay of every parameter."""
    case = fine_tuning(path, tmp_path)
    check_groups(case)
    found = run_protocol(case, steps_per_epoch(case))
    assert found["losses"] == pytest.approx(case.tensors["out/losses"].tolist(), rel=OUTPUT)
    if "step/grad_norms" in case.tensors:
        assert found["norms"] == pytest.approx(case.tensors["step/grad_norms"].tolist(), rel=OUTPUT)
    check_rates(case, found["rates"])
    check_evaluation(case)


@pytest.mark.parametrize("path", [path for path in FINE_TUNING if read_protocol(path)[1]["config"]["mixup"]],
                         ids=lambda path: path.stem)  # fmt: skip
def test_mixing_makes_the_official_images_and_targets(path: Path, tmp_path: Path):
    check_mixing(fine_tuning(path, tmp_path))


@pytest.mark.parametrize("path", FINE_TUNING[:1], ids=lambda path: path.stem)
@pytest.mark.parametrize("fault", ["norm eps", "norm carried over", "class token in the mean", "layer decay", "min_lr"])
def test_a_wrong_fine_tuning_would_be_found(path: Path, tmp_path: Path, fault: str):
    changes = {"layer decay": {"layer_decay": 0.9}, "min_lr": {"layer_decay_of": "peak"}}.get(fault, {})
    case = fine_tuning(path, tmp_path, **changes)
    decoder = case.objective.heads["main"].decoder
    if fault == "norm eps":
        for module in case.objective.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
    if fault == "norm carried over":
        decoder.fc_norm = nn.Sequential(nn.LayerNorm(decoder.head.in_features), decoder.fc_norm)
    if fault == "class token in the mean":
        decoder.num_prefix_tokens = 0
    with pytest.raises((AssertionError, KeyError)):
        check_rates(case, run_protocol(case, steps_per_epoch(case))["rates"])


class Given(Encoder):
    """In place of an encoder: features as its class token."""

    name = "given"

    def __init__(self, dim: int) -> None:
        super().__init__(Section(), Specs())
        self.spec = EncoderSpec(dim, Grid((1, 1)), 1, 1, 1, num_prefix_tokens=1)

    def forward(self, view: Tensor, mask: Any, ask: Ask = Ask()) -> Latent:
        return Latent(view[:, None], self.spec.grid, prefix=view[:, None])


def probe_of_features(path: Path) -> Protocol:
    """The head of a linear probe alone, whose encoder is given by its features."""
    tensors, metadata = read_protocol(path)
    config = metadata["config"]
    tensors = dict(tensors) | {
        "input/images": tensors["input/features"],
        "input/eval_images": tensors["input/eval_features"],
    }
    labels = ViewSpec.of_kind("labels", LABEL, num_classes=config["num_classes"])
    encoder = Given(config["embed_dim"])
    specs = Specs(views={"x": ViewSpec("x", size=(1, 1)), LABEL: labels}, encoder=encoder.spec)
    masker = NoMasker(Section(), specs)
    target = LabelTarget(LabelTarget.Config(), specs)
    decoder = Classifier(Classifier.Config(pool="cls", batch_norm=True, init_std=0.01), specs.also(target=target.spec))
    head = Head(target, decoder, CrossEntropyLoss(CrossEntropyLoss.Config(), specs))
    objective = Classify(Classify.Config(), Parts(masker, encoder, {"main": head}, None, specs))
    section = {"type": "lars_mocov3", "lr": config["lr"], "weight_decay": config["weight_decay"],
               "warmup_epochs": config["warmup_epochs"], "min_lr": config["min_lr"]}  # fmt: skip
    recipe = load_recipe("mae_linear", [f"optim={section}", f"train.epochs={config['epochs']}"], Registry())
    case = Protocol(path, tensors, metadata, recipe, objective, our_name)
    objective.load_state_dict(case.group("param"))
    return case


def probe_of_images(path: Path, tmp_path: Path) -> Protocol:
    config = read_protocol(path)[1]["config"]
    frozen = ["encoder.*", *(["*.fc_norm.*"] if config["global_pool"] else [])]
    train = {"total_batch_size": 2, "epochs": config["epochs"], "frozen": frozen}
    changes = {"type": "lars_mocov3", "weight_decay": config["weight_decay"]}
    return built(path, tmp_path, {**slots(config, probe=True), "train": train}, our_name, **changes)


def run_probe(case: Protocol) -> None:
    """All steps of a linear probe, with statistics and weights after each."""
    objective, [optimizer] = case.objective.train(), build_optimizers(case.recipe, case.objective, 1).values()
    decoder, accum = objective.heads["main"].decoder, case.accum_steps
    seen: dict[str, Tensor] = {}
    decoder.fc_norm.register_forward_hook(lambda module, inputs, out: seen.update(features=out))
    decoder.head.register_forward_hook(lambda module, inputs, out: seen.update(logits=out))
    rates = []
    for index, rate in enumerate(case.metadata["lr_per_step"]):
        for number in range(index * accum, (index + 1) * accum):
            images, labels = (case.tensors[f"input/{name}"][number] for name in ("images", "labels"))
            step = step_at(case, index, case.config["steps_per_epoch"], len(images))
            loss = sum(objective(step, {"x": images, LABEL: labels.long()}).losses.values())
            (loss / accum).backward()
            assert relative(seen["features"], case.tensors["out/features"][number]) < OUTPUT
            assert relative(seen["logits"], case.tensors["out/logits"][number]) < OUTPUT, number
            assert loss.item() == pytest.approx(case.tensors["out/losses"][number].item(), rel=OUTPUT)
        for name, official in case.group(f"grad{index + 1}").items():
            assert relative(dict(objective.named_parameters())[name].grad, official) < 2e-5, name
        optimizer.schedule(step)
        rates.append(optimizer.lr)
        assert optimizer.lr == pytest.approx(rate, rel=1e-12, abs=0)
        optimizer.step()
        for component in objective.components():
            component.after_step(step)
        objective.zero_grad()
        check_state(case, index + 1, {"decoder.head": WEIGHT_OF_PROBE})
    state = optimizer.optimizer.state
    for name, official in named(case.tensors, "final").items():
        ours = state[getattr(decoder.head, name.removeprefix("momentum."))]["momentum"]
        assert relative(ours, official) < OUTPUT
    with torch.no_grad():
        check_numbers(case, objective.eval().logits({"x": case.tensors["input/eval_images"]}))


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_linear_probing_ends_at_the_official_weights(path: Path, tmp_path: Path):
    """Nothing of the encoder trains or keeps activations; batch norm, LARS and rates are the official ones."""
    case = probe_of_features(path) if path in ONLY_FEATURES else probe_of_images(path, tmp_path)
    assert {name for name, p in case.objective.named_parameters() if p.requires_grad} == {
        "heads.main.decoder.head.weight", "heads.main.decoder.head.bias",
    }  # fmt: skip
    run_probe(case)


@pytest.mark.parametrize("path", ONLY_FEATURES, ids=lambda path: path.stem)
@pytest.mark.parametrize("fault", ["eps", "momentum", "bias adapted", "decay of the bias", "rate in the momentum"])
def test_a_wrong_probe_would_be_found(path: Path, fault: str, monkeypatch: pytest.MonkeyPatch):
    case = probe_of_features(path)
    norm = case.objective.heads["main"].decoder.batch_norm
    if fault == "eps":
        norm.eps = 1e-5
    if fault == "momentum":
        norm.momentum = 0.2
    if fault in ("bias adapted", "decay of the bias", "rate in the momentum"):
        from mim_framework.runtime import lars

        def step(self: lars.LARS) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    update, decays = p.grad, p.ndim > 1 or fault == "decay of the bias"
                    update = update + (case.config["weight_decay"] if decays else 0) * p
                    if p.ndim > 1 or fault == "bias adapted":
                        update = update * lars.trust_ratio(p, update, 0.001)
                    inside = fault == "rate in the momentum"
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(0.9).add_(update, alpha=group["lr"] if inside else 1)
                    p.data.add_(momentum, alpha=-1 if inside else -group["lr"])

        monkeypatch.setattr(lars.LARS, "step", torch.no_grad()(step))
    with pytest.raises(AssertionError):
        run_probe(case)


@pytest.mark.parametrize("official", read_json("eval-partial.json")["cases"],
                         ids=lambda case: f"{case['blocks']}-{'mean' if case['global_pool'] else 'cls'}")  # fmt: skip
def test_partial_fine_tuning_trains_exactly_these_parameters(official: dict[str, Any]):
    """ViT-B on 224 pixels with 1000 classes."""
    with torch.device("meta"):
        specs = Specs(views={"x": ViewSpec("x", size=(224, 224)),
                             LABEL: ViewSpec.of_kind("labels", LABEL, num_classes=1000)})  # fmt: skip
        encoder = MAEEncoder(MAEEncoder.Config(learn_positions=True), specs)
        specs = specs.also(encoder=encoder.spec)
        target = LabelTarget(LabelTarget.Config(), specs)
        pooling = {"pool": "mean", "norm": "new"} if official["global_pool"] else {"pool": "cls"}
        decoder = Classifier(Classifier.Config(**pooling), specs.also(target=target.spec))
        head = Head(target, decoder, CrossEntropyLoss(CrossEntropyLoss.Config(), specs))
        parts = Parts(NoMasker(Section(), specs), encoder, {"main": head}, None, specs)
        objective = Classify(Classify.Config(trained_blocks=official["blocks"]), parts)
    trained = {name: p.numel() for name, p in objective.named_parameters() if p.requires_grad}
    assert trained.keys() == {our_name(name) for name in official["trainable"]}
    assert sum(trained.values()) == official["trainable_parameters"]
    frozen = objective.encoder.blocks[: 12 - int(official["blocks"] + 0.5)]
    assert not any(module.training for block in frozen for module in block.modules())


RECIPES = {"mae_finetune_base": "mae_finetune", "mae_finetune_large": "mae_finetune_vit_large",
           "mae_linprobe": "mae_linear"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_learning_rate_of_every_iteration_of_a_recipe_is_the_official_one(name: str):
    official = read_json("eval-schedules.json")["schedules"][name]
    recipe = load_recipe(RECIPES[name], [], Registry())
    assert recipe.train.epochs == official["epochs"]
    curve, per_epoch = recipe.optim.lr_curve(recipe.train.total_batch_size), official["iters_per_epoch"]
    epochs = [epoch_of(index, per_epoch) for index in range(official["epochs"] * per_epoch)]
    assert [value_at(curve, epoch, official["epochs"]) for epoch in epochs] == official["lr_per_iteration"]


def test_the_crop_of_linear_probing_has_the_official_sides():
    facts = read_json("eval-crop_a.json")
    for box in facts["official_linprobe_crop"]:
        sides = sides_of_crop(box["area_fraction"], box["aspect"], box["height"], box["width"])
        assert sides == (box["crop_height"], box["crop_width"]), box
    ordinary = [box for box in facts["torchvision_crop"] if (box["width"], box["height"]) == (640, 120)]
    drawn_once = [box for box in facts["official_linprobe_crop"] if (box["width"], box["height"]) == (640, 120)]
    assert [box["crop_width"] for box in ordinary] != [box["crop_width"] for box in drawn_once]


def test_evaluation_resizes_and_cuts_where_the_official_code_does():
    for case in read_json("eval-crop_a.json")["resize_center_crop"]:
        crop = (case["crop"], case["crop"])
        found = resize_and_center(case["height"], case["width"], crop, case["crop"] / case["resize"])
        assert found == ((case["resized_height"], case["resized_width"]), case["top"], case["left"]), case


def test_the_factor_of_layer_decay_scales_the_peak_only_where_the_recipe_says_so(tmp_path: Path):
    """SimMIM: warm-up and end at one rate for all."""
    section = OptimSection(lr=1.0, min_lr=0.1, warmup_epochs=1, warmup_lr=0.2, layer_decay_of="peak",
                           multipliers=[{"parameters": ["a"], "lr": 0.5}])  # fmt: skip
    parameters = [(name, nn.Parameter(torch.zeros(2, 2))) for name in ("a", "b")]
    optimizer = Optimizer("main", section, parameters, (), 1)

    def rates(epoch: float) -> list[float]:
        optimizer.schedule(step_of(epoch))
        return [group["lr"] for group in optimizer.optimizer.param_groups]

    def step_of(epoch: float) -> Any:
        from mim_framework.contract.step import Step
        from mim_framework.contract.world import World

        return Step(0, 1, epoch, 3.0, torch.arange(1), 0, World(), 10)

    assert rates(0.0) == [0.2, 0.2]
    assert rates(1.0) == [0.5, 1.0]
    assert rates(3.0) == pytest.approx([0.1, 0.1])
