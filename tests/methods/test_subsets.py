"""Some of the hidden patches are predicted, and heads work on these alone (CrossMAE, CAPI)."""

from __future__ import annotations

import pytest
import torch
from methods.harness import GRID, MAE_DECODER, PLUGIN, SGD, VIT, assert_same_weights, plugin, recipe_at, run
from torch import nn

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.base.section import Section
from mim_framework.contract.components import Decoder, Masker
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Masked, Pred
from mim_framework.contract.specs import MaskerSpec, PredSpec
from mim_framework.nn.masking import mask_from_noise
from mim_framework.testing import RegistryWith


@plugin
class SomeOfTheHidden(Masker):
    """Hides 12 of 16 patches and predicts 3 to 5 of them (CrossMAE predicts a third or so of what is hidden)."""

    name = "some_of_the_hidden"

    class Config(Section):
        packed: bool = True
        """Tell heads that no row predicts more than 5; else they work on every position."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=12)

    def forward(self, step, views):
        mask = mask_from_noise(step.rand("mask", 16), 4, GRID)
        count = 3 + (step.rand("count", 1) * 3).long()
        order = step.rand("predict", 16).masked_fill(~mask.hidden, 1.0).argsort(dim=1).argsort(dim=1)
        return Masked({"x": mask.predicting(order < count, 5 if self.config.packed else None)}, views)


@plugin
class CrossDecoder(Decoder):
    """A query at each predicted position looks at the visible tokens, and at nothing else (CrossMAE)."""

    name = "cross"
    seen: list[tuple[Mask, tuple[int, ...]]] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        dim, self.grid = specs.encoder.dim, specs.encoder.grid
        self.queries = nn.Parameter(torch.randn(self.grid.num_patches, dim) / 10)
        self.attention, self.head = nn.MultiheadAttention(dim, 2, batch_first=True), nn.Linear(dim, specs.target.dim)
        self.spec = PredSpec.for_target(specs.target, self.grid)

    def forward(self, latent, mask):
        ids = mask.ids_predict
        queries = self.queries.expand(len(latent.tokens), -1, -1) if ids is None else self.queries[ids]
        values = self.head(self.attention(queries, latent.tokens, latent.tokens, need_weights=False)[0])
        if self.training:
            self.seen.append((mask, tuple(values.shape)))
        return Pred(values, self.grid, ids)


def test_heads_see_the_predicted_positions_alone_and_pads_have_no_weight(tmp_path):
    CrossDecoder.seen = []
    run(tmp_path, masker="some_of_the_hidden", encoder=VIT, decoder="cross")
    for mask, shape in CrossDecoder.seen[-3:]:
        assert shape == (4, 5, 48)
        assert set(mask.predict.sum(1).tolist()) <= {3, 4, 5}
        assert (mask.hidden | ~mask.predict).all()
    model = build_model(
        recipe_at(tmp_path / "by_hand", masker="some_of_the_hidden", encoder=VIT, decoder="cross"),
        RegistryWith(*PLUGIN),
    )
    step = make_step(model.recipe, torch.arange(4))
    views = model.views.prepare(step, model.views.example(4))
    nn.init.zeros_(model.objective.heads["main"].decoder.head.weight)
    nn.init.zeros_(model.objective.heads["main"].decoder.head.bias)
    predict = model.objective.masker(step, views).masks["x"].predict
    errors = [
        views["x"][row, :, 4 * (n // 4) :, 4 * (n % 4) :][:, :4, :4].square().mean().item()
        for row, n in predict.nonzero().tolist()
    ]
    outcome = model.objective(step, views)
    assert outcome.losses["main"].item() == pytest.approx(sum(errors) / len(errors))
    assert outcome.counts["main"] == len(errors)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["cross", MAE_DECODER])
def test_packed_positions_train_as_weights_on_every_position_do(tmp_path, decoder):
    packed, everywhere = (
        run(
            tmp_path / str(each), masker={"type": "some_of_the_hidden", "packed": each}, encoder=VIT, decoder=decoder,
            optim=SGD,
        )
        for each in (True, False)
    )  # fmt: skip
    assert_same_weights(packed, everywhere, atol=1e-6)
