"""The contract for plugins finds what it should: a plugin with one fault at a time, and the test that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mim_framework.base.errors import RecipeError
from mim_framework.testing import PluginContract
from mim_framework.testing import runs as contract

SOURCE = '''
"""A masker and an encoder with a fault, if the recipe names one."""

import torch
from torch import nn
from mim_framework import (
    Ask, Encoder, EncoderSpec, Grid, Latent, Mask, Masked, Masker, MaskerSpec, Section, hookimpl, patchify,
)
from mim_framework.builtins.losses import MSELoss


class FaultyMasker(Masker):
    """Half of the patches."""

    name = "faulty_masker"

    class Config(Section):
        fault: str = ""
        """What is wrong."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        grid = specs.encoder.grid
        share = 1.0 if config.fault == "ratio" else 0.5
        self.spec = MaskerSpec(grid, equal=True, num_hidden=share * grid.num_patches)

    def forward(self, step, views):
        fault, n = self.config.fault, self.spec.grid.num_patches
        noise = step.rand("mask", n)
        if fault == "global generator":
            noise = torch.rand_like(noise)
        if fault == "rows":
            noise = noise + torch.arange(len(noise))[:, None] * torch.arange(n) * 0.01
        mask = Mask.from_shuffle(noise.argsort(1), n // 2, self.spec.grid)
        if fault == "rewritten view":
            views = {**views, "x": views["x"] * 0.5}
        return Masked({"x": mask}, views)


class FaultyEncoder(Encoder):
    """A linear map of every patch, hidden ones replaced by a token; all see the mean."""

    name = "faulty_encoder"

    class Config(Section):
        fault: str = ""
        """What is wrong."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.embed = nn.Linear(3 * 16, 16)
        self.mask_token = nn.Parameter(torch.zeros(16))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))
        self.table = nn.Parameter(torch.zeros(64, 16), requires_grad=False)
        if config.fault == "idle parameter":
            self.idle = nn.Parameter(torch.zeros(1))
        offers = Ask(layers=frozenset({0, 1, 2} if config.fault == "offers too much" else {0, 1}))
        self.spec = EncoderSpec(16, Grid((8, 8)), 4, 2, 1, num_prefix_tokens=1, offers=offers)
        self.calls = 0

    def repeated_blocks(self):
        return self.blocks

    def forward(self, view, mask, ask=Ask()):
        fault = self.config.fault
        x = torch.where(mask.hidden[..., None], self.mask_token, self.embed(patchify(view, 4))) + self.table
        if fault == "state outside the state dict" and self.training:
            self.calls += 1
            x = x * (1 + 0.01 * self.calls)
        if fault == "moves what is frozen" and self.training:
            self.table.add_(0.01)
        x = x + x.mean(1, keepdim=True)
        prefix, layers = x.mean(1, keepdim=True), {}
        for number, block in enumerate(self.blocks):
            x = block(x)
            layers[number] = torch.cat([prefix, x], dim=1)
        tokens = torch.cat([prefix, x], dim=1)[:, :64] if fault == "shifted by the prefix" else x
        kept = prefix[:, :0] if fault == "no prefix" else prefix
        return Latent(tokens, self.spec.grid, prefix=kept, layers=layers)


class FaultyLoss(MSELoss):
    """Squared error."""

    name = "faulty_loss"

    class Config(Section):
        fault: str = ""
        """What is wrong."""

    def forward(self, pred, target, mask, latent):
        loss = super().forward(pred, target, mask, latent).loss
        if self.config.fault == "climbs":
            loss = 2 * loss.detach() - loss
        if self.config.fault == "coarse in bfloat16" and pred.values.dtype == torch.bfloat16:
            loss = loss * 1.1
        return loss


@hookimpl
def mim_maskers():
    return [FaultyMasker]


@hookimpl
def mim_encoders():
    return [FaultyEncoder]


@hookimpl
def mim_losses():
    return [FaultyLoss]
'''
RECIPE = """
name: faulty_quickstart
data: {source: digits, workers: 0}
views: {type: image, img_size: 32, flip: 0.0}
masker: faulty_masker
encoder: faulty_encoder
target: {type: pixels, norm_pix_loss: false}
decoder: linear
loss: faulty_loss
optim: {lr: 1.0e-3}
train: {total_batch_size: 64, epochs: 1}
"""
Install = Callable[..., Path]


class Contract(PluginContract):
    """Not collected: its tests are called one by one."""

    plugin = "faulty"
    learning_rate, learned_share = 1e-2, 0.02  # it knows no positions


@pytest.fixture
def faulty(install_plugin: Install) -> None:
    install_plugin("faulty", SOURCE, files={"recipes/faulty_quickstart.yaml": RECIPE})


def changes(slot: str, fault: str) -> list[str]:
    return [*contract.SHORT, f"{slot}.fault={fault}"]


ONE_STEP = {
    "draws": Contract.test_masks_keep_their_promises_and_belong_to_their_samples,
    "counts": Contract.test_masks_hide_as_many_as_the_masker_says,
    "tokens": Contract.test_tokens_hold_no_prefix_and_an_encoder_gives_what_it_offers,
    "gradients": Contract.test_every_phase_reaches_all_that_it_trains,
    "learns": Contract.test_one_batch_is_learned,
    "frozen": Contract.test_what_is_frozen_stays_to_the_bit,
    "state": Contract.test_a_state_dict_holds_all_that_decides_a_loss,
}


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("test", ONE_STEP)
def test_a_faultless_plugin_passes(tmp_path: Path, test: str):
    ONE_STEP[test](Contract(), "faulty_quickstart", [*contract.SHORT], tmp_path)


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(
    ("test", "slot", "fault", "message"),
    [
        ("draws", "masker", "global generator", "draws from torch's global generator"),
        ("draws", "masker", "rows", "equal"),
        ("draws", "masker", "rewritten view", "view 'x' is rewritten, MaskerSpec.rewrites says no"),
        ("counts", "masker", "ratio", None),
        ("tokens", "encoder", "no prefix", None),
        ("tokens", "encoder", "offers too much", None),
        ("learns", "loss", "climbs", None),
        ("frozen", "encoder", "moves what is frozen", "table"),
        ("state", "encoder", "state outside the state dict", None),
    ],
)
def test_a_plugin_with_a_fault_fails_the_test_that_looks_for_it(
    tmp_path: Path, test: str, slot: str, fault: str, message: str | None
):
    with pytest.raises(AssertionError, match=message):
        ONE_STEP[test](Contract(), "faulty_quickstart", changes(slot, fault), tmp_path)


@pytest.mark.usefixtures("faulty")
def test_an_idle_parameter_is_refused_before_the_first_step(tmp_path: Path):
    with pytest.raises(RecipeError, match="trainable parameters that no loss reaches: encoder.idle"):
        ONE_STEP["gradients"](Contract(), "faulty_quickstart", changes("encoder", "idle parameter"), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("faulty")
def test_ranks_that_see_other_masks_are_found(tmp_path: Path):
    options = changes("masker", "rows")
    sgd = [*options, *contract.optimizers_of("faulty_quickstart", options, contract.PLAIN_SGD)]
    alone = contract.run(tmp_path / "alone", "faulty_quickstart", *sgd)
    with pytest.raises(AssertionError):
        Contract().test_two_ranks_learn_what_one_learns("faulty_quickstart", sgd, alone, "ddp", tmp_path / "together")


@pytest.mark.slow
@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(
    ("test", "slot", "fault"),
    [
        (Contract.test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one, "encoder", "state outside the state dict"),
        (Contract.test_bfloat16_stays_near_float32, "loss", "coarse in bfloat16"),
    ],
)
def test_a_run_that_goes_another_way_is_found(tmp_path: Path, test: Callable[..., None], slot: str, fault: str):
    options = changes(slot, fault)
    straight = contract.run(tmp_path / "straight", "faulty_quickstart", *options)
    with pytest.raises(AssertionError):
        test(Contract(), "faulty_quickstart", options, straight, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.usefixtures("faulty")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_blocks_that_a_contract_does_not_know_of_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = contract.run(tmp_path / "straight", "faulty_quickstart", *contract.SHORT)
    monkeypatch.setattr(Contract, "compiles", False)
    with pytest.raises(AssertionError):
        Contract().test_compiled_blocks_give_the_losses_of_eager_ones(
            "faulty_quickstart", [*contract.SHORT], straight, tmp_path / "compiled", monkeypatch
        )


def test_what_is_not_explained_is_found(install_plugin: Install):
    install_plugin("faulty", SOURCE.replace('        """What is wrong."""\n', ""))
    with pytest.raises(AssertionError, match="option 'fault' of masker 'faulty_masker' has no text under it"):
        Contract().test_every_component_and_option_is_explained()


@pytest.mark.usefixtures("faulty")
def test_what_can_be_read_of_a_faultless_plugin_passes(tmp_path: Path):
    for test in (
        Contract().test_the_plugin_can_be_loaded,
        Contract().test_what_is_listed_without_an_import_is_what_is_registered,
        Contract().test_every_component_and_option_is_explained,
        Contract().test_a_misspelt_option_is_refused,
        Contract().test_options_survive_being_written_and_read,
    ):
        test()
    Contract().test_recipes_survive_being_written_and_read(tmp_path)


def test_a_plugin_that_cannot_be_loaded_is_found(install_plugin: Install):
    install_plugin("faulty", SOURCE.replace("return [FaultyMasker]", "return FaultyMasker()"))
    with pytest.raises(Exception, match="plugin 'faulty'"):
        Contract().test_the_plugin_can_be_loaded()
