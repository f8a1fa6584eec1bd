"""Teachers: frozen means frozen, copies move as they should, passes are computed once."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.specs import EncoderSpec, Specs
from mim_framework.contract.step import Step
from mim_framework.runtime.teachers import Teachers, TeacherSection

GRID = Grid((2,))


class CountingEncoder(Encoder):
    """A linear map with a batch norm, whose statistics would move in train mode."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__(Section(), Specs())
        self.proj, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(2)
        self.spec = EncoderSpec(3, GRID, 1, 1, 1)
        self.calls: list[Ask] = []

    def forward(self, view, mask, ask=Ask()):
        self.calls.append(ask)
        return Latent(self.norm(self.proj(view)), GRID)


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = CountingEncoder()


def step_at(index: int) -> Step:
    return Step(index, 10, float(index), 10.0, torch.arange(4), 0, None)


def ema(**changes) -> TeacherSection:
    return TeacherSection(**{"copy": ["encoder"], "momentum": 0.9, **changes})


def test_a_teacher_stays_in_eval_mode_and_its_buffers_do_not_move():
    teachers = Teachers({"frozen": TeacherSection(encoder="counting")})
    teachers.add_frozen("frozen", CountingEncoder())
    teachers.train()
    before = {name: value.clone() for name, value in teachers.state_dict().items()}
    for _ in range(5):
        teachers.session().encode("frozen", torch.randn(4, 2, 3))
    assert not any(module.training for module in teachers["frozen"].modules())
    assert all(torch.equal(value, before[name]) for name, value in teachers.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teachers.parameters())


def test_a_pass_is_computed_once_per_session_with_the_united_asks():
    teachers = Teachers({"frozen": TeacherSection(encoder="counting")})
    encoder = CountingEncoder()
    teachers.add_frozen("frozen", encoder)
    teachers.declare({"frozen": Ask(layers=frozenset({1}))})
    teachers.declare({"frozen": Ask(attn=frozenset({2}))})
    session, view, other = teachers.session(), torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    first = session.encode("frozen", view)
    assert session.encode("frozen", view) is first
    assert session.encode("frozen", other) is not first
    assert encoder.calls == [Ask(layers=frozenset({1}), attn=frozenset({2}))] * 2
    assert not first.tokens.requires_grad


def test_a_copy_starts_as_its_source_and_moves_by_momentum():
    objective, teachers = Objective(), Teachers({"ema": ema()})
    teachers.add_copies(objective)
    copied = teachers["ema"].part("encoder").proj.weight
    start = copied.clone()
    assert torch.equal(start, objective.encoder.proj.weight)
    with torch.no_grad():
        objective.encoder.proj.weight.add_(1.0)
        objective.encoder.norm.running_mean.fill_(7.0)
    teachers.update(step_at(0), objective)
    assert torch.allclose(copied, start + 0.1)
    assert teachers["ema"].part("encoder").norm.running_mean.tolist() == [7.0, 7.0]
    teachers.update(step_at(1), objective)
    assert torch.allclose(copied, start + 0.19)


def test_a_refreshed_copy_of_a_copy_follows_at_its_interval():
    gram = TeacherSection(copy=["encoder"], of_teacher="ema", refresh_every=2)
    objective, teachers = Objective(), Teachers({"ema": ema(momentum=0.0), "gram": gram})
    teachers.add_copies(objective)
    with torch.no_grad():
        objective.encoder.proj.weight.fill_(3.0)
    teachers.update(step_at(0), objective)
    assert not torch.equal(teachers["gram"].part("encoder").proj.weight, objective.encoder.proj.weight)
    teachers.update(step_at(1), objective)
    assert torch.equal(teachers["gram"].part("encoder").proj.weight, objective.encoder.proj.weight)


def test_training_the_objective_never_touches_its_copy_and_the_other_way_round():
    objective, teachers = Objective(), Teachers({"ema": ema()})
    teachers.add_copies(objective)
    objective.train()
    teachers.train()
    assert objective.encoder.training
    assert not teachers["ema"].part("encoder").training
    assert not set(map(id, objective.parameters())) & set(map(id, teachers.parameters()))


def test_a_copied_part_deeper_in_the_model_is_found_by_its_path():
    objective, teachers = Objective(), Teachers({"ema": ema(copy=["encoder", "encoder.proj"])})
    teachers.add_copies(objective)
    assert torch.equal(teachers.session().part("ema", "encoder.proj").weight, objective.encoder.proj.weight)


def test_a_teacher_is_one_kind_or_the_other():
    for wrong, text in (
        ({}, "frozen .* or a copy"),
        ({"encoder": "x", "copy": ["encoder"]}, "one of the two"),
        ({"copy": ["encoder"]}, "needs 'momentum' or 'refresh_every'"),
        ({"encoder": "x", "momentum": 0.9}, "belong to a copied teacher"),
    ):
        with pytest.raises(ValidationError, match=text):
            TeacherSection(**wrong)


def test_a_step_without_teachers_says_so():
    with pytest.raises(ValueError, match="this step has no teachers, 'ema' was asked for"):
        step_at(0).teacher("ema", torch.zeros(1))
