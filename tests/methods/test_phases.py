"""Several phases and several optimizers (ADIOS, CAPI)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from methods.harness import (
    EMA,
    GRID,
    NO_HEAD,
    SGD,
    assert_same_weights,
    lines_of,
    on_two_ranks,
    plugin,
    run,
    watch,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, softmax

from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.contract.components import Loss, Objective, Target
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Pred
from mim_framework.contract.specs import TargetSpec
from mim_framework.nn.patches import patchify, unpatchify
from mim_framework.testing.runs import same, state_of


@plugin
class Occlusion(Objective):
    """An encoder pulls an image and its occluded version together; a soft masker pushes them apart (ADIOS)."""

    name = "occlusion"
    seen: list[tuple[str, dict[str, Tensor]]] = []

    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.encoder = parts.encoder
        self.occluder = nn.Sequential(nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 1))

    def forward(self, step, views):
        x = views["x"]
        patches = patchify(x, 4)
        keep = self.occluder(patches).sigmoid()
        if step.phase == "encode":
            keep = keep.detach()
        nothing = Mask.none(len(x), GRID, x.device)
        occluded = unpatchify(patches * keep, 4, GRID)
        pair = [self.encoder(image, nothing).pooled() for image in (x, occluded)]
        return {"distance": 1 - cosine_similarity(*pair).mean()}

    def after_step(self, step):
        self.seen.append((step.phase, state_of(self)))


ADIOS = {
    "objective": "occlusion",
    "masker": "none",
    "optim": None,
    "optimizers": {
        "encoder": {**SGD, "parameters": ["encoder.*"]},
        "masker": {**SGD, "parameters": ["occluder.*"]},
    },
    "phases": [
        {"name": "encode", "optimizers": ["encoder"]},
        {"name": "occlude", "optimizers": ["masker"], "sign": -1},
    ],
    **NO_HEAD,
}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts of the objective of which something changed."""
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def phases_move_their_own(start: dict[str, Tensor], seen: list[tuple[str, dict[str, Tensor]]]) -> bool:
    states = [start, *(state for _, state in seen)]
    return [(phase, moved(a, b)) for (phase, _), a, b in zip(seen, states, states[1:], strict=False)] == [
        ("encode", {"encoder"}),
        ("occlude", {"occluder"}),
    ] * (len(seen) // 2)


def test_phases_of_opposite_sign_move_only_their_own_parameters(tmp_path):
    Occlusion.seen = []
    _, states = watch(tmp_path / "against", lambda model: state_of(model.objective), "train.steps=2", **ADIOS)
    against = Occlusion.seen
    assert phases_move_their_own(states[0], against)

    Occlusion.seen = []
    run(tmp_path / "with", "train.steps=2", "phases.1.sign=1", **ADIOS)
    bias = "occluder.2.bias"
    (_, start), (_, up), (_, down) = against[0], against[1], Occlusion.seen[1]
    assert torch.allclose(up[bias] - start[bias], start[bias] - down[bias], atol=1e-8)
    assert (up[bias] - start[bias]).abs() > 1e-6


def test_phases_on_two_ranks_move_what_they_move_on_one(tmp_path):
    Occlusion.seen = []
    alone, (start, *_) = watch(tmp_path / "alone", lambda model: state_of(model.objective), teachers=EMA, **ADIOS)
    Occlusion.seen = []
    ranks, (first, second) = on_two_ranks(tmp_path / "ranks", lambda trainer: Occlusion.seen, teachers=EMA, **ADIOS)
    assert phases_move_their_own(start, first)
    assert all(same(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    assert_same_weights(ranks, alone, atol=1e-6)


def test_a_teacher_moves_once_in_a_step_of_several_phases(tmp_path):
    _, seen = watch(
        tmp_path,
        lambda model: (state_of(model.objective.encoder), state_of(model.teachers["ema"].part("encoder"))),
        teachers={"ema": {"copy": ["encoder"], "momentum": 0.9}},
        **ADIOS,
    )
    for (_, before), (student, after) in pairwise(seen):
        assert all(torch.allclose(after[name], 0.9 * before[name] + 0.1 * student[name], atol=1e-7) for name in student)


@plugin
class Clusters(Target):
    """Soft assignments of teacher tokens to learned prototypes, which have an optimizer of their own (CAPI)."""

    name = "clusters"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.prototypes = nn.Linear(specs.teacher("ema").dim, 5, bias=False)
        self.spec = TargetSpec("opaque", 5, specs.teacher("ema").grid)

    def forward(self, step, masked):
        logits = self.prototypes(step.teacher("ema", masked.clean("x")).tokens.float())
        return {"logits": logits, "assigned": softmax(logits.detach() / 0.1, -1)}


@plugin
class ClusterDecoder(LinearDecoder):
    name = "to_clusters"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = replace(self.spec, kind="opaque")


@plugin
class ClusterLoss(Loss):
    """The student predicts assignments; the prototypes become certain of them."""

    name = "clusters"
    accepts = frozenset({"opaque"})

    def forward(self, pred, target, mask, latent):
        assigned = Pred(target["assigned"], pred.grid).at(pred.ids)
        student = -(assigned * log_softmax(pred.values, -1)).sum(-1).mean()
        prototypes = -(target["assigned"] * log_softmax(target["logits"], -1)).sum(-1).mean()
        return student + prototypes


def test_one_phase_steps_two_optimizers_with_schedules_of_their_own(tmp_path):
    run_dir, seen = watch(
        tmp_path,
        lambda model: state_of(model.objective),
        "train.steps=4",
        target="clusters",
        decoder="to_clusters",
        loss="clusters",
        teachers={"ema": {"copy": ["encoder"], "momentum": 0.9}},
        optim=None,
        optimizers={
            "student": {**SGD, "lr": 0.4, "shape": "linear", "parameters": ["encoder.*", "heads.main.decoder.*"]},
            "clusters": {**SGD, "lr": 0.1, "parameters": ["*.target.prototypes.*"]},
        },
    )
    lines = lines_of(run_dir)
    assert [line["lr/student"] for line in lines] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [line["lr/clusters"] for line in lines] == pytest.approx([0.1] * 4)
    assert all(line["grad_norm/clusters"] > 0 and line["grad_norm/student"] > 0 for line in lines)
    for before, after in pairwise(seen):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {"heads.main.target.prototypes.weight", "encoder.embed.weight"} <= changed
