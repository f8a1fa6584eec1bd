"""What the current encoder makes of the hidden patches is the target of what a regressor makes of them (CAE)."""

from __future__ import annotations

import pytest
import torch
from methods.harness import (
    GRID,
    MAE_DECODER,
    PLUGIN,
    SGD,
    VIT,
    assert_same_weights,
    in_training,
    lines_of,
    on_two_ranks,
    plugin,
    recipe_at,
    run,
)
from mim_plugin_mae import MAEEncoder
from torch import Tensor

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.contract.components import Target
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask
from mim_framework.contract.specs import TargetSpec
from mim_framework.contract.world import World
from mim_framework.testing import RegistryWith

HEAD = {"target": "latents", "decoder": MAE_DECODER, "loss": "mse"}
NO_SLOTS = dict.fromkeys(HEAD)


@plugin
class HiddenLatents(Target):
    """The current encoder's tokens of the hidden patches, which it sees alone (CAE's alignment)."""

    name = "latents"
    seen: list[Tensor] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = TargetSpec("dense", specs.encoder.dim, specs.encoder.grid)

    def forward(self, step, masked):
        view, mask = masked.clean("x"), masked.masks["x"]
        latent = step.detached(view, mask.complement())
        places = latent.ids[..., None].expand_as(latent.tokens)
        tokens = latent.tokens.new_zeros(len(view), GRID.num_patches, self.spec.dim).scatter(1, places, latent.tokens)
        if in_training(step):
            self.seen.append(tokens)
        return tokens


@plugin
class WatchedViT(MAEEncoder):
    name = "watched_vit"
    passes: list[tuple[bool, bool, bool]] = []

    def forward(self, view, mask, ask=Ask()):
        if self.training:
            self.passes.append((torch.is_grad_enabled(), self.training, torch.is_autocast_enabled("cpu")))
        return super().forward(view, mask, ask)


def test_the_target_is_the_encoder_of_this_very_step_on_what_it_did_not_see(tmp_path):
    model = build_model(recipe_at(tmp_path, encoder=VIT, **HEAD), RegistryWith(*PLUGIN))
    objective = model.objective
    step = model.engine(torch.device("cpu")).step(seed=0, positions=torch.arange(3), world=World())
    views = model.views.prepare(step, model.views.example(3))
    mask = objective.masker(step, views).masks["x"]
    with torch.no_grad():
        tokens = objective.encoder(views["x"], Mask(~mask.hidden, GRID, equal=True)).tokens  # in raster order
        pred = objective.heads["main"].decoder(objective.encoder(views["x"], mask), mask.predicting(mask.hidden))
        by_hand = (pred.values[mask.hidden] - tokens.flatten(0, 1)).square().mean().item()
    loss = objective(step, views).losses["main"]
    assert loss.item() == pytest.approx(by_hand)

    loss.backward()
    through = [parameter.grad.clone() for parameter in objective.encoder.parameters()]
    objective.zero_grad()
    head, latent = objective.heads["main"], objective.encoder(views["x"], mask)
    wanted = torch.zeros(3, 16, 16).masked_scatter(mask.hidden[..., None], tokens)  # a constant
    (head.decoder(latent, mask.predicting(mask.hidden)).values - wanted)[mask.hidden].square().mean().backward()
    for found, parameter in zip(through, objective.encoder.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_heads_share_the_pass_which_is_in_the_precision_and_mode_of_the_run(tmp_path, precision):
    HiddenLatents.seen, WatchedViT.passes = [], []
    run_dir = run(
        tmp_path, "train.batch_size=2", f"train.precision={precision}", encoder={**VIT, "type": "watched_vit"},
        heads={"one": HEAD, "two": {**HEAD, "weight": 0.5}}, **NO_SLOTS,
    )  # fmt: skip
    bfloat16 = precision == "bfloat16"
    micro_batches = 3 * 2
    assert WatchedViT.passes[-2 * micro_batches :] == [(False, True, bfloat16), (True, True, bfloat16)] * micro_batches
    assert len(HiddenLatents.seen) == 2 * micro_batches
    assert not any(tokens.requires_grad for tokens in HiddenLatents.seen)
    for one, two in zip(HiddenLatents.seen[::2], HiddenLatents.seen[1::2], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(HiddenLatents.seen[0], HiddenLatents.seen[2])
    assert len(lines_of(run_dir)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_does(tmp_path, mode):
    changes = {"encoder": VIT, "optim": SGD, **HEAD}
    alone = run(tmp_path / "alone", **changes)
    ranks, _ = on_two_ranks(tmp_path / "ranks", lambda trainer: None, f"train.distributed={mode}", **changes)
    assert_same_weights(ranks, alone, atol=1e-6)


def test_a_step_without_an_encoder_says_so(tmp_path):
    step = make_step(recipe_at(tmp_path, encoder=VIT, **HEAD), torch.arange(1))
    with pytest.raises(ValueError, match="this step has no encoder: the objective keeps no part as `self.encoder`"):
        step.detached(torch.zeros(1, 3, 16, 16), Mask.none(1, GRID))
