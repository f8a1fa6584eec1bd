"""A teacher's features as targets (I-JEPA, data2vec), and masks from its attention (AttMask)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.harness import (
    EMA,
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
    watch,
)
from mim_plugin_mae import MAEEncoder
from torch import Tensor
from torch.nn.functional import layer_norm

from mim_framework.assembly.builder import build_model
from mim_framework.base.errors import RecipeError
from mim_framework.builtins.losses import MSELoss
from mim_framework.builtins.maskers import RandomMasker
from mim_framework.contract.components import Masker, Target
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Masked, Pred
from mim_framework.contract.specs import MaskerSpec, TargetSpec
from mim_framework.nn.masking import mask_from_noise
from mim_framework.testing import RegistryWith
from mim_framework.testing.runs import same, state_of


@plugin
class BlockMasker(Masker):
    """Hides three rows of patches and predicts a block inside them."""

    name = "rows"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=12)

    def forward(self, step, views):
        visible = (step.rand("mask", 1) * 4).long()
        row = torch.arange(16, device=visible.device) // 4
        hidden = row != visible
        return Masked({"x": Mask(hidden, GRID, predict=row == (visible + 1) % 4, equal=True)}, views)


@plugin
class AveragedLayers(Target):
    """The mean of layer-normalised teacher layers, without the class token (data2vec)."""

    name = "averaged_layers"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        teacher = specs.teacher("ema")
        self.layers, self.num_prefix_tokens = sorted(teacher.offers.layers), teacher.num_prefix_tokens
        self.spec = TargetSpec("dense", teacher.dim, teacher.grid)

    def teacher_asks(self):
        return {"ema": Ask(layers=frozenset(self.layers))}

    def forward(self, step, masked):
        layers = step.teacher("ema", masked.clean("x")).layers
        normed = [layer_norm(layers[i].float(), layers[i].shape[-1:]) for i in self.layers]
        return torch.stack(normed).mean(0)[:, self.num_prefix_tokens :]


@plugin
class RecordedMSE(MSELoss):
    name = "recorded_mse"
    seen: list[tuple[Pred, Tensor, Mask]] = []

    def forward(self, pred, target, mask, latent):
        self.seen.append((pred, target, mask))
        return super().forward(pred, target, mask, latent)


def test_a_momentum_teacher_gives_targets_at_other_positions_than_the_hidden_ones(tmp_path):
    RecordedMSE.seen = []
    run_dir, seen = watch(
        tmp_path,
        lambda model: (state_of(model.objective.encoder), state_of(model.teachers["ema"].part("encoder"))),
        "train.steps=4",
        masker="rows",
        encoder=VIT,
        target="averaged_layers",
        decoder=MAE_DECODER,
        loss="recorded_mse",
        teachers=EMA,
    )
    (student, expected), *after = seen
    assert same(student, expected)
    for index, (student, teacher) in enumerate(after):
        momentum = 0.5 + 0.5 * index / 4
        expected = {name: momentum * expected[name] + (1 - momentum) * student[name] for name in student}
        assert all(torch.allclose(teacher[name], expected[name], atol=1e-6) for name in student)
        assert not same(student, teacher)
    pred, target, mask = RecordedMSE.seen[-1]
    assert mask.predict.sum(1).tolist() == [4] * 4
    assert (mask.hidden | ~mask.predict).all()
    by_hand = (pred.values - target).square().mean(-1)[mask.predict].mean().item()
    assert lines_of(run_dir)[-1]["loss"] == pytest.approx(by_hand)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_momentum_teacher_that_is_asked_in_every_step_moves_alike_on_two_ranks(tmp_path, mode):
    changes = {"masker": "rows", "encoder": VIT, "target": "averaged_layers", "decoder": MAE_DECODER, "optim": SGD}
    alone = run(tmp_path / "alone", teachers=EMA, **changes)
    ranks, _ = on_two_ranks(
        tmp_path / "ranks", lambda trainer: None, f"train.distributed={mode}", teachers=EMA, **changes
    )
    assert_same_weights(ranks, alone, atol=1e-6)


def test_what_a_teacher_lacks_or_a_recipe_has_not_is_refused_with_its_name(tmp_path):
    changes = {"masker": "attention", "encoder": "tokens"}
    refused = r"masker 'attention' asks teacher 'ema' for attn \[1\], which its encoder lacks"
    with pytest.raises(RecipeError, match=refused):
        build_model(recipe_at(tmp_path, teachers=EMA, **changes), RegistryWith(*PLUGIN))
    with pytest.raises(RecipeError, match="no teacher 'ema'; the teachers of this recipe are none"):
        build_model(recipe_at(tmp_path, **changes), RegistryWith(*PLUGIN))


@plugin
class CountedViT(MAEEncoder):
    """Counts the passes of its copy."""

    name = "counted_vit"
    passes = 0

    def forward(self, view, mask, ask=Ask()):
        if not self.cls_token.requires_grad:
            type(self).passes += 1
        return super().forward(view, mask, ask)


@plugin
class AttentionMasker(Masker):
    """Hides the patches to which the teacher's class token attends most (AttMask)."""

    name = "attention"
    seen: list[tuple[Tensor, Mask]] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.layer = specs.encoder.depth - 1
        self.spec = MaskerSpec(specs.encoder.grid, equal=True, num_hidden=6)

    def teacher_asks(self):
        return {"ema": Ask(attn=frozenset({self.layer}))}

    def forward(self, step, views):
        attention = step.teacher("ema", views["x"]).attn[self.layer].mean(1)[:, 0, 1:]
        mask = mask_from_noise(attention, 10, self.spec.grid)
        if in_training(step):
            self.seen.append((attention, mask))
        return Masked({"x": mask}, views)


def test_a_masker_hides_what_the_teacher_attends_to_and_shares_its_pass_with_the_target(tmp_path):
    AttentionMasker.seen = []
    _, passes = watch(
        tmp_path,
        lambda model: CountedViT.passes,
        "train.batch_size=2",
        masker="attention",
        encoder={**VIT, "type": "counted_vit"},
        target="averaged_layers",
        decoder=MAE_DECODER,
        teachers=EMA,
    )
    assert [count - passes[0] for count in passes] == [0, 2, 4, 6]  # one for each of two micro-batches
    assert len(AttentionMasker.seen) == 6
    for attention, mask in AttentionMasker.seen:
        assert mask.hidden.sum(1).tolist() == [6, 6]
        for row, hidden in zip(attention, mask.hidden, strict=True):
            assert row[hidden].min() >= row[~hidden].max()


@plugin
class ManyMasks(RandomMasker):
    """Several masks of each image, whose targets are computed once (data2vec 2.0)."""

    name = "many"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = replace(self.spec, rewrites=("x",))

    def forward(self, step, views):
        noise = torch.cat([step.rand(f"mask {i}", 16) for i in range(3)])
        repeated = views["x"].repeat(3, 1, 1, 1)
        return Masked({"x": mask_from_noise(noise, self.num_keep, GRID)}, {"x": repeated}, originals={"x": views["x"]})


@plugin
class RepeatedLayers(AveragedLayers):
    name = "repeated_layers"

    def forward(self, step, masked):
        return super().forward(step, masked).repeat(3, 1, 1)


def test_several_masks_of_an_image_share_one_teacher_pass(tmp_path):
    RecordedMSE.seen = []
    changes = {"masker": "many", "target": "repeated_layers", "decoder": MAE_DECODER, "loss": "recorded_mse"}
    _, passes = watch(
        tmp_path, lambda model: CountedViT.passes, encoder={**VIT, "type": "counted_vit"}, teachers=EMA, **changes
    )
    assert passes[-1] - passes[0] == 3
    pred, target, mask = RecordedMSE.seen[-1]
    assert (len(pred.values), len(target), len(mask.hidden)) == (12, 12, 12)
    assert not torch.equal(mask.hidden[:4], mask.hidden[4:8])
    assert torch.equal(target[:4], target[8:])
