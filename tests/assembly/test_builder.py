"""Building a model: what does not fit is refused with both names, and no parameter is left without a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from mim_framework.assembly.builder import build_model, build_optimizers, build_source
from mim_framework.assembly.opened import load_run
from mim_framework.assembly.preflight import make_step, preflight
from mim_framework.assembly.weights import load_into
from mim_framework.base.errors import CheckpointError, RecipeError
from mim_framework.base.section import Section
from mim_framework.builtins.maskers import RandomMasker
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.contract.components import Decoder, Encoder, Loss, Objective, Target
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent, Masked, Pred
from mim_framework.contract.specs import EncoderSpec, MaskerSpec, PredSpec, TargetSpec
from mim_framework.layouts.tables import resize_position_table
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.testing import RegistryWith

GRID = Grid((4, 4))


class ToyEncoder(Encoder):
    """A token at every position; hidden ones are replaced by a mask token."""

    name = "toy"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.proj, self.mask_token = nn.Linear(48, 8), nn.Parameter(torch.zeros(8))
        layers = frozenset({0})
        self.spec = EncoderSpec(8, GRID, 4, 1, 1, accepts=frozenset({"equal", "none"}), offers=Ask(layers=layers))

    def forward(self, view, mask, ask=Ask()):
        from mim_framework.nn.patches import patchify

        tokens = self.proj(patchify(view, 4))
        hidden = mask.at(GRID).hidden[..., None]
        return Latent(torch.where(hidden, self.mask_token.to(tokens.dtype), tokens), GRID, layers={0: tokens})


class UnevenMasker(RandomMasker):
    name = "uneven"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=False, num_hidden=8)


class LyingMasker(RandomMasker):
    """Promises rows that hide equal numbers, and does not keep it."""

    name = "lying"

    def forward(self, step, views):
        hidden = torch.zeros(len(step.positions), 16, dtype=torch.bool)
        hidden[0, :5] = hidden[1:, :6] = True
        return Masked({"x": Mask(hidden, GRID, equal=True)}, views)


class IdsTarget(Target):
    name = "ids"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = TargetSpec("ids", 5, GRID)

    def forward(self, step, masked):
        return torch.zeros(len(masked.views["x"]), 16, dtype=torch.int64)


class CoarseTarget(IdsTarget):
    name = "coarse"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = TargetSpec("dense", 5, Grid((2, 2)))


class AskingDecoder(Decoder):
    name = "asking"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.ask = Ask(layers=frozenset({0, 7}))
        self.head = nn.Linear(8, 48)
        self.spec = PredSpec("dense", 48, GRID)

    def forward(self, latent, mask):
        return Pred(self.head(latent.tokens), GRID)


class IdleDecoder(AskingDecoder):
    name = "idle"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.ask = Ask()
        self.unused = nn.Parameter(torch.zeros(3))


class SlippingDecoder(AskingDecoder):
    """A plugin's slip that shows at once, or with the first batch."""

    name = "slipping"

    class Config(Section):
        at_once: bool = False

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.ask = Ask()
        if config.at_once:
            self.head.weigth.zero_()

    def forward(self, latent, mask):
        return {"values": latent.tokens}["value"]


class LatentLoss(Loss):
    name = "latent"

    def forward(self, pred, target, mask, latent):
        return latent.tokens.square().mean() + pred.values.mean()


class TwoHeads(Objective):
    """An objective of one's own that needs no head at all."""

    name = "own"

    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.encoder = parts.encoder

    def forward(self, step, views):
        latent = self.encoder(views["x"], Mask.none(len(views["x"]), GRID, views["x"].device))
        return {"pull": latent.tokens.square().mean() + self.encoder.mask_token.square().mean()}


REGISTRY = RegistryWith(
    ToyEncoder, UnevenMasker, LyingMasker, IdsTarget, CoarseTarget, AskingDecoder, IdleDecoder, SlippingDecoder,
    LatentLoss, TwoHeads,
)  # fmt: skip
RECIPE = {
    "name": "toy",
    "data": {"source": {"type": "digits"}},
    "views": {"type": "image", "img_size": 16},
    "masker": {"type": "random", "mask_ratio": 0.5},
    "encoder": "toy",
    "target": "pixels",
    "decoder": "linear",
    "loss": "mse",
    "optim": {"lr": 0.001},
    "train": {"total_batch_size": 4, "steps": 1},
}
CPU = torch.device("cpu")


def recipe_of(tmp_path: Path, **changes):
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
    return load_recipe(file, [], REGISTRY)


def test_a_built_model_trains_every_parameter(tmp_path):
    model = build_model(recipe_of(tmp_path), REGISTRY)
    losses = preflight(model, CPU)
    assert losses.keys() == {"main"}
    assert losses["main"] > 0
    assert all(parameter.grad is None for parameter in model.objective.parameters())


def test_weights_depend_on_the_seed_and_on_nothing_else(tmp_path):
    first = build_model(recipe_of(tmp_path), REGISTRY).objective.state_dict()
    torch.rand(7)
    second = build_model(recipe_of(tmp_path), REGISTRY).objective.state_dict()
    other = build_model(recipe_of(tmp_path, seed=1), REGISTRY).objective.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.proj.weight"], other["encoder.proj.weight"])


def test_building_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    preflight(build_model(recipe_of(tmp_path), REGISTRY), CPU)
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"masker": "uneven"}, r"toy.yaml:\d+:\d+: masker: masker 'uneven' and encoder 'toy' do not fit: rows that hide different"),
        ({"encoder": {"type": "timm", "model": "test_vit"}, "views": {"type": "image", "img_size": 32}}, "masker 'random' and encoder 'timm' do not fit: the encoder takes no masks"),
        ({"decoder": "asking"}, r"decoder 'asking' asks for layers \[7\], which encoder 'toy' lacks"),
        ({"target": "ids"}, "loss 'mse' takes dense targets, target 'ids' gives ids"),
        ({"target": "ids", "loss": "cross_entropy", "decoder": "idle"}, "dense predictions for a ids target"),
        ({"target": "coarse", "decoder": "idle"}, "predictions of size 48 on grid 4x4, targets of size 5 on grid 2x2"),
        ({"target": "coarse"}, r"toy.yaml:\d+:\d+: decoder: linear: decoder 'linear': target grid 2x2, encoder grid 4x4"),
        ({"target": {"type": "pixels", "patch_size": 5}}, "image size 16x16 is not a multiple of patch_size 5"),
        ({"target": {"type": "features", "teacher": "clip"}}, "no teacher 'clip'; the teachers of this recipe are none"),
        (
            {"teachers": {"ema": {"copy": ["encodr"], "momentum": 0.9}}},
            r"teachers.ema.copy: objective 'masked_prediction' has no part 'encodr', did you mean 'encoder'\?; "
            r"it has .*heads.main.decoder",
        ),
        (
            {"masker": {"type": "random", "mask_patch_size": 2}},
            "masker 'random' and encoder 'toy' do not fit: mask grid 8x8, token grid 4x4; "
            "a token of 4 pixels cannot be hidden in part",
        ),
        (
            {"encoder": {"type": "timm", "model": "resnet18"}},
            "encoder 'timm' has no token in so small an image: one takes 32 pixels and more",
        ),
        (
            {"decoder": {"type": "slipping", "at_once": True}},
            r"toy.yaml:\d+:\d+: decoder: slipping: AttributeError: .* has no attribute 'weigth'",
        ),
        (
            {"evaluate": [{"type": "knn", "pool": "cls"}]},
            r"toy.yaml:\d+:\d+: evaluate.0: knn: pool is 'cls', but the encoder has no class token",
        ),
        ({"encoder": {"type": "mae_vit", "patch_size": 5}}, "image size 16x16 is not a multiple of patch_size 5"),
        ({"encoder": {"type": "mae_vit", "patch_size": 4}}, "decoder 'linear' needs an encoder with a token at every position"),
        ({"encoder": {"type": "timm", "model": "vit_tinny"}}, "timm knows no model 'vit_tinny'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_place_and_both_names(tmp_path, changes, text):
    with pytest.raises(RecipeError, match=text):
        build_model(recipe_of(tmp_path, **changes), REGISTRY)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decoder": "idle"}, "trainable parameters that no loss reaches: heads.main.decoder.unused"),
        ({"masker": "lying"}, r"equal=True but hides \[5, 6\] positions"),
        ({"decoder": "slipping"}, r"toy.yaml: the model fails on a made-up batch: KeyError: 'value'"),
    ],
)
def test_the_preflight_refuses_what_only_a_batch_shows(tmp_path, changes, text):
    with pytest.raises(RecipeError, match=text):
        preflight(build_model(recipe_of(tmp_path, **changes), REGISTRY), CPU)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optim": {"lr": 1, "type": "adamv"}}, r"toy.yaml:\d+:\d+: optim: no optimizer type 'adamv'"),
        ({"optim": {"lr": 1, "options": {"x": 1}}}, "optim: 'adamw' cannot be made: TypeError"),
        ({"optim": {"lr": 1, "parameters": ["encoder.*"]}}, r"optim: parameter 'heads\..*' matches no optimizer"),
        (
            {"optim": {"lr": 1, "layer_decay": 0.5}},
            r"toy.yaml:\d+:\d+: optim: layer_decay: encoder 'toy' has no layers, it names no `repeated_blocks`",
        ),
        (
            {"optim": {"lr": 1, "multipliers": [{"parameters": ["encoder.x"], "lr": 2}]}},
            r"toy.yaml:\d+:\d+: optim: multipliers.0: pattern 'encoder.x' matches no parameter",
        ),
        (
            {"optim": None, "optimizers": {"all": {"lr": 1}, "none": {"lr": 1, "parameters": ["x"]}}},
            r"toy.yaml:\d+:\d+: optimizers.none: matches no trainable parameter \(patterns: x\)",
        ),
    ],
)
def test_optimizers_that_do_not_fit_the_model_are_refused_with_their_place(tmp_path, changes, text):
    recipe = recipe_of(tmp_path, **changes)
    with pytest.raises(RecipeError, match=text):
        build_optimizers(recipe, build_model(recipe, REGISTRY).objective, 4)


def test_weights_that_timm_cannot_download_are_refused_with_a_cure(tmp_path, monkeypatch):
    create_model = timm.create_model

    def offline(name, pretrained, **options):
        if pretrained:
            raise ConnectionError("no route to host")
        return create_model(name, **options)

    monkeypatch.setattr("timm.create_model", offline)
    teachers = {"clip": {"encoder": {"type": "timm", "model": "test_vit", "pretrained": True}}}
    text = r"timm cannot load the weights of 'test_vit' \(ConnectionError: no route to host\).*HF_HOME.*=false"
    with pytest.raises(RecipeError, match=f"teachers.clip.encoder: timm: {text}"):
        build_model(recipe_of(tmp_path, teachers=teachers), REGISTRY)
    build_model(recipe_of(tmp_path, teachers=teachers), REGISTRY, with_weights=False)  # costs, imports and exports


def test_a_run_of_another_machine_is_loaded_on_a_device_of_this_one(tmp_path, monkeypatch, caplog):
    train = {"total_batch_size": 4, "steps": 1, "device": "cuda"}
    recipe = recipe_of(tmp_path, train=train)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    save_checkpoint(tmp_path / "checkpoints", 1, {"model": build_model(recipe, REGISTRY).objective.state_dict()}, {})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert load_run(tmp_path, registry=REGISTRY).device == CPU
    assert "was trained on cuda, which is not here; using cpu" in caplog.text


def test_several_heads_add_their_weighted_losses(tmp_path):
    head = {"target": "pixels", "decoder": "linear"}
    heads = {"a": {**head, "loss": "mse"}, "b": {**head, "loss": "l1", "weight": 0.0}}
    plain = {"target": None, "decoder": None, "loss": None}
    model = build_model(recipe_of(tmp_path, heads=heads, **plain), REGISTRY)
    step = make_step(model.recipe, torch.arange(2))
    losses = model.objective(step, model.views.prepare(step, model.views.example(2))).losses
    assert losses["a"] > 0
    assert losses["b"] == 0


def test_an_objective_of_ones_own_needs_no_heads(tmp_path):
    recipe = recipe_of(tmp_path, objective="own", target=None, decoder=None, loss=None)
    assert preflight(build_model(recipe, REGISTRY), CPU).keys() == {"pull"}


def test_a_frozen_teacher_feeds_a_feature_target(tmp_path):
    teachers = {"clip": {"encoder": "toy", "random": True}}
    recipe = recipe_of(tmp_path, teachers=teachers, target={"type": "features", "teacher": "clip"})
    model = build_model(recipe, REGISTRY)
    assert model.specs.teachers["clip"].dim == 8
    assert preflight(model, CPU)["main"] > 0


@pytest.mark.parametrize("with_weights", [True, False], ids=["run", "check"])
@pytest.mark.parametrize(
    ("encoder", "ways"),
    [
        ("toy", r"teachers.t.checkpoint=RUN"),
        (
            {"type": "timm", "model": "test_resnet"},
            r"teachers.t.encoder.pretrained=true, teachers.t.encoder.checkpoint=FILE",
        ),
    ],
)
def test_a_frozen_teacher_without_weights_is_refused_with_the_ways_to_give_some(tmp_path, with_weights, encoder, ways):
    recipe = recipe_of(tmp_path, teachers={"t": {"encoder": encoder}})
    message = rf"teachers.t.encoder: the frozen teacher 't' has no weights.*Give {ways}.*or teachers.t.random=true"
    with pytest.raises(RecipeError, match=message):
        build_model(recipe, REGISTRY, with_weights=with_weights)
    recipe = recipe_of(tmp_path, teachers={"t": {"encoder": encoder, "random": True}})
    assert "t" in build_model(recipe, REGISTRY, with_weights=with_weights).specs.teachers


def test_random_is_for_a_frozen_teacher_without_weights(tmp_path):
    teacher = {"encoder": {"type": "timm", "model": "test_vit", "pretrained": True}, "random": True}
    with pytest.raises(RecipeError, match="encoder 'timm' has weights by its options; leave out .* teachers.t.random"):
        build_model(recipe_of(tmp_path, teachers={"t": teacher}), REGISTRY, with_weights=False)
    for section, what in (({"copy": ["encoder"], "momentum": 1.0}, "copies"), ({"checkpoint": "x"}, "checkpoint=x")):
        with pytest.raises(RecipeError, match=f"'random' is for a frozen encoder without weights.*has {what}"):
            recipe_of(tmp_path, teachers={"t": {**section, "random": True}})


def test_a_momentum_teacher_starts_from_the_loaded_weights(tmp_path):
    source = build_model(recipe_of(tmp_path, seed=5), REGISTRY).objective
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, {"model": source.state_dict()}, {})
    teachers = {"ema": {"copy": ["encoder"], "momentum": 0.9}}
    model = build_model(recipe_of(tmp_path, init=str(tmp_path / "run"), teachers=teachers), REGISTRY)
    assert torch.equal(model.objective.encoder.proj.weight, source.encoder.proj.weight)
    assert torch.equal(model.teachers["ema"].part("encoder").proj.weight, source.encoder.proj.weight)


def test_a_loaded_run_has_its_frozen_teacher_and_needs_no_init(tmp_path):
    teacher = build_model(recipe_of(tmp_path, seed=5), REGISTRY).objective
    frozen = {"encoder": "toy", "checkpoint": str(tmp_path / "encoder.safetensors")}
    weights = {f"encoder.{name}": tensor for name, tensor in teacher.encoder.state_dict().items()}
    save_file(weights, frozen["checkpoint"])
    run_dir = tmp_path / "run"
    recipe = recipe_of(tmp_path, teachers={"frozen": frozen}, init=str(tmp_path / "gone"))
    model = build_model(recipe.model_copy(update={"init": None}), REGISTRY)
    save_checkpoint(run_dir / "checkpoints", 1, {"model": model.objective.state_dict()}, {})
    (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    loaded = load_run(run_dir, registry=REGISTRY)
    assert torch.equal(loaded.teachers["frozen"].part("encoder").proj.weight, teacher.encoder.proj.weight)
    assert torch.equal(loaded.objective.encoder.proj.weight, model.objective.encoder.proj.weight)


def mae_of(tmp_path, **changes):
    """A MAE of one block, of which tables of positions are a part."""
    slots = {
        "views": {"type": "image", "img_size": 32},
        "encoder": {"type": "mae_vit", "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "decoder": {"type": "mae_decoder", "embed_dim": 8, "depth": 1, "num_heads": 2},
    }
    return recipe_of(tmp_path, **{**slots, **changes})


@pytest.mark.fault(row="p")
@pytest.mark.parametrize(
    ("names", "share", "line"),
    [
        (["heads.main.decoder.mask_token"], r"0\.00%", r"encoder: 0 of 18 tensors \(0 of "),
        (
            ["encoder.patch_embed.proj.weight", "encoder.cls_token"],
            r"46\.17%",
            r"encoder: 2 of 18 tensors \(3,088 of ",
        ),
        ([], r"0\.00%", r"heads\.main\.decoder: 0 of \d+ tensors"),
    ],
)
def test_init_that_fits_hardly_anything_of_the_encoder_is_refused_with_counts(tmp_path, names, share, line, figure):
    state = build_model(mae_of(tmp_path), REGISTRY).objective.state_dict()
    save_file({name: state[name] for name in names}, tmp_path / "part.safetensors")
    recipe = mae_of(tmp_path, init=str(tmp_path / "part.safetensors"))
    with pytest.raises(
        CheckpointError, match=rf"(?s)part.safetensors holds {share} of the encoder, less than 50%.*{line}"
    ):
        build_model(recipe, REGISTRY)
    figure(f"{len(names)} tensors of the model: refused with {share.replace(chr(92), '')} of the encoder and counts")


@pytest.mark.fault(row="p")
def test_init_that_fits_in_part_is_told_with_counts_and_a_whole_one_is_not(tmp_path, figure):
    state = build_model(mae_of(tmp_path), REGISTRY).objective.state_dict()
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    for name, weights in (("part", encoder), ("whole", state)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    [note] = build_model(mae_of(tmp_path, init=str(tmp_path / "part.safetensors")), REGISTRY).notes
    assert "the rest starts at random:\n  encoder: 18 of 18 tensors" in note
    assert "heads.main.decoder: 0 of " in note
    assert build_model(mae_of(tmp_path, init=str(tmp_path / "whole.safetensors")), REGISTRY).notes == ()
    figure("the whole encoder alone: taken and told; the whole model: taken without a word")


def test_init_of_another_image_size_resizes_tables_of_positions(tmp_path):
    small = build_model(mae_of(tmp_path, views={"type": "image", "img_size": 16}), REGISTRY).objective.state_dict()
    save_file(small, tmp_path / "small.safetensors")
    recipe = mae_of(tmp_path, init=str(tmp_path / "small.safetensors"))
    table = build_model(recipe, REGISTRY).objective.state_dict()["encoder.pos_embed"]
    old = small["encoder.pos_embed"]
    assert torch.equal(table, resize_position_table(old, Grid((2, 2)), Grid((4, 4))))
    assert torch.equal(table[:, 0], old[:, 0])


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    module = nn.Linear(2, 2)
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"shapes that do not fit the recipe: weight \(3, 2\), needed \(2, 2\)"):
        load_into(module, tmp_path / "a.safetensors")
    save_file({"wheight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="names that the recipe's model lacks: wheight"):
        load_into(module, tmp_path / "b.safetensors")
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    assert load_into(module, tmp_path / "c.safetensors") == ["bias"]
    with pytest.raises(CheckpointError, match="no name starting with 'encoder.'"):
        load_into(module, tmp_path / "c.safetensors", prefix="encoder.")


def test_the_source_of_a_recipe(tmp_path):
    assert len(build_source(recipe_of(tmp_path), REGISTRY)) > 1000
