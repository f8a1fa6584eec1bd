"""Classification on an encoder: what is frozen and how that shows, where a head begins, what `init` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from methods.harness import recipe_at
from safetensors.torch import save_file
from torch import nn

from mim_framework.assembly.builder import Model, build_model
from mim_framework.assembly.preflight import make_step, preflight
from mim_framework.base.errors import RecipeError
from mim_framework.builtins.classification import Classifier
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec, Specs, TargetSpec
from mim_framework.contract.world import World
from mim_framework.data.labels import LABEL
from mim_framework.registry.registry import Registry

VIT = {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5}
SLOTS: dict[str, Any] = {
    "masker": "none",
    "encoder": VIT,
    "objective": "classify",
    "target": "labels",
    "decoder": {"type": "classifier", "norm": "new"},
    "loss": "cross_entropy",
    "evaluate": [],
}


def model(folder: Path, **changes: Any) -> Model:
    return build_model(recipe_at(folder, **{**SLOTS, **changes}), Registry())


def trained(built: Model) -> set[str]:
    return {name for name, p in built.objective.named_parameters() if p.requires_grad}


def batch() -> dict[str, torch.Tensor]:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"x": images, LABEL: torch.arange(4)}


def test_what_no_loss_reaches_is_frozen(tmp_path: Path):
    """The mask token, and the encoder's norm where another one follows the pooling."""
    names = {name for name, _ in model(tmp_path).objective.named_parameters()}
    left_out = names - trained(model(tmp_path))
    assert left_out == {"encoder.mask_token", "encoder.norm.weight", "encoder.norm.bias"}
    kept = model(tmp_path, decoder={"type": "classifier", "pool": "cls"})
    assert {name for name, _ in kept.objective.named_parameters()} - trained(kept) == {"encoder.mask_token"}
    preflight(kept, torch.device("cpu"))
    with torch.no_grad():
        assert trained(model(tmp_path)) == names - left_out


def test_frozen_blocks_have_no_drop_path_and_keep_no_activations(tmp_path: Path):
    built = model(tmp_path, objective={"type": "classify", "trained_blocks": 1})
    objective, first = built.objective.train(), built.objective.encoder.blocks[0]
    modes = [any(module.training for module in block.modules()) for block in objective.encoder.blocks]
    assert modes == [False, False, True]
    seen = []
    for block in objective.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(out[0].requires_grad))
    views = batch()
    torch.manual_seed(0)  # of drop path
    loss = sum(objective(make_step(built.recipe, torch.arange(4)), views).losses.values())
    assert seen == [False, False, True]
    loss.backward()
    assert all(p.grad is None for p in first.parameters())
    assert objective.encoder.blocks[2].mlp.fc1.weight.grad.abs().sum() > 0


def test_half_a_block_is_its_mlp(tmp_path: Path):
    names = trained(model(tmp_path, objective={"type": "classify", "trained_blocks": 0.5}))
    encoder = {name for name in names if name.startswith("encoder.")}
    assert {name.split(".")[3] for name in encoder} == {"mlp", "norm2"}
    assert {name.split(".")[2] for name in encoder} == {"2"}


@pytest.mark.parametrize("count", [1.5, 4])
def test_blocks_that_are_not_there_are_refused(tmp_path: Path, count: float):
    with pytest.raises(RecipeError, match=f"trained_blocks {count:g}: encoder 'vit' has 3 blocks"):
        model(tmp_path, objective={"type": "classify", "trained_blocks": count})


def test_patterns_freeze_and_must_match(tmp_path: Path):
    train = {"total_batch_size": 4, "steps": 1, "device": "cpu", "precision": "float32"}
    probe = model(tmp_path, train={**train, "frozen": ["encoder.*", "*.fc_norm.*"]})
    assert trained(probe) == {"heads.main.decoder.head.weight", "heads.main.decoder.head.bias"}
    assert not any(module.training for module in probe.objective.train().encoder.modules())
    assert probe.objective.heads.main.decoder.training
    with pytest.raises(RecipeError, match=r"train.frozen: pattern 'encodr\.\*' matches no parameter"):
        model(tmp_path, train={**train, "frozen": ["encodr.*"]})
    with pytest.raises(RecipeError, match=r"train.frozen: \* leaves no parameter to train"):
        model(tmp_path, train={**train, "frozen": ["*"]})


def test_a_masker_that_hides_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"masker 'random' hides patches, images are classified whole: masker=none"):
        model(tmp_path, masker="random")


def test_a_class_token_that_is_not_there_is_refused():
    encoder = EncoderSpec(8, Grid((2, 2)), 4, 1, 1)
    specs = Specs(encoder=encoder, target=TargetSpec("ids", 3, Grid(())))
    with pytest.raises(ValueError, match="the encoder has no class token; use pool=mean"):
        Classifier(Classifier.Config(pool="cls"), specs)


def test_the_head_begins_as_small_as_asked(tmp_path: Path):
    head = model(tmp_path, decoder={"type": "classifier", "init_std": 2e-5}).objective.heads.main.decoder.head
    assert 1e-5 < head.weight.std() < 3e-5
    assert not head.bias.any()


def test_statistics_of_the_batch_norm_are_averaged_over_ranks(tmp_path: Path):
    class Two(World):
        def mean(self, tensor):
            return (tensor + 3) / 2

    decoder = model(tmp_path, decoder={"type": "classifier", "batch_norm": True}).objective.heads.main.decoder
    decoder.after_step(make_step(recipe_at(tmp_path, **SLOTS), torch.arange(2), world=Two(0, 2)))
    assert decoder.batch_norm.running_mean.unique().tolist() == [1.5]
    assert decoder.batch_norm.running_var.unique().tolist() == [2.0]
    assert decoder.batch_norm.eps == 1e-6


def test_init_gives_the_encoder_of_a_run_whose_head_was_for_something_else(tmp_path: Path):
    before = build_model(recipe_at(tmp_path, encoder=VIT), Registry()).objective.state_dict()
    before = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    save_file(before, tmp_path / "w.safetensors")
    built = model(tmp_path, init=str(tmp_path / "w.safetensors"))
    state = built.objective.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in state if name.startswith("encoder."))
    assert not state["heads.main.decoder.head.bias"].any()
    assert "heads.main.decoder: 0 of 4 tensors" in built.notes[0]


def test_init_gives_a_head_of_the_same_classes_too(tmp_path: Path):
    before = {name: tensor + 1 for name, tensor in model(tmp_path).objective.state_dict().items()}
    save_file(before, tmp_path / "w.safetensors")
    built = model(tmp_path, init=str(tmp_path / "w.safetensors"))
    assert not built.notes
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.objective.state_dict().items())


def test_a_table_of_biases_that_blocks_shared_goes_to_each(tmp_path: Path):
    shared = {**VIT, "position": "none", "relative_bias": "shared"}
    before = build_model(recipe_at(tmp_path, encoder=shared), Registry()).objective.state_dict()
    table = torch.randn(before["encoder.rel_pos_bias.relative_position_bias_table"].shape)
    save_file({**before, "encoder.rel_pos_bias.relative_position_bias_table": table}, tmp_path / "w.safetensors")
    built = model(tmp_path, encoder={**shared, "relative_bias": "per_block"}, init=str(tmp_path / "w.safetensors"))
    for block in built.objective.encoder.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, table)


def latent_of(built: Model) -> Latent:
    encoder = built.objective.encoder.eval()
    return encoder(batch()["x"], Mask.none(4, encoder.spec.grid), Ask(layers=frozenset(range(3))))


@torch.no_grad()
def test_the_vector_of_an_image_by_hand(tmp_path: Path):
    """Class token beside the mean of the patches, of a block as it is."""
    built = model(tmp_path, decoder={"type": "classifier", "pool": "cls_mean", "norm": "none", "layer": 1})
    decoder, latent = built.objective.heads.main.decoder, latent_of(built)
    raw = latent.layers[1]
    assert torch.equal(decoder.pooled(latent), torch.cat([raw[:, 0], raw[:, 1:].mean(1)], dim=1))
    assert decoder.head.in_features == 32
    last = model(tmp_path, decoder={"type": "classifier", "pool": "cls", "norm": "none"}).objective.heads.main.decoder
    assert torch.equal(last.pooled(latent), latent.layers[2][:, 0])
    same = model(tmp_path, decoder={"type": "classifier", "pool": "mean", "norm": "none", "layer": -2})
    assert torch.equal(same.objective.heads.main.decoder.pooled(latent), raw[:, 1:].mean(1))


def test_blocks_that_no_head_sees_are_frozen(tmp_path: Path):
    built = model(tmp_path, decoder={"type": "classifier", "norm": "new", "layer": 0})
    left_out = {name.split(".")[1] + name.split(".")[2] for name in trained(built) if name.startswith("encoder.blocks")}
    assert left_out == {"blocks0"}
    assert "encoder.norm.weight" not in trained(built)
    preflight(built, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"layer": 1},
            "layer=1 has no effect with norm=encoder, which is the encoder's end; use norm=none or norm=new",
        ),
        ({"norm": "none", "layer": 3}, "layer=3 is none of the encoder's 3 blocks, from 0"),
        ({"norm": "new", "layer": -4}, "layer=-4 is none of the encoder's 3 blocks, from 0"),
    ],
)
def test_a_block_that_cannot_be_read_is_refused(tmp_path: Path, options: dict[str, Any], text: str):
    with pytest.raises(RecipeError, match=text):
        model(tmp_path, decoder={"type": "classifier", **options})


def heads_of(*layers: int) -> dict[str, Any]:
    decoder = {"type": "classifier", "pool": "cls_mean", "norm": "none"}
    return {
        f"block{layer}": {"target": "labels", "decoder": {**decoder, "layer": layer}, "loss": "cross_entropy"}
        for layer in layers
    }


@torch.no_grad()
def test_several_classifiers_give_their_scores_in_the_order_of_the_recipe(tmp_path: Path):
    alone = dict.fromkeys(("target", "decoder", "loss"))
    built = model(tmp_path, heads=heads_of(2, 0), **alone)
    objective, latent = built.objective.eval(), latent_of(built)
    scores = objective.logits({"x": batch()["x"]})
    assert scores.shape == (4, 2, 10)
    for number, name in enumerate(("block2", "block0")):
        decoder = objective.heads[name].decoder
        torch.testing.assert_close(scores[:, number], decoder.head(decoder.pooled(latent)))


def test_nothing_trains_in_evaluation_mode(tmp_path: Path):
    objective = model(tmp_path).objective.eval()
    assert not any(isinstance(module, nn.Module) and module.training for module in objective.modules())
    assert objective.logits({"x": batch()["x"]}).shape == (4, 10)
