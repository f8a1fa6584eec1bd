"""Several masks of a sample, a pass for each; and several sets of positions to predict from one pass (I-JEPA)."""

from __future__ import annotations

import pytest
import torch
from methods.harness import EMA, GRID, MAE_DECODER, PLUGIN, VIT, plugin, recipe_at, run
from torch import nn

from mim_framework.assembly.builder import Model, build_model
from mim_framework.base.section import Section
from mim_framework.contract.components import Masker
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Masked, Views
from mim_framework.contract.specs import MaskerSpec
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.nn.masking import mask_from_noise
from mim_framework.nn.patches import patchify
from mim_framework.recipe.draft import load_recipe
from mim_framework.testing import RegistryWith
from mim_framework.training.pictures import draw_fixed
from mim_framework.training.trainer import Trainer

WITH_TOKENS = {**VIT, "type": "vit", "position": "sincos"}
FEATURES = {"target": {"type": "features", "teacher": "ema"}, "teachers": EMA}
PIXELS = {"target": {"type": "pixels", "norm_pix_loss": True}}


@plugin
class FourMasks(Masker):
    """Four masks of each sample (data2vec 2.0 has more), the first ones of all samples first."""

    name = "four_masks"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=12)

    def forward(self, step, views):
        noise = torch.cat([step.rand(f"mask {number}", 16) for number in range(4)])
        return Masked({"x": mask_from_noise(noise, 4, GRID)}, views)


@plugin
class FourSets(Masker):
    """Shows the first row of patches; predicts each of the four columns below it, as a set of its own."""

    name = "four_sets"

    class Config(Section):
        packed: bool = True
        """Heads work on the three positions of each set; else on every position."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=12)

    def forward(self, step, views):
        position = torch.arange(16, device=step.positions.device)
        hidden = (position >= 4).expand(len(step.positions), -1)
        column = torch.arange(4, device=position.device).repeat_interleave(len(hidden))
        predict = (position >= 4) & (position % 4 == column[:, None])
        mask = Mask(hidden, GRID, equal=True, shared=True, num_hidden=12)
        return Masked({"x": mask.predicting(predict, 3 if self.config.packed else None)}, views)


def built(folder, **changes) -> tuple[Model, Step, Views]:
    model = build_model(recipe_at(folder, **changes), RegistryWith(*PLUGIN))
    step = model.engine(torch.device("cpu")).step(seed=0, positions=torch.arange(3), world=World())
    return model, step, model.views.prepare(step, model.views.example(3))


@pytest.mark.parametrize("masker", ["four_masks", "four_sets", {"type": "four_sets", "packed": False}])
@pytest.mark.parametrize("encoder", [WITH_TOKENS, VIT])
@pytest.mark.parametrize("target", [PIXELS, FEATURES])
def test_the_loss_is_the_mean_over_masks_or_sets_of_what_each_gives_alone(tmp_path, masker, encoder, target):
    decoder = "linear" if encoder is WITH_TOKENS else MAE_DECODER
    model, step, views = built(tmp_path, masker=masker, encoder=encoder, decoder=decoder, **target)
    objective = model.objective
    with torch.no_grad():
        together = objective(step, views)
        mask = objective.masker(step, views).masks["x"]
        alone = []
        for number in range(4):
            rows = slice(3 * number, 3 * number + 3)
            hidden = mask.hidden[rows] if masker == "four_masks" else mask.hidden
            one = Masked({"x": Mask(hidden, GRID, mask.where[rows], equal=True)}, views)
            head = objective.heads["main"]
            alone.append(head.measure(one, objective.encode(one), head.target(step, one)).loss.item())
    assert len(set(alone)) == 4
    assert together.losses["main"].item() == pytest.approx(sum(alone) / 4, rel=1e-5)
    assert together.counts["main"] == 4 * 3 * (12 if masker == "four_masks" else 3)


def test_every_mask_has_the_pixels_of_its_own_sample(tmp_path):
    """By hand, with a prediction of zeros."""
    model, step, views = built(tmp_path, masker="four_masks", encoder=WITH_TOKENS)
    head = model.objective.heads["main"].decoder.head
    nn.init.zeros_(head.weight)
    hidden = model.objective.masker(step, views).masks["x"].hidden
    patches = patchify(views["x"], 4).square().mean(-1)
    by_hand = [patches[row % 3, n].item() for row, n in hidden.nonzero().tolist()]
    assert model.objective(step, views).losses["main"].item() == pytest.approx(sum(by_hand) / len(by_hand))


def test_one_pass_of_the_encoder_serves_all_sets_and_each_mask_has_one_of_its_own(tmp_path):
    rows = {}
    for masker in ("four_masks", "four_sets"):
        model, step, views = built(tmp_path / masker, masker=masker, encoder=VIT, decoder=MAE_DECODER)
        model.objective.encoder.register_forward_hook(
            lambda module, given, latent, masker=masker: rows.setdefault(masker, []).append(len(latent.tokens))
        )
        model.objective(step, views)
    assert rows == {"four_masks": [12], "four_sets": [3]}


@pytest.mark.parametrize("masker", ["four_masks", "four_sets"])
def test_they_train_and_have_no_picture(tmp_path, masker):
    run_dir = run(tmp_path, masker=masker, encoder=VIT, decoder=MAE_DECODER)
    recipe = load_recipe(run_dir / "recipe.yaml", [], RegistryWith(*PLUGIN))
    with Trainer.opened(recipe, RegistryWith(*PLUGIN)) as trainer:
        assert draw_fixed(trainer.run, trainer.held_out) is None


def test_rows_that_do_not_belong_together_are_refused():
    """Five rows are no number of masks of three samples."""
    mask = Mask(torch.zeros(5, 16, dtype=torch.bool), GRID)
    with pytest.raises(ValueError, match="3 rows cannot stand for 5"):
        mask.per_mask(torch.zeros(3, 2))
