"""The contract is wide enough for the field: components in the shape of published methods train through the core.

Every component is written as a plugin's author would write it, out of core, and every test asserts what defines its
method. All of them run with kNN, pictures and `mim check` switched on, which must bear whatever a method is made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_mae import MAEDecoder, MAEEncoder
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, log_softmax, softmax

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.base import rng
from mim_framework.base.errors import RecipeError
from mim_framework.base.section import Section
from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.losses import CrossEntropyLoss, MSELoss
from mim_framework.builtins.maskers import RandomMasker
from mim_framework.checkpoints import checkpoint
from mim_framework.commands.check import report
from mim_framework.contract.components import Decoder, Encoder, Loss, Masker, Objective, Source, Target, ViewBuilder
from mim_framework.contract.hooks import hookimpl
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent, Masked, Pred, Sample
from mim_framework.contract.specs import EncoderSpec, MaskerSpec, TargetSpec, ViewSpec
from mim_framework.data.views import ImageViews
from mim_framework.nn.masking import gather_tokens, mask_from_noise
from mim_framework.nn.patches import patchify, unpatchify
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.launch import process_group
from mim_framework.runtime.metrics import read_metrics
from mim_framework.runtime.sharding import local
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.testing.runs import same, state_of
from mim_framework.train.directory import run_directory
from mim_framework.train.trainer import Trainer, train

GRID = Grid((4, 4))
"""16 pixels in patches of 4."""
PLUGIN: list[type] = []
"""What a plugin would register: every component of this file."""

RECIPE = {
    "name": "tiny",
    "data": {"source": {"type": "digits"}, "workers": 0},
    "views": {"type": "image", "img_size": 16, "scale": [0.6, 1.0]},
    "masker": {"type": "random", "mask_ratio": 0.5},
    "encoder": "tokens",
    "target": "pixels",
    "decoder": "linear",
    "loss": "mse",
    "optim": {"type": "adamw", "lr": 1e-2, "shape": "constant", "weight_decay": 0},
    "train": {"total_batch_size": 4, "steps": 3, "device": "cpu", "precision": "float32"},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 1, "tensorboard": False, "images_every_epochs": 0, "num_images": 2},
    "evaluate": {"knn": {"every_epochs": 0, "max_train": 40, "max_test": 20}},
}
VIT = {"type": "mae_vit", "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NO_HEAD = {"target": None, "decoder": None, "loss": None}
SGD = {"type": "momentum", "shape": "constant", "weight_decay": 0, "lr": 0.1, "options": {"momentum": 0.0}}


def plugin(cls: type) -> type:
    PLUGIN.append(cls)
    return cls


def recipe_at(folder: Path, *overrides: str, **changes: Any):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe_in.yaml"
    file.write_text(json.dumps({**RECIPE, **changes}))  # JSON is YAML, here without anchors
    return load_recipe(file, [f"output_dir={folder}", *overrides], RegistryWith(*PLUGIN))


def run(folder: Path, *overrides: str, hooks: Any = None, **changes: Any) -> Path:
    """Check and train a recipe; returns its run directory."""
    registry, recipe = RegistryWith(*PLUGIN), recipe_at(folder, *overrides, **changes)
    assert "tokens per image" in report(recipe, registry)
    if hooks is not None:
        registry._manager.register(hooks)
    return train(recipe, registry)


def watch(folder: Path, see: Callable[[Any], Any], *overrides: str, **changes: Any) -> tuple[Path, list[Any]]:
    """`run`, and what `see(model)` gave before the first and after every step."""
    seen = []

    class Watch:
        @hookimpl
        def mim_run_started(self, run):
            seen.append(see(run.model))

        @hookimpl
        def mim_metrics_logged(self, run, step, metrics):
            seen.append(see(run.model))

    return run(folder, *overrides, hooks=Watch(), **changes), seen


def on_two_ranks(
    folder: Path, see: Callable[[Trainer], Any], *overrides: str, **changes: Any
) -> tuple[Path, list[Any]]:
    """The run directory of two ranks that trained together, and what `see(trainer)` gave on each of them."""
    recipe = recipe_at(folder, *overrides, **changes)

    def rank_main(rank: int) -> Any:
        with process_group("cpu") as (world, device):
            trainer = Trainer(recipe, RegistryWith(*PLUGIN), world, device)
            trainer.fit()
            return see(trainer)

    seen = run_ranks(rank_main)
    return run_directory(recipe), seen


def assert_same_weights(a: Path, b: Path, *, atol: float = 0.0) -> None:
    """The same model and teachers in the last checkpoints of two runs; to the bit without `atol`."""
    for group in ("model", "teachers"):
        first, second = (checkpoint.find_latest(each / "checkpoints").tensors(group) for each in (a, b))
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.allclose(first[name], second[name], rtol=0, atol=atol)] == []


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if "loss" in line or any(key.endswith("/loss") for key in line)]


def in_training(step: Any) -> bool:
    """Not in the preflight, a check or an evaluation."""
    return step.total > 1


@plugin
class TokenEncoder(Encoder):
    """A token at every position, the mask token at hidden ones; rows may hide different numbers."""

    name = "tokens"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.embed, self.mask_token = nn.Linear(48, 8), nn.Parameter(torch.full((8,), 0.1))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        layers = frozenset(range(2))
        self.spec = EncoderSpec(8, GRID, 4, 2, 1, offers=Ask(layers=layers), layers=dict.fromkeys(layers, (8, GRID)))

    def forward(self, view, mask, ask=Ask()):
        x = torch.where(mask.at(GRID).hidden[..., None], self.mask_token, self.embed(patchify(view, 4)))
        layers = {}
        for i, layer in enumerate(self.layers):
            x = x + layer(x + x.mean(1, keepdim=True))
            if i in ask.layers:
                layers[i] = x
        return Latent(x, GRID, layers=layers)


# --- input rewritten by the masker (MixMIM) --------------------------------------------------------------------------


@plugin
class MixMasker(Masker):
    """The images of a pair (2i, 2i + 1) fill one another's hidden patches; both are to be un-mixed everywhere."""

    name = "mix"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=8, rewrites=("x",))

    def forward(self, step, views):
        partner = torch.arange(len(views["x"]), device=views["x"].device) ^ 1
        hidden = mask_from_noise(step.rand("mask", 16), 8, GRID).hidden
        hidden = torch.where((partner % 2 == 1)[:, None], hidden, ~hidden[partner])
        patches = patchify(views["x"], 4)
        mixed = unpatchify(torch.where(hidden[..., None], patches[partner], patches), 4, GRID)
        mask = Mask(hidden, GRID, predict=torch.ones_like(hidden), equal=True)
        return Masked({"x": mask}, {"x": mixed}, extra={"partner": partner}, originals={"x": views["x"]})


@plugin
class MixEncoder(TokenEncoder):
    """Sees every token of the mixture."""

    name = "mix_encoder"
    seen: list[Tensor] = []

    def forward(self, view, mask, ask=Ask()):
        self.seen.append(view)
        return super().forward(view, Mask.none(len(view), GRID, view.device), ask)


@plugin
class UnmixTarget(Target):
    """Both clean images of a mixture."""

    name = "unmix"
    seen: list[Masked] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = TargetSpec("opaque", 48, GRID)

    def forward(self, step, masked):
        if in_training(step):
            self.seen.append(masked)
        patches = patchify(masked.clean("x"), 4)
        return {"own": patches, "partner": patches[masked.extra["partner"]]}


@plugin
class UnmixDecoder(LinearDecoder):
    """Each image from its own tokens and the mask token."""

    name = "unmix"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.mask_token = nn.Parameter(torch.zeros(specs.encoder.dim))
        self.spec = replace(self.spec, kind="opaque")

    def forward(self, latent, mask):
        hidden = mask.at(GRID).hidden[..., None]
        own = torch.where(hidden, self.mask_token, latent.tokens)
        partner = torch.where(hidden, latent.tokens, self.mask_token)
        return {"own": self.head(own), "partner": self.head(partner)}


@plugin
class UnmixLoss(Loss):
    """Squared error of each image where the mixture shows the other."""

    name = "unmix"
    accepts = frozenset({"opaque"})
    seen: list[tuple[Any, Any, Mask]] = []

    def forward(self, pred, target, mask, latent):
        self.seen.append((pred, target, mask))
        own = (pred["own"] - target["own"]).square().mean(-1)
        partner = (pred["partner"] - target["partner"]).square().mean(-1)
        return torch.where(mask.hidden, own, partner).mean()


def test_a_masker_mixes_images_and_the_target_sees_them_clean(tmp_path):
    MixEncoder.seen, UnmixTarget.seen, UnmixLoss.seen = [], [], []
    parts = {"masker": "mix", "encoder": "mix_encoder", "target": "unmix", "decoder": "unmix", "loss": "unmix"}
    run_dir = run(tmp_path, **parts)
    assert len(UnmixTarget.seen) == 3
    for masked in UnmixTarget.seen:
        clean, mixed = patchify(masked.clean("x"), 4), patchify(masked.views["x"], 4)
        assert any(masked.views["x"] is view for view in MixEncoder.seen)
        for row, hidden in enumerate(masked.masks["x"].hidden):
            assert torch.equal(mixed[row][~hidden], clean[row][~hidden])
            assert torch.equal(mixed[row][hidden], clean[row ^ 1][hidden])
            assert torch.equal(hidden, ~masked.masks["x"].hidden[row ^ 1])
    pred, target, mask = UnmixLoss.seen[-1]
    errors = [
        (pred[side][row, n] - target[side][row, n]).square().mean().item()
        for row in range(4)
        for n in range(16)
        for side in ["own" if mask.hidden[row, n] else "partner"]
    ]
    assert lines_of(run_dir)[-1]["loss"] == pytest.approx(sum(errors) / 64)


@plugin
class Generator(RandomMasker):
    """Fills the hidden patches itself, learns to do it well, and leaves every patch visible (CIM)."""

    name = "generator"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.fill = nn.Linear(48, 48)
        self.spec = replace(self.spec, rewrites=("x",))

    def forward(self, step, views):
        masked = super().forward(step, views)
        hidden, patches = masked.masks["x"].hidden, patchify(views["x"], 4)
        visible = patches * ~hidden[..., None]
        filled = self.fill(visible.mean(1, keepdim=True)).expand_as(patches)
        corrupt = unpatchify(torch.where(hidden[..., None], filled.detach(), patches), 4, GRID)
        mask = Mask.none(len(patches), GRID, hidden.device).predicting(hidden)
        loss = (filled - patches)[hidden].square().mean()
        return Masked({"x": mask}, {"x": corrupt}, losses={"generator": loss}, originals={"x": views["x"]})


def test_a_masker_that_learns_brings_its_own_loss(tmp_path):
    run_dir, fills = watch(tmp_path, lambda model: model.objective.masker.fill.weight.clone(), masker="generator")
    assert all(not torch.equal(before, after) for before, after in pairwise(fills))
    for line in lines_of(run_dir):
        assert line["loss"] == pytest.approx(line["loss/generator"] + line["loss/main"])


# --- fusion of several layers (MFF) ----------------------------------------------------------------------------------


@plugin
class FusionDecoder(Decoder):
    """A learned softmax mixture of encoder layers, in front of MAE's decoder."""

    name = "fusion"

    class Config(Section):
        layers: tuple[int, ...] = (0,)
        """Encoder layers that are mixed with the encoder's output."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.ask = Ask(layers=frozenset(self.config.layers))
        self.num_prefix_tokens = specs.encoder.num_prefix_tokens
        self.fusion = nn.Parameter(torch.zeros(len(self.config.layers) + 1))
        self.decoder = MAEDecoder(MAEDecoder.Config(embed_dim=16, depth=1, num_heads=2), specs)
        self.spec = self.decoder.spec

    def forward(self, latent, mask):
        last = torch.cat([latent.prefix, latent.tokens], dim=1)
        layers = torch.stack([*(latent.layers[i] for i in self.config.layers), last], dim=-1)
        fused = layers @ self.fusion.softmax(0)
        prefix, tokens = fused[:, : self.num_prefix_tokens], fused[:, self.num_prefix_tokens :]
        return self.decoder(replace(latent, prefix=prefix, tokens=tokens), mask)

    def metrics(self):
        return {f"weight_{i}": weight for i, weight in enumerate(self.fusion.detach().softmax(0))}


def test_a_decoder_fuses_the_layers_it_asks_for_and_logs_their_weights(tmp_path):
    run_dir = run(tmp_path, encoder=VIT, decoder={"type": "fusion", "layers": [0, 1]})
    weights = [[line[f"heads.main.decoder/weight_{i}"] for i in range(3)] for line in lines_of(run_dir)]
    final = checkpoint.find_latest(run_dir / "checkpoints").tensors("model")["heads.main.decoder.fusion"].softmax(0)
    assert weights[-1] == pytest.approx(final.tolist())
    assert sum(weights[-1]) == pytest.approx(1)
    assert max(weights[-1]) > 1 / 3 + 1e-3


def test_a_layer_that_the_encoder_lacks_is_refused_with_both_names(tmp_path):
    recipe = recipe_at(tmp_path, encoder=VIT, decoder={"type": "fusion", "layers": [0, 2]})
    with pytest.raises(RecipeError, match=r"decoder 'fusion' asks for layers \[2\], which encoder 'mae_vit' lacks"):
        build_model(recipe, RegistryWith(*PLUGIN))


# --- two heads on the ids of a frozen tokenizer (BEiT v2) ------------------------------------------------------------


@plugin
class Tokenizer(Encoder):
    """Ids of 5 codes. Its normalisation would move, and change the ids, if it were ever in train mode."""

    name = "tokenizer"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.norm, self.codes = nn.BatchNorm1d(48), nn.Linear(48, 5)
        self.spec = EncoderSpec(5, GRID, 4, 1, 1, offers=Ask(aux=frozenset({"ids"})))

    def forward(self, view, mask, ask=Ask()):
        logits = self.codes(self.norm(patchify(view, 4).flatten(0, 1))).unflatten(0, (len(view), 16))
        return Latent(logits, GRID, aux={"ids": logits.argmax(-1)} if "ids" in ask.aux else {})


@plugin
class TokenIds(Target):
    """The frozen tokenizer's ids of the clean image."""

    name = "token_ids"
    seen: list[tuple[Tensor, Tensor]] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = TargetSpec("ids", specs.teacher("vqkd").dim, specs.teacher("vqkd").grid)

    def teacher_asks(self):
        return {"vqkd": Ask(aux=frozenset({"ids"}))}

    def forward(self, step, masked):
        ids = step.teacher("vqkd", masked.clean("x")).aux["ids"]
        if in_training(step):
            self.seen.append((masked.clean("x"), ids))
        return ids


@plugin
class LayerDecoder(LinearDecoder):
    """A linear head on an inner layer."""

    name = "linear_on_layer"

    class Config(LinearDecoder.Config):
        layer: int
        """Encoder layer that it reads."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.ask = Ask(layers=frozenset({self.config.layer}))

    def forward(self, latent, mask):
        return super().forward(replace(latent, tokens=latent.layers[self.config.layer]), mask)


@plugin
class RecordedCrossEntropy(CrossEntropyLoss):
    name = "recorded_cross_entropy"
    seen: list[float] = []

    def forward(self, pred, target, mask, latent):
        loss = super().forward(pred, target, mask, latent)
        self.seen.append(loss.item())
        return loss


def test_two_heads_learn_the_ids_of_a_tokenizer_that_stays_frozen_to_the_bit(tmp_path):
    TokenIds.seen, RecordedCrossEntropy.seen = [], []
    early = {
        "target": "token_ids",
        "decoder": {"type": "linear_on_layer", "layer": 0},
        "loss": "recorded_cross_entropy",
    }
    heads = {
        "late": {"target": "token_ids", "decoder": "linear", "loss": "cross_entropy"},
        "early": {**early, "weight": {"shape": "linear", "from": 1.0, "to": 0.0}},
    }
    run_dir, tokenizers = watch(
        tmp_path,
        lambda model: state_of(model.teachers["vqkd"]),
        "train.steps=20",
        teachers={"vqkd": {"encoder": "tokenizer"}},
        heads=heads,
        **NO_HEAD,
    )
    assert len(tokenizers) == 21
    assert all(same(tokenizers[0], later) for later in tokenizers)
    assert any(name.endswith("running_mean") for name in tokenizers[0])
    lines = lines_of(run_dir)
    unweighted = RecordedCrossEntropy.seen[-20:]  # the first calls are those of the check and the preflight
    for index, line in enumerate(lines):
        assert line["loss/early"] == pytest.approx((1 - index / 20) * unweighted[index], rel=1e-5)
        assert line["loss"] == pytest.approx(line["loss/early"] + line["loss/late"], rel=1e-5)
    first, last = (sum(line["loss/late"] for line in part) for part in (lines[:5], lines[-5:]))
    assert last < first


# --- teacher features as targets (I-JEPA, data2vec) and masks from a teacher (AttMask) -------------------------------


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


EMA = {"ema": {"copy": ["encoder"], "momentum": {"shape": "linear", "from": 0.5, "to": 1.0}}}
MAE_DECODER = {"type": "mae_decoder", "embed_dim": 16, "depth": 1, "num_heads": 2}


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


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
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


# --- an objective of one's own over two views (iBOT) -----------------------------------------------------------------


@plugin
class TwoCrops(ViewBuilder):
    """Two crops of one image: `x` and `x2`."""

    name = "two_crops"
    num_random = 2 * ImageViews.num_random

    def __init__(self, config):
        super().__init__(config)
        self.crop = ImageViews(ImageViews.Config(img_size=16))
        self.specs = {name: replace(self.crop.specs["x"], name=name) for name in ("x", "x2")}

    def __call__(self, sample, rand):
        return {name: self.crop(sample, part)["x"] for name, part in zip(self.specs, rand.chunk(2), strict=True)}

    def prepare(self, step, batch):
        return {name: self.crop.prepare(step, {"x": images})["x"] for name, images in batch.items()}

    def evaluation_view(self, sample):
        return self.crop.evaluation_view(sample)

    def to_image(self, view):
        return self.crop.to_image(view)


@plugin
class TwoMasks(Masker):
    """A mask of its own for each of two views."""

    name = "two_masks"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=5, views=tuple(specs.views))

    def forward(self, step, views):
        masks = {name: mask_from_noise(step.rand(f"mask {name}", 16), 11, GRID) for name in self.spec.views}
        return Masked(masks, views)


@plugin
class SelfDistillation(Objective):
    """Cross-entropy to a momentum teacher's centred outputs: per image across crops, per patch inside one."""

    name = "self_distillation"
    teacher_outputs: list[Tensor] = []

    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.masker, self.encoder = parts.masker, parts.encoder
        self.head = nn.Linear(parts.specs.encoder.dim, 6)
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("batch_sum", torch.zeros(7), persistent=False)  # outputs of this step, and their number

    def forward(self, step, views):
        masked = self.masker(step, views)
        head = step.teachers.part("ema", "head")
        students = {name: self.head(self.encoder(view, masked.masks[name]).tokens) for name, view in views.items()}
        teachers = {name: head(step.teacher("ema", view).tokens) for name, view in views.items()}
        probs = {name: softmax((output - self.centre) / 0.1, -1) for name, output in teachers.items()}
        for output in teachers.values():
            self.batch_sum[:6] += output.sum((0, 1))
            self.batch_sum[6] += len(output) * 16
            if in_training(step):
                self.teacher_outputs.append(output)
        patch = sum(self.cross_entropy(students[name], probs[name])[masked.masks[name].hidden].mean() for name in views)
        image = self.cross_entropy(students["x"].mean(1), probs["x2"].mean(1)).mean()
        return {"image": image, "patch": patch}

    def cross_entropy(self, logits, probs):
        return -(probs * log_softmax(logits / 0.2, -1)).sum(-1)

    def before_step(self, step):
        self.step_sum = self.batch_sum.clone()
        self.batch_sum.zero_()  # also if the step will be skipped

    def after_step(self, step):
        total = step.world.sum(self.step_sum)
        self.centre.lerp_(total[:6] / total[6], 0.1)


IBOT = {
    "views": "two_crops",
    "masker": "two_masks",
    "objective": "self_distillation",
    "teachers": {"ema": {"copy": ["encoder", "head"], "momentum": 0.9}},
    "optim": SGD,
    **NO_HEAD,
}


def test_two_views_are_pulled_to_a_teacher_whose_centre_is_that_of_its_outputs(tmp_path):
    SelfDistillation.teacher_outputs = []
    run_dir, centres = watch(tmp_path, lambda model: model.objective.centre.clone(), **IBOT)
    outputs = SelfDistillation.teacher_outputs
    assert [len(output) for output in outputs] == [4] * 6
    expected = torch.zeros(6)
    for index in range(3):
        expected = 0.9 * expected + 0.1 * torch.cat(outputs[2 * index : 2 * index + 2]).mean((0, 1))
        assert torch.allclose(centres[index + 1], expected, atol=1e-6)
    line = lines_of(run_dir)[-1]
    assert line["loss"] == pytest.approx(line["loss/image"] + line["loss/patch"])


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_centre_and_the_weights_are_the_same_on_two_ranks_as_on_one(tmp_path, mode):
    alone = run(tmp_path / "alone", **IBOT)
    see = lambda trainer: (trainer.objective.centre.clone(), [local(p).clone() for p in trainer.objective.parameters()])  # noqa: E731
    ranks, ((centre, weights), (other_centre, other_weights)) = on_two_ranks(
        tmp_path / "ranks", see, f"train.distributed={mode}", **IBOT
    )
    assert torch.equal(centre, other_centre)
    assert centre.abs().max() > 1e-3
    if mode == "ddp":
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert_same_weights(ranks, alone, atol=1e-6)


def test_a_resumed_objective_of_ones_own_goes_on_with_its_centre(tmp_path):
    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            raise KeyboardInterrupt

    straight = run(tmp_path / "straight", **IBOT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", "checkpoint.every_steps=2", hooks=Crash(), **IBOT)
    resumed = run(tmp_path / "resumed", **IBOT)
    assert_same_weights(straight, resumed)
    assert [line["loss"] for line in lines_of(straight)] == [line["loss"] for line in lines_of(resumed)]


# --- several phases and several optimizers (ADIOS, CAPI) -------------------------------------------------------------


@plugin
class Occlusion(Objective):
    """An encoder pulls an image and its occluded version together; a soft masker pushes them apart (ADIOS)."""

    name = "occlusion"
    seen: list[tuple[str, dict[str, Tensor]]] = []

    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.encoder = parts.encoder
        self.masker = nn.Sequential(nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 1))

    def forward(self, step, views):
        x = views["x"]
        patches = patchify(x, 4)
        keep = self.masker(patches).sigmoid()
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
        "masker": {**SGD, "parameters": ["masker.*"]},
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
        ("occlude", {"masker"}),
    ] * (len(seen) // 2)


def test_phases_of_opposite_sign_move_only_their_own_parameters(tmp_path):
    Occlusion.seen = []
    _, states = watch(tmp_path / "against", lambda model: state_of(model.objective), "train.steps=2", **ADIOS)
    against = Occlusion.seen
    assert phases_move_their_own(states[0], against)

    Occlusion.seen = []
    run(tmp_path / "with", "train.steps=2", "phases.1.sign=1", **ADIOS)
    bias = "masker.2.bias"
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


# --- around the optimizer --------------------------------------------------------------------------------------------


@plugin
class LateDecoder(LinearDecoder):
    """Its last layer starts to learn after two steps (DINO); counts the steps that were made."""

    name = "late"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))

    def before_step(self, step):
        if step.index < 2:
            self.head.weight.grad.zero_()

    def after_step(self, step):
        self.made += 1


@plugin
class PoisonedLoss(MSELoss):
    """Not finite at one step."""

    name = "poisoned"

    class Config(Section):
        call: int
        """Number of the call, after the preflight's, that is not finite."""

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.calls = -1

    def forward(self, pred, target, mask, latent):
        loss = super().forward(pred, target, mask, latent)
        self.calls += 1
        return loss * float("nan") if self.calls - 1 == self.config.call else loss


def test_components_act_before_the_optimizer_and_after_a_step_that_was_made(tmp_path):
    run_dir, decoders = watch(
        tmp_path,
        lambda model: state_of(model.objective.heads["main"].decoder),
        "train.steps=5",
        decoder="late",
        loss={"type": "poisoned", "call": 3},
    )
    weights = [decoder["head.weight"] for decoder in decoders]
    frozen = [torch.equal(before, after) for before, after in pairwise(weights)]
    assert frozen == [True, True, False, True, False]
    assert not torch.equal(decoders[0]["head.bias"], decoders[1]["head.bias"])
    assert [int(decoder["made"]) for decoder in decoders] == [0, 1, 2, 3, 3, 4]
    [skipped] = [json.loads(line) for line in (run_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert skipped["step"] == 3


# --- masks -----------------------------------------------------------------------------------------------------------


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
    assert model.objective(step, views)["main"].item() == pytest.approx(sum(errors) / 6)


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
    assert model.objective(step, {"x": x})["main"].item() == pytest.approx(by_hand)


# --- no images at all (Point-MAE) ------------------------------------------------------------------------------------


@plugin
class Surfaces(Source):
    """Point sets (64, 3) on spheres and cylinders of several proportions."""

    name = "surfaces"
    classes = ("sphere", "cylinder")

    class Config(Section):
        first: int = 0
        """Number of the first surface."""

    def __len__(self):
        return 64

    def read(self, index):
        index += self.config.first
        u, v = rng.uniform(0, f"surface {index}", torch.arange(64), 2).T
        angle, height, label = 2 * torch.pi * u, 2 * v - 1, index % 2
        radius = torch.ones_like(v) if label else (1 - height**2).sqrt()
        stretch = 0.5 + index % 7 / 7
        points = torch.stack([radius * angle.cos(), radius * angle.sin(), stretch * height], dim=-1)
        return Sample(points, f"surface {index}", label)

    def evaluation_sources(self):
        return self, Surfaces(self.Config(first=64))


@plugin
class PointGroups(ViewBuilder):
    """A randomly turned point set, on the device cut into groups around centres that are far apart."""

    name = "point_groups"
    num_random = 1

    class Config(Section):
        num_groups: int = 8
        """Groups of a point set."""
        group_size: int = 8
        """Points of a group."""

    def __init__(self, config):
        super().__init__(config)
        self.specs = {"x": ViewSpec("x", (config.num_groups, 1 + config.group_size, 3), "points")}

    def __call__(self, sample, rand):
        angle = 2 * torch.pi * rand[0]
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        return {"x": torch.cat([sample.data[:, :2] @ turn, sample.data[:, 2:]], dim=1)}

    def prepare(self, step, batch):
        """points (B, N, 3) -> (B, G, 1 + K, 3): each centre, then its nearest points relative to it."""
        points = batch["x"]
        rows, chosen = torch.arange(len(points), device=points.device), [torch.zeros_like(points[:, 0, 0]).long()]
        distance = torch.full_like(points[..., 0], torch.inf)
        while len(chosen) < self.config.num_groups:
            distance = torch.minimum(distance, (points - points[rows, chosen[-1]][:, None]).square().sum(-1))
            chosen.append(distance.argmax(1))
        centres = gather_tokens(points, torch.stack(chosen, dim=1))
        nearest = torch.cdist(centres, points).topk(self.config.group_size, largest=False).indices
        groups = gather_tokens(points, nearest.flatten(1)).unflatten(1, nearest.shape[1:]) - centres[:, :, None]
        return {"x": torch.cat([centres[:, :, None], groups], dim=2)}

    def example(self, batch_size):
        return {"x": rng.uniform(0, "example", torch.arange(batch_size), 64 * 3).reshape(-1, 64, 3)}

    def evaluation_view(self, sample):
        return sample.data


@plugin
class PointEncoder(Encoder):
    """A token for every group, the mask token at hidden ones, with the centre as position."""

    name = "points"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        num_groups, _, chans = specs.view("x").shape
        self.points = nn.Sequential(nn.Linear(chans, 16), nn.GELU(), nn.Linear(16, 16))
        self.position, self.mask_token = nn.Linear(chans, 16), nn.Parameter(torch.zeros(16))
        self.mix = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.spec = EncoderSpec(16, Grid((num_groups,)), 1, 1, 1, in_chans=chans)

    def forward(self, view, mask, ask=Ask()):
        tokens = self.points(view[:, :, 1:]).amax(2)
        x = torch.where(mask.hidden[..., None], self.mask_token, tokens) + self.position(view[:, :, 0])
        return Latent(x + self.mix(x + x.mean(1, keepdim=True)), self.spec.grid)


@plugin
class PointTarget(Target):
    """The points of each group around its centre."""

    name = "points"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        num_groups, size, chans = specs.view("x").shape
        self.spec = TargetSpec("dense", (size - 1) * chans, Grid((num_groups,)))

    def forward(self, step, masked):
        return masked.clean("x")[:, :, 1:].flatten(2)


@plugin
class ChamferLoss(Loss):
    """Squared distance of each point to the nearest one of the other set, both ways."""

    name = "chamfer"

    def forward(self, pred, target, mask, latent):
        predicted = pred.values.unflatten(-1, (-1, 3))
        wanted = Pred(target, pred.grid).at(pred.ids).unflatten(-1, (-1, 3))
        distance = (predicted[..., :, None, :] - wanted[..., None, :, :]).square().sum(-1)
        return distance.amin(-1).mean() + distance.amin(-2).mean()


POINTS = {
    "data": {"source": {"type": "surfaces"}, "workers": 0},
    "views": "point_groups",
    "encoder": "points",
    "target": "points",
    "loss": "chamfer",
}


def test_point_sets_train_through_the_same_trainer(tmp_path):
    options = ["train.steps=60", "train.total_batch_size=16", "log.every_steps=5", "optim.lr=0.02"]
    run_dir = run(tmp_path, *options, **POINTS)
    losses = [line["loss"] for line in lines_of(run_dir)]
    assert losses[-1] < 0.75 * losses[0]
    [knn] = [line["knn_top1"] for line in read_metrics(run_dir) if "knn_top1" in line]
    assert 0 < knn <= 1
