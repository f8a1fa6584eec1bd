"""Our probes against numbers that the official code computed: DINO, DINOv2, BEiT, V-JEPA, CAE.

Every `eval-knn_*`, `eval-linear-*` and `eval-attentive_*` file in `MIM_PARITY_DIR` is one case; by default those
committed beside this file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_beit import BEiTEncoder
from mim_plugin_beit.checkpoints import OfficialCheckpoint
from parity.harness import cases, named, of_committed_cases, read_json, relative
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask
from mim_framework.contract.specs import Specs, ViewSpec
from mim_framework.evaluate.attentive import PROTOCOLS, HeadTraining, head_scores
from mim_framework.evaluate.few_shot import draw_rows
from mim_framework.evaluate.knn import nearest, votes_of
from mim_framework.evaluate.labelled import top_shares
from mim_framework.evaluate.linear import rightly_classified
from mim_framework.evaluate.sweep import Sweep, half_cosine
from mim_framework.nn.attentive import AttentiveHead, attentive_head

OUTPUT, GRADIENT = 1e-5, 2e-5  # relative
STEP = 1e-5  # absolute

KNN = cases("eval-knn_*.safetensors")
SWEEPS = cases("eval-linear-sweep_*.safetensors")
BEIT = cases("eval-linear-beit_*.safetensors")
ATTENTIVE = cases("eval-attentive_*.safetensors")


@cache
def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    parsed = {key: json.loads(text) if text[:1] in "{[" else text for key, text in metadata.items()}
    return load_file(path), parsed


def ids(path: Path) -> str:
    return path.stem


@of_committed_cases
def test_official_cases_are_committed():
    assert len(KNN) > 1
    assert SWEEPS
    assert BEIT
    assert {read(path)[1]["config"]["kind"] for path in ATTENTIVE} == {"vjepa", "cae"}


# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KNN, ids=ids)
def test_neighbours_and_votes_are_those_of_dino_and_dinov2(path: Path):
    tensors, metadata = read(path)
    config = metadata["config"]
    train_x, train_y = tensors["input/train_features"], tensors["input/train_labels"]
    test_x, test_y = tensors["input/test_features"], tensors["input/test_labels"]
    similarity, neighbours = nearest(train_x, test_x, max(config["ks"]))
    assert torch.equal(neighbours, tensors["out/neighbour_indices"])
    assert relative(similarity, tensors["out/neighbour_similarities"]) < OUTPUT
    total = (similarity / config["T"]).exp().sum(1, keepdim=True)
    for k in config["ks"]:
        votes = votes_of(similarity[:, :k], train_y[neighbours[:, :k]], config["T"], config["classes"])
        assert relative(votes, tensors[f"out/dino/votes_k{k}"]) < OUTPUT
        assert (votes / total - tensors[f"out/dinov2/probas_k{k}"]).abs().max() < 1e-6
        official, order = tensors[f"out/dino/predictions_k{k}"], votes.argsort(1, descending=True)
        order = order[:, : official.shape[1]]
        voted = votes.gather(1, official) > 0
        assert torch.equal(order[voted], official[voted])
        shares = top_shares(votes.masked_fill(votes == 0, -float("inf")), test_y)
        for results in (metadata["results_dino_percent"][str(k)], metadata["results_dinov2_percent"][str(k)]):
            assert 100 * shares["top1"] == pytest.approx(results["top1"], abs=1e-9)
            assert 100 * shares["top5"] == pytest.approx(results["top5_counting_only_classes_with_votes"], abs=1e-9)


@pytest.mark.parametrize("path", KNN, ids=ids)
def test_few_labels_are_drawn_as_by_dinov2(path: Path):
    tensors, metadata = read(path)
    for name, rows in metadata["fewshot_indices"].items():
        n, seed = map(int, name.split("_"))
        assert draw_rows(tensors["input/train_labels"], n, seed).tolist() == rows


@pytest.mark.parametrize("path", KNN[:1], ids=ids)
def test_another_temperature_or_features_as_they_come_would_be_noticed(path: Path):
    tensors, metadata = read(path)
    k, labels = max(metadata["config"]["ks"]), tensors["input/train_labels"]
    similarity, neighbours = nearest(tensors["input/train_features"], tensors["input/test_features"], k)
    votes = votes_of(similarity, labels[neighbours], 1.01 * metadata["config"]["T"], metadata["config"]["classes"])
    assert relative(votes, tensors[f"out/dino/votes_k{k}"]) > 100 * OUTPUT
    plain = (tensors["input/test_features"] @ tensors["input/train_features"].t()).topk(k).indices
    assert not torch.equal(plain, tensors["out/neighbour_indices"])


# --- sweeps of linear classifiers ------------------------------------------------------------------------------------


def dinov2_feature(tokens: Tensor, patches: Tensor, num_blocks: int, with_mean: bool) -> Tensor:
    """Class tokens (blocks, B, D) and patch tokens (blocks, B, N, D) -> what our options `cls` and `cls+mean` read."""
    columns = [*tokens[-num_blocks:]] + ([patches[-1].mean(1)] if with_mean else [])
    return torch.cat(columns, dim=1)


def stacked(tensors: dict[str, Tensor], prefix: str, names: list[str]) -> tuple[Tensor, Tensor]:
    """Weights (H, C, D) and biases (H, C) of classifiers by name."""
    group = named(tensors, prefix)
    weight, bias = ([group[f"classifiers_dict.{name}.linear.{part}"] for name in names] for part in ("weight", "bias"))
    return torch.stack(weight), torch.stack(bias)


def check_sweep(path: Path) -> None:
    tensors, metadata = read(path)
    config, names = metadata["config"], metadata["classifier_names"]
    top1 = {}
    for num_blocks in config["n_last_blocks_list"]:
        for with_mean in (False, True):
            kind = f"{num_blocks}_blocks_avgpool_{with_mean}"
            of_kind = [name for name in names if kind in name]
            rates = [lr * config["batch_size"] * config["world_size"] / 256 for lr in config["learning_rates"]]
            sweep = Sweep(*stacked(tensors, "param", of_kind), rates)
            for step in range(config["steps"]):
                scale = half_cosine(step, config["max_iter"])
                official = [metadata["lr_per_step"][step][name] for name in of_kind]
                assert [rate * scale for rate in rates] == pytest.approx(official, rel=1e-9)
                inputs = tensors["input/class_tokens"][step], tensors["input/patch_tokens"][step]
                x, y = dinov2_feature(*inputs, num_blocks, with_mean), tensors["input/labels"][step]
                if step == 0:
                    assert relative(x, tensors[f"out/feature_{kind}"]) < OUTPUT
                    for scores, name in zip(sweep(x), of_kind, strict=True):
                        assert relative(scores, tensors[f"out/logits_first/{name}"]) < OUTPUT
                    _, *gradients = sweep.gradients(x, y)
                    for ours, theirs in zip(gradients, stacked(tensors, "grad", of_kind), strict=True):
                        assert all(relative(*pair) < GRADIENT for pair in zip(ours, theirs, strict=True))
                losses = sweep.step(x, y, scale)
                assert relative(losses, tensors["out/losses"][step, [names.index(name) for name in of_kind]]) < OUTPUT
                if f"step{step + 1}/classifiers_dict.{of_kind[0]}.linear.weight" in tensors:
                    for ours, theirs in zip(
                        (sweep.weight, sweep.bias), stacked(tensors, f"step{step + 1}", of_kind), strict=True
                    ):
                        assert (ours - theirs).abs().max() < STEP
            inputs = tensors["input/eval_class_tokens"], tensors["input/eval_patch_tokens"]
            x = dinov2_feature(*inputs, num_blocks, with_mean)
            for scores, name in zip(sweep(x), of_kind, strict=True):
                assert relative(scores, tensors[f"out/eval_logits/{name}"]) < OUTPUT
            right, finite = rightly_classified(sweep, x, tensors["input/eval_labels"])
            assert bool(finite.all())
            top1 |= dict(zip(of_kind, (100 * right / len(x)).tolist(), strict=True))
    assert top1 == pytest.approx(metadata["eval_top1_percent"], abs=1e-4)
    assert max(names, key=top1.__getitem__) == metadata["best_classifier"]


@pytest.mark.parametrize("path", SWEEPS, ids=ids)
def test_the_sweep_is_that_of_dinov2(path: Path):
    check_sweep(path)


@pytest.mark.parametrize("path", SWEEPS[:1], ids=ids)
def test_a_sweep_without_momentum_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch):
    def plain(self, parameter, gradient, first, second, rates):
        parameter.sub_(rates * gradient)

    monkeypatch.setattr(Sweep, "_sgd", plain)
    with pytest.raises(AssertionError):
        check_sweep(path)


@torch.no_grad()
def beit_features(path: Path) -> list[list[Tensor]]:
    """Class token beside the mean of patch tokens, raw, of every block and step, by our encoder."""
    tensors, metadata = read(path)
    config = metadata["config"]
    begin = "param/encoder."
    weights = {name.removeprefix(begin): each for name, each in tensors.items() if name.startswith(begin)}
    keys = ("patch_size", "embed_dim", "depth", "num_heads")
    options = {key: config[key] for key in keys} | {"layer_scale": weights["blocks.0.gamma_1"][0].item()}
    size = (config["img_size"],) * 2
    encoder = BEiTEncoder(BEiTEncoder.Config(**options), Specs(views={"x": ViewSpec("x", size=size)})).eval()
    imported = OfficialCheckpoint().import_state(weights)
    state = {name.removeprefix("encoder."): tensor for name, tensor in imported.items()}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert set(missing) <= {"mask_token"}
    assert not unexpected
    ask = Ask(layers=frozenset(range(config["depth"])))
    found = []
    for images in tensors["input/images"]:
        layers = encoder(images, Mask.none(len(images), encoder.spec.grid), ask).layers
        found.append([torch.cat([layers[i][:, 0], layers[i][:, 1:].mean(1)], 1) for i in range(config["depth"])])
    return found


def check_beit(path: Path) -> None:
    tensors, metadata = read(path)
    config, features = metadata["config"], beit_features(path)

    def of(prefix: str, layer: int) -> tuple[Tensor, Tensor]:
        return tensors[f"{prefix}.{layer}.weight"][None], tensors[f"{prefix}.{layer}.bias"][None]

    for layer in range(config["depth"]):
        assert relative(features[0][layer], tensors[f"out/feature_layer{layer}"]) < OUTPUT
        sweep = Sweep(*of("param/classifier.linear", layer), [config["lr"]], optimizer="adamw", weight_decay=1e-4)
        for step in range(config["steps"]):
            x, y = features[step][layer], tensors["input/labels"][step]
            scale = half_cosine(step // config["steps_per_epoch"], config["epochs"])
            assert config["lr"] * scale == pytest.approx(metadata["lr_per_step"][step], rel=1e-9)
            if step == 0:
                assert relative(sweep(x)[0], tensors[f"out/logits_first_layer{layer}"]) < OUTPUT
                _, *gradients = sweep.gradients(x, y)
                for ours, theirs in zip(gradients, of("grad/linear", layer), strict=True):
                    assert relative(ours, theirs) < GRADIENT
            losses = sweep.step(x, y, scale)
            assert losses.item() == pytest.approx(tensors["out/losses"][step, layer].item(), rel=OUTPUT)
            if f"step{step + 1}/linear.{layer}.weight" in tensors:
                for ours, theirs in zip((sweep.weight, sweep.bias), of(f"step{step + 1}/linear", layer), strict=True):
                    assert (ours - theirs).abs().max() < STEP


@pytest.mark.parametrize("path", BEIT, ids=ids)
def test_classifiers_of_every_block_are_those_of_beit(path: Path):
    check_beit(path)


@pytest.mark.parametrize("path", BEIT[:1], ids=ids)
def test_an_adamw_whose_eps_stands_elsewhere_would_be_noticed(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mim_framework.evaluate.sweep.EPS", 1e-3)
    with pytest.raises(AssertionError):
        check_beit(path)


# --- attentive heads -------------------------------------------------------------------------------------------------

OUR_NAMES = {
    "vjepa": {
        "pooler.query_tokens": "pool.query", "pooler.cross_attention_block.xattn.": "pool.",
        "pooler.cross_attention_block.": "pool.",
    },
    "cae": {
        "query_token": "pool.query", "attentive_blocks.0.cross_attn.q_bias": "pool.q.bias",
        "attentive_blocks.0.cross_attn.v_bias": "pool.v.bias", "attentive_blocks.0.cross_attn.": "pool.",
        "attentive_blocks.0.": "pool.", "fc_norm.": "norm.", "head.": "linear.",
    },
}  # fmt: skip


def our_names(kind: str, group: dict[str, Any], unused: list[str]) -> dict[str, Any]:
    """By the names in our head, without the parameters that the official head holds and never uses."""
    found = {}
    for name, value in group.items():
        if name in unused:
            continue
        begin = next((begin for begin in OUR_NAMES[kind] if name.startswith(begin)), None)
        found[name if begin is None else OUR_NAMES[kind][begin] + name.removeprefix(begin)] = value
    return found


def case(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], AttentiveHead, HeadTraining]:
    """A case with our head of its weights, and what trains it."""
    tensors, metadata = read(path)
    config = metadata["config"]
    kind, epochs, steps = config["kind"], config["num_epochs"], config["ipe"]
    head = attentive_head(kind, config["dim"], config["num_classes"], num_heads=config["num_heads"])
    head.load_state_dict(our_names(kind, named(tensors, "param"), metadata["parameters_without_gradient"]))
    schedule = {"warmup_epochs": config["warmup"], "epochs": epochs}
    if kind == "vjepa":
        schedule |= {"warmup_from": config["start_lr"], "min_lr": config["final_lr"], "weight_decay": config["wd"]}
    else:
        schedule |= {"min_lr": config["min_lr"]}
    protocol = replace(PROTOCOLS[kind], **schedule)
    first = config["start_it"]
    training = HeadTraining(head, protocol, lr=config["lr"], epochs=epochs, steps_per_epoch=steps, first_step=first)
    return tensors, metadata, head, training


def check_attentive(path: Path, change: Any = None) -> None:
    tensors, metadata, head, training = case(path)
    config, unused = metadata["config"], metadata["parameters_without_gradient"]
    if change is not None:
        change(head, training)
    zero = our_names(config["kind"], dict.fromkeys(metadata["parameters_with_zero_gradient"]), unused)
    excluded = our_names(config["kind"], metadata["exclude"], unused)

    def compared(name: str, tensor: Tensor) -> Tensor:
        begin, end = excluded.get(name, (0, 0))
        return torch.cat([tensor[:begin], tensor[end:]]) if end else tensor

    for step in range(config["steps"]):
        x, y = tensors["input/tokens"][step], tensors["input/labels"][step]
        lr, decay = training.schedule()
        assert lr == pytest.approx(metadata["lr_per_step"][step], rel=1e-9)
        assert decay == pytest.approx(metadata["weight_decay_per_step"][step][0], rel=1e-9)
        head.train()
        buffers = {name: buffer.clone() for name, buffer in head.named_buffers()}
        scores = head(x)
        assert relative(scores, tensors["out/logits"][step]) < OUTPUT
        if step == 0:
            assert relative(head.pool(x), tensors["out/pooled_first"]) < OUTPUT
        head.zero_grad()
        nn.functional.cross_entropy(scores, y).backward()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
            official = our_names(config["kind"], named(tensors, "grad"), unused)
            assert gradients.keys() == official.keys()
            for name in official.keys() - zero.keys():
                assert relative(compared(name, gradients[name]), compared(name, official[name])) < GRADIENT, name
        norm = torch.linalg.vector_norm(torch.cat([each.grad.flatten() for each in head.parameters()])).item()
        assert norm == pytest.approx(tensors["step/grad_norms"][step].item(), rel=GRADIENT)
        for name, buffer in head.named_buffers():
            buffer.copy_(buffers[name])
        loss = training.step(x, y)
        assert loss.item() == pytest.approx(tensors["out/losses"][step].item(), rel=OUTPUT)
        state = head.state_dict()
        for name, theirs in our_names(config["kind"], named(tensors, f"step{step + 1}"), unused).items():
            if name not in zero:
                assert (compared(name, state[name]) - compared(name, theirs)).abs().max() < STEP, name
    assert relative(head_scores(head, tensors["input/eval_tokens"]), tensors["out/eval_logits"]) < OUTPUT


@pytest.mark.parametrize("path", ATTENTIVE, ids=ids)
def test_attentive_heads_train_as_the_official_ones(path: Path):
    check_attentive(path)


@pytest.mark.parametrize("path", ATTENTIVE, ids=ids)
def test_a_norm_with_another_eps_would_be_noticed(path: Path):
    def change(head: AttentiveHead, training: HeadTraining) -> None:
        for module in head.modules():
            if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
                module.eps = {1e-5: 1e-6, 1e-6: 1e-5}[module.eps]

    with pytest.raises(AssertionError):
        check_attentive(path, change)


@pytest.mark.parametrize("path", ATTENTIVE, ids=ids)
def test_a_schedule_that_is_one_step_off_would_be_noticed(path: Path):
    def change(head: AttentiveHead, training: HeadTraining) -> None:
        training.done -= 1

    with pytest.raises(AssertionError):
        check_attentive(path, change)


# --- schedules of whole runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("cae_attentive", "cae"), ("vjepa_attentive", "vjepa")])
def test_rates_of_a_whole_run_are_the_official_ones(name: str, kind: str):
    setting, protocol = read_json("eval-schedules.json")["schedules"][name], PROTOCOLS[kind]
    steps = setting.get("iters_per_epoch") or setting["iterations"] // protocol.epochs
    head = nn.Linear(2, 2)
    training = HeadTraining(head, protocol, lr=protocol.lr, epochs=protocol.epochs, steps_per_epoch=steps)
    assert training.total_steps == len(setting["lr_per_iteration"])
    rates, decays = [], []
    for step in range(training.total_steps):
        training.done = step
        lr, decay = training.schedule()
        rates.append(lr)
        decays.append(decay)
    assert rates == pytest.approx(setting["lr_per_iteration"], rel=1e-9, abs=1e-15)
    if "weight_decay_per_iteration" in setting:
        assert decays == pytest.approx(setting["weight_decay_per_iteration"], rel=1e-9)


def test_rates_of_a_whole_sweep_are_those_of_dinov2():
    setting = read_json("eval-schedules.json")["schedules"]["dinov2_linear"]
    ours = [setting["lr"] * half_cosine(step, setting["max_iter"]) for step in range(setting["max_iter"])]
    assert ours == pytest.approx(setting["lr_per_iteration"], rel=1e-9)
