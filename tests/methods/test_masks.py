"""Rows that hide different numbers, and masks on cells that are coarser than the tokens (SimMIM)."""

from __future__ import annotations

import pytest
import torch
from methods.harness import (
    GRID,
    PLUGIN,
    TokenEncoder,
    plugin,
    recipe_at,
    run,
)
from torch import nn

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.contract.components import Masker
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Masked
from mim_framework.contract.specs import MaskerSpec
from mim_framework.nn.patches import patchify, unpatchify
from mim_framework.recipe.draft import load_recipe
from mim_framework.testing import RegistryWith


@plugin
class StaircaseMasker(Masker):
    """Image i hides its first i + 1 patches."""

    name = "staircase"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=False, num_hidden=2.5)

    def forward(self, step, views):
        positions = torch.arange(16, device=step.positions.device)
        hidden = positions <= torch.arange(len(step.positions), device=step.positions.device)[:, None]
        return Masked({"x": Mask(hidden, GRID)}, views)


def test_rows_that_hide_different_numbers_count_by_their_positions(tmp_path):
    changes = {"masker": "staircase"}
    run(tmp_path, **changes)
    model = build_model(recipe_at(tmp_path / "by_hand", **changes), RegistryWith(*PLUGIN))
    step = make_step(model.recipe, torch.arange(3))
    views = model.views.prepare(step, model.views.example(3))
    head = model.objective.heads["main"].decoder.head
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 0.5)
    errors = [
        (views["x"][row, :, :4, 4 * patch : 4 * patch + 4] - 0.5).square().mean().item()
        for row in range(3)
        for patch in range(row + 1)
    ]
    assert model.objective(step, views).losses["main"].item() == pytest.approx(sum(errors) / 6)


@plugin
class RecordedTokens(TokenEncoder):
    name = "recorded_tokens"
    seen: list[Mask] = []

    def forward(self, view, mask, ask=Ask()):
        if self.training:
            self.seen.append(mask)
        return super().forward(view, mask, ask)


def test_a_mask_on_coarse_cells_hides_whole_cells_from_a_token_style_encoder(tmp_path):
    RecordedTokens.seen = []
    masker = {"type": "random", "mask_ratio": 0.6, "mask_patch_size": 8, "rounding": "hide_ceil"}
    run_dir = run(tmp_path, masker=masker, encoder="recorded_tokens", loss="l1")
    for mask in RecordedTokens.seen[-3:]:
        cells = mask.at(GRID).hidden.reshape(4, 2, 2, 2, 2).transpose(2, 3).reshape(4, 4, 4)
        assert torch.equal(cells.all(-1), cells.any(-1))
        assert cells.all(-1).sum(1).tolist() == [3] * 4

    model = build_model(load_recipe(run_dir / "recipe.yaml", [], RegistryWith(*PLUGIN)), RegistryWith(*PLUGIN))
    step = make_step(model.recipe, torch.arange(2))
    x = model.views.prepare(step, model.views.example(2))["x"]
    mask = model.objective.masker(step, {"x": x}).masks["x"].at(GRID)
    noise = unpatchify(torch.randn(2, 16, 48) * mask.hidden[..., None], 4, GRID)
    assert torch.equal(model.objective.encoder(x, mask).tokens, model.objective.encoder(x + noise, mask).tokens)
    head = model.objective.heads["main"].decoder.head
    nn.init.zeros_(head.weight)
    by_hand = patchify(x, 4)[mask.hidden].abs().mean().item()
    assert model.objective(step, {"x": x}).losses["main"].item() == pytest.approx(by_hand)
