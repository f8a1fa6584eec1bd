"""Parameter groups, learning rates, clipping."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mim_framework.contract.components import Encoder
from mim_framework.contract.specs import Specs
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.runtime.launch import process_group
from mim_framework.runtime.optim import (
    Optimizer,
    OptimSection,
    assign,
    layers_above,
    parameter_groups,
)
from mim_framework.runtime.sharding import gather_full, shard
from mim_framework.testing import run_ranks


def step_at(epoch: float, epochs: float = 10.0) -> Step:
    return Step(0, 1, epoch, epochs, torch.arange(1), 0, None)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def test_biases_and_one_dimensional_parameters_do_not_decay():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model.token = nn.Parameter(torch.zeros(1, 1, 2))
    groups = {group["decay"]: group["names"] for group in parameter_groups(named(model), no_weight_decay=["0.weight"])}
    assert groups == {True: ["token"], False: ["0.weight", "0.bias", "1.weight", "1.bias"]}


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [group["names"] for group in parameter_groups(named(model))] == [["bias"]]


def test_base_lr_scales_with_the_total_batch():
    assert OptimSection(base_lr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimSection(base_lr=1e-3, lr_per_images=512).peak_lr(1024) == pytest.approx(2e-3)
    assert OptimSection(lr=0.1).peak_lr(4096) == 0.1
    with pytest.raises(ValidationError, match="one of the two"):
        OptimSection(lr=0.1, base_lr=0.1)


def test_schedule_sets_rate_and_decay_of_each_group():
    model = nn.Linear(2, 2)
    section = OptimSection(lr=1.0, warmup_epochs=2, weight_decay={"shape": "linear", "from": 0.0, "to": 1.0})
    optimizer = Optimizer("main", section, named(model), [], total_batch_size=1)
    optimizer.schedule(step_at(1.0))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.optimizer.param_groups] == [
        (0.5, 0.1),
        (0.5, 0.0),
    ]


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = Optimizer("main", OptimSection(lr=1.0, clip_grad_norm=1.0), named(model), [], 1)
    assert float(optimizer.clip()) == 5.0
    assert model.weight.grad.flatten().tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


def test_without_gradients_the_norm_is_zero_and_on_the_device_of_the_parameters():
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    norm = Optimizer("main", OptimSection(lr=1.0, clip_grad_norm=1.0), named(model), [], 1).clip()
    assert (norm.device.type, norm.shape) == ("meta", ())
    assert Optimizer("main", OptimSection(lr=1.0), named(nn.Linear(2, 1)), [], 1).clip() == 0


def test_adamw_step_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    model.weight.grad = torch.tensor([[2.0]])
    optimizer = Optimizer("main", OptimSection(lr=0.1, weight_decay=0.5), named(model), [], 1)
    optimizer.schedule(step_at(0.0))
    optimizer.step()
    assert model.weight.item() == pytest.approx(1.0 - 0.1 * 0.5 - 0.1)  # first Adam step has size lr


def test_an_optimizer_of_timm_is_found_by_its_name():
    model = nn.Linear(2, 2)
    optimizer = Optimizer("main", OptimSection(type="lamb", lr=0.1), named(model), [], 1)
    assert type(optimizer.optimizer).__name__ == "Lamb"


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("adamw", {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("lamb", {"betas": (0.9, 0.999), "eps": 1e-6}),
        ("lion", {"betas": (0.9, 0.99)}),
        ("adan", {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}),
    ],
)
def test_an_optimizer_keeps_its_own_defaults_unless_the_recipe_sets_others(kind, own):
    def groups(**options):
        optimizer = Optimizer("main", OptimSection(type=kind, lr=0.1, **options), named(nn.Linear(2, 2)), [], 1)
        return optimizer.optimizer.param_groups

    betas = (0.5,) * len(own["betas"])
    assert own.items() <= groups()[0].items()
    assert [group["betas"] for group in groups(betas=betas)] == [betas] * 2


def test_the_rate_that_an_optimizer_is_made_with_is_the_peak_of_the_total_batch():
    section = OptimSection(type="lamb", base_lr=1e-3)  # some of timm's, such as adamc, divide by it later
    optimizer = Optimizer("main", section, named(nn.Linear(2, 2)), [], total_batch_size=512)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"type": "adamv"}, r"no optimizer type 'adamv' \(some are adamw, lamb, .*\), did you mean 'adam'\?"),
        ({"type": "adahessian"}, "type 'adahessian' is not supported: it needs second derivatives"),
        ({"type": "kron"}, "type 'kron' is not supported: .* cannot be resumed exactly"),
        ({"type": "adan", "betas": [0.9, 0.99]}, r"'adan' takes 3 betas, got \(0.9, 0.99\)"),
        ({"type": "lars", "betas": [0.9, 0.99]}, "'lars' takes no betas, got"),
        ({"type": "lion", "eps": 1e-8}, "'lion' takes no eps, got 1e-08"),
        ({"options": {"mometum": 0.9}}, "'adamw' cannot be made: TypeError: .*'mometum'"),
        ({"type": "lamb", "options": {"mometum": 0.9}}, "'lamb' cannot be made: TypeError: .*'mometum'"),
        ({"type": "sgd", "options": {"momentum": -1}}, "'sgd' cannot be made: ValueError: Invalid momentum value"),
    ],
)
def test_an_optimizer_that_cannot_be_made_says_why(options, text):
    with pytest.raises(ValueError, match=text):
        Optimizer("main", OptimSection(lr=0.1, **options), named(nn.Linear(2, 2)), [], 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"options": {"weight_decay": 0.1}},
            "'weight_decay' is a key of this section; write it here and not in 'options'",
        ),
        ({"shape": "constant", "min_lr": 1e-6}, "a constant schedule takes no 'min_lr'"),
        ({"weight_decay": {"from": 0.1, "to": -0.1}}, "'weight_decay' must not be negative"),
        ({"betas": [0.9, 1.0]}, "less than 1"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(options, text):
    with pytest.raises(ValidationError, match=text):
        OptimSection(lr=0.1, **options)


def test_every_parameter_needs_exactly_one_optimizer():
    model = nn.ModuleDict({"encoder": nn.Linear(1, 1), "masker": nn.Linear(1, 1)})
    encoder, masker = OptimSection(lr=1, parameters=["encoder.*"]), OptimSection(lr=1, parameters=["masker.*"])
    chosen = assign({"a": encoder, "b": masker}, named(model))
    assert [name for name, _ in chosen["b"]] == ["masker.weight", "masker.bias"]
    with pytest.raises(ValueError, match=r"'encoder.weight' matches no optimizer"):
        assign({"b": masker}, named(model))
    with pytest.raises(ValueError, match=r"matches 2 optimizers \(a, c\)"):
        assign({"a": encoder, "b": masker, "c": OptimSection(lr=1)}, named(model))
    with pytest.raises(ValueError, match=r"matches no trainable parameter \(patterns: x, y\)"):
        Optimizer("d", OptimSection(lr=1, parameters=["x", "y"]), [], [], 1)


# --- layer decay -----------------------------------------------------------------------------------------------------


class Blocks(Encoder):
    """Two blocks behind an embedding, with a norm at the end and a table that all blocks share."""

    name = "blocks"

    def __init__(self, num_blocks: int = 2) -> None:
        super().__init__(self.Config(), Specs())
        self.patch_embed = nn.Linear(2, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.table = nn.Parameter(torch.zeros(2, 2))
        self.inner = nn.ModuleDict({"stages": nn.ModuleList(nn.Linear(2, 2) for _ in range(num_blocks))})
        self.norm = nn.LayerNorm(2)

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.inner["stages"])

    def forward(self, view, mask, ask=None):
        raise NotImplementedError


def with_head(encoder: Encoder) -> nn.Module:
    return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)})


def test_layers_of_an_encoder_follow_its_repeated_blocks():
    encoder = Blocks()
    assert encoder.num_layers == 4
    assert {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()} == {
        "cls_token": 0, "patch_embed.weight": 0, "patch_embed.bias": 0,
        "inner.stages.0.weight": 1, "inner.stages.0.bias": 1, "inner.stages.1.weight": 2, "inner.stages.1.bias": 2,
        "table": 3, "norm.weight": 3, "norm.bias": 3,
    }  # fmt: skip
    assert encoder.layer_of("swin.patch_embed.norm.weight") == encoder.layer_of("pos_embed") == 0
    assert Blocks(11).layer_of("inner.stages.1.weight") == 2  # not block 10, whose name begins alike


def rates_of(model: nn.Module, section: OptimSection, no_weight_decay: tuple[str, ...] = ()) -> dict[str, tuple]:
    """Rate and decay of every parameter at the first step."""
    above = layers_above(model) if section.layer_decay is not None else None
    optimizer = Optimizer("main", section, named(model), no_weight_decay, 1, above)
    optimizer.schedule(step_at(0.0))
    return {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.optimizer.param_groups
        for name in group["names"]
    }


def test_layer_decay_halves_the_rate_from_layer_to_layer_and_leaves_the_head_alone():
    rates = rates_of(with_head(Blocks()), OptimSection(lr=8.0, layer_decay=0.5))
    assert {name: rate for name, (rate, _) in rates.items() if not name.endswith("bias")} == {
        "encoder.cls_token": 1.0, "encoder.patch_embed.weight": 1.0,
        "encoder.inner.stages.0.weight": 2.0, "encoder.inner.stages.1.weight": 4.0,
        "encoder.table": 8.0, "encoder.norm.weight": 8.0, "head.weight": 8.0,
    }  # fmt: skip


def test_a_layer_decay_of_one_changes_no_rate_and_no_group():
    model = with_head(Blocks())
    plain, one = (OptimSection(lr=0.1), OptimSection(lr=0.1, layer_decay=1.0))
    assert rates_of(model, plain) == rates_of(model, one)
    assert len(Optimizer("main", one, named(model), [], 1, layers_above(model)).optimizer.param_groups) == 2


def test_a_layer_decay_that_concerns_nothing_is_refused():
    with pytest.raises(ValueError, match="layer_decay 0.5 concerns no parameter: none belongs to an encoder"):
        rates_of(nn.Linear(2, 2), OptimSection(lr=0.1, layer_decay=0.5))
    with pytest.raises(ValueError, match="layer_decay: encoder 'blocks' has no layers, it names no `repeated_blocks`"):
        layers_above(with_head(Blocks(0)))
    for wrong in (0, 1.5):
        with pytest.raises(ValidationError, match="layer_decay"):
            OptimSection(lr=0.1, layer_decay=wrong)


def test_an_encoder_that_answers_with_a_layer_it_does_not_have_is_named():
    encoder = Blocks()
    encoder.layer_of = lambda name: 4
    with pytest.raises(ValueError, match=r"encoder 'blocks' answers that layer_of\('cls_token'\) is 4, of 4 layers"):
        layers_above(with_head(encoder))


def test_an_encoder_speaks_for_another_one_inside_it_and_a_frozen_one_is_not_asked():
    outer, frozen = Blocks(), Blocks(0).requires_grad_(False)
    outer.inner["stages"][0] = Blocks(1)
    above = layers_above(nn.ModuleDict({"encoder": outer, "frozen": frozen}))
    assert above["encoder.inner.stages.0.norm.weight"] == 2
    assert not any(name.startswith("frozen") for name in above)


# --- multipliers -----------------------------------------------------------------------------------------------------


def test_all_multipliers_that_match_are_multiplied_also_with_the_layer_decay():
    multipliers = [
        {"parameters": ["encoder.*"], "lr": 2.0, "weight_decay": 0.5},
        {"parameters": ["*.norm.*", "*stages.1.*"], "lr": 3.0, "weight_decay": 4.0},
        {"parameters": ["head.weight"], "weight_decay": 0.0},
    ]
    section = OptimSection(lr=1.0, weight_decay=0.25, layer_decay=0.5, multipliers=multipliers)
    rates = rates_of(with_head(Blocks()), section, ("encoder.table",))
    assert rates["encoder.inner.stages.0.weight"] == (2.0 * 0.25, 0.125)
    assert rates["encoder.inner.stages.1.weight"] == (6.0 * 0.5, 0.5)
    assert rates["encoder.norm.weight"] == (6.0, 0.0)  # 1-D: whatever its factor, it does not decay
    assert rates["encoder.table"] == (2.0, 0.0)  # and so with what the component exempts
    assert (rates["head.weight"], rates["head.bias"]) == ((1.0, 0.0), (1.0, 0.0))


def test_a_multiplier_that_matches_nothing_is_refused_with_a_near_name():
    model = with_head(Blocks())
    section = OptimSection(lr=1.0, multipliers=[{"parameters": ["head.*"]}, {"parameters": ["heads.weight"], "lr": 2}])
    text = r"multipliers.1: pattern 'heads.weight' matches no parameter, did you mean 'head.weight'\?"
    with pytest.raises(ValueError, match=text):
        rates_of(model, section)
    section = OptimSection(lr=1.0, multipliers=[{"parameters": ["#"], "lr": 2}])
    with pytest.raises(ValueError, match="pattern '#' matches no parameter, the first are weight, bias$"):
        rates_of(nn.Linear(2, 2), section)
    with pytest.raises(ValidationError, match="lr"):
        OptimSection(lr=1.0, multipliers=[{"parameters": ["*"], "lr": -1.0}])


# --- clipping of each parameter --------------------------------------------------------------------------------------


def clip_like_dino(gradients: list[torch.Tensor], clip: float) -> None:
    """`clip_gradients` of DINO and iBOT (utils.py)."""
    for gradient in gradients:
        coefficient = clip / (gradient.norm(2) + 1e-6)
        if coefficient < 1:
            gradient.mul_(coefficient)


def test_each_parameter_is_clipped_by_its_own_norm_and_the_common_norm_is_reported():
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    section = OptimSection(lr=1.0, clip_grad_norm_per_parameter=10.0)
    assert float(Optimizer("main", section, named(model), [], 1).clip()) == 13.0
    assert model.weight.grad.tolist() == [[3.0, 4.0]]  # its norm is 5
    assert model.bias.grad.item() == pytest.approx(10.0, rel=1e-6)


def test_clipping_of_each_parameter_is_that_of_dino_to_the_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 3))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter) * 0.3 ** (number - 2)
    model[2].bias.grad = None  # a frozen last layer has none
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    clip_like_dino(expected, 3.0)
    section = OptimSection(lr=1.0, clip_grad_norm_per_parameter=3.0)
    Optimizer("main", section, named(model), [], 1).clip()
    ours = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert sorted({round(gradient.norm().item(), 4) == 3.0 for gradient in ours}) == [False, True]


@pytest.mark.parametrize("option", ["clip_grad_norm", "clip_grad_norm_per_parameter"])
def test_sharded_gradients_are_clipped_as_whole_ones(option):
    def clipped(rank: int | None) -> tuple[float, list[float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        x = torch.randn(4, 3)
        with process_group("cpu") as (_, device):
            if rank is not None:
                shard(model, list(model), device)
            (30 * model(x)).square().mean().backward()
            optimizer = Optimizer("main", OptimSection(lr=1.0, **{option: 0.5}), named(model), [], 1)
            norm = optimizer.clip()
            whole = gather_full({name: parameter.grad for name, parameter in named(model)}, World())
            return norm.item(), torch.cat([gradient.flatten() for gradient in whole.values()]).tolist()

    norm, gradients = clipped(None)
    assert norm > 1
    for sharded_norm, sharded in run_ranks(clipped):
        assert sharded_norm == pytest.approx(norm, rel=1e-5)
        assert sharded == pytest.approx(gradients, rel=1e-5, abs=1e-6)


def test_one_way_of_clipping_at_a_time():
    text = (
        r"'clip_grad_norm' and 'clip_grad_norm_per_parameter' exclude each other; keep the second if .* \(DINO, iBOT\)"
    )
    with pytest.raises(ValidationError, match=text):
        OptimSection(lr=0.1, clip_grad_norm=3.0, clip_grad_norm_per_parameter=3.0)
