"""Teachers: frozen networks and momentum copies, owned by the core so that no method can get them subtly wrong.

A teacher is in eval mode whatever is called above it, has no gradients, and its buffers change only when the core
copies them. A pass over a view is computed once per micro-batch, however many components ask for it. Copies move only
after a successful optimizer step. A teacher never holds its source as a submodule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mim_framework.base.precision import autocast
from mim_framework.base.schedule import Schedule, extremes
from mim_framework.base.section import AliasedSection, Choice, LocalPath
from mim_framework.contract.components import Component, Encoder, Head
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent
from mim_framework.contract.step import Step
from mim_framework.runtime.sharding import local


class TeacherSection(AliasedSection):
    """A frozen encoder (`encoder`, `checkpoint`), or a copied part (`copy` and `momentum` or `refresh_every`)."""

    encoder: Choice | None = None
    """A frozen encoder component; that of the run or import in `checkpoint` if it is left out."""
    checkpoint: LocalPath | None = None
    """Weights of the frozen encoder: a run directory, a checkpoint, a safetensors file or a folder of `mim import`."""
    random: bool = False
    """Leave a frozen encoder at its random first weights, as a fixed random projection: it has learned nothing. Without
    it a frozen teacher needs weights."""
    view: str | None = Field(None, min_length=1)
    """The view it looks at: by default the one called like the teacher, if the recipe's views have it, else "x"."""
    copy_of: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), alias="copy")
    """Parts of the model to copy, for example [encoder] or [encoder, heads.main.decoder]."""
    of_teacher: str | None = None
    """Copy those parts from another copied teacher instead of the model (the Gram teacher of DINOv3)."""
    momentum: Schedule | None = None
    """Copy moves by p = momentum * p + (1 - momentum) * source after every step."""
    refresh_every: int | None = Field(None, gt=0)
    """Copy is replaced by its source every so many steps, instead of moving."""

    @model_validator(mode="after")
    def _one_kind(self) -> TeacherSection:
        if (self.encoder is None and self.checkpoint is None) == (not self.copy_of):
            raise ValueError(
                "a teacher is either frozen ('encoder', 'checkpoint' or both) or a copy ('copy'), one of the two"
            )
        if self.copy_of and (self.momentum is None) == (self.refresh_every is None):
            raise ValueError("a copied teacher needs 'momentum' or 'refresh_every', one of the two")
        if not self.copy_of and (self.momentum is not None or self.refresh_every is not None or self.of_teacher):
            raise ValueError("'momentum', 'refresh_every' and 'of_teacher' belong to a copied teacher ('copy')")
        if self.random and (self.copy_of or self.checkpoint is not None):
            what = "copies" if self.copy_of else f"checkpoint={self.checkpoint}"
            raise ValueError(
                f"'random' is for a frozen encoder without weights, this teacher has {what}; leave one out"
            )
        if self.momentum is not None and not all(0 <= value <= 1 for value in extremes(self.momentum)):
            values = " to ".join(dict.fromkeys(f"{value:g}" for value in extremes(self.momentum)))
            raise ValueError(f"'momentum' must stay between 0 and 1, got {values}")
        return self


class Teacher(nn.Module):
    """Some modules that are never trained: always in eval mode, without gradients."""

    def __init__(
        self, parts: dict[str, nn.Module], ask: Ask = Ask(), prepare: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`prepare` turns a view of the recipe into what the encoder takes: images in another normalisation."""
        super().__init__()
        self.parts = nn.ModuleDict({_key(path): part for path, part in parts.items()})
        self.ask = ask
        self.prepare = prepare or nn.Identity()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: a quantiser in train mode would go on moving its codebook."""
        return super().train(False)

    def part(self, path: str) -> nn.Module:
        """The copy of the model's module `path`, for example `heads.main.decoder`."""
        return self.parts[_key(path)]

    def units(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """The modules that are called, each with its repeated blocks: the units of sharding."""
        for part in self.parts.values():
            yield from _units(part)

    def repeated_blocks(self) -> list[nn.Module]:
        """The repeated blocks of all units."""
        return [block for _, blocks in self.units() for block in blocks]


class Teachers(nn.Module):
    """All teachers of a run. Lives beside the objective, never inside it."""

    def __init__(self, sections: dict[str, TeacherSection]) -> None:
        super().__init__()
        self.sections = sections
        self.teachers = nn.ModuleDict()

    def __getitem__(self, name: str) -> Teacher:
        return self.teachers[name]  # type: ignore[return-value]

    def add_frozen(self, name: str, encoder: Encoder, prepare: nn.Module | None = None) -> None:
        self.teachers[name] = Teacher({"encoder": encoder}, prepare=prepare)

    def add_copies(self, objective: nn.Module) -> None:
        """Copy the named parts, after weights have been loaded, so that a copy starts as its source."""
        for name, section in self.sections.items():
            if section.copy_of:
                parts = {path: self._source(section, path, objective) for path in section.copy_of}
                self.teachers[name] = Teacher({path: copy.deepcopy(part) for path, part in parts.items()})

    def moving(self) -> nn.ModuleDict:
        """The copied teachers, which a checkpoint must hold; a frozen one is read from where the recipe says."""
        return nn.ModuleDict({name: self[name] for name, section in self.sections.items() if section.copy_of})

    def repeated_blocks(self) -> list[nn.Module]:
        """The repeated blocks of all teachers."""
        return [block for teacher in self.teachers.values() for block in teacher.repeated_blocks()]

    def declare(self, asks: dict[str, Ask]) -> None:
        """What the components want from each teacher, united."""
        for name, ask in asks.items():
            self[name].ask |= ask

    def session(self, *, bfloat16: bool = False) -> TeacherSession:
        """Passes of one micro-batch, under bfloat16 autocast or not, whoever asks for them."""
        return TeacherSession(self, bfloat16)

    @torch.no_grad()
    def update(self, step: Step, objective: nn.Module) -> None:
        """Move the copies, once per successful optimizer step. `objective` is the unwrapped model."""
        for name, section in self.sections.items():
            if section.momentum is not None:
                momentum = step.value(section.momentum)
            elif section.refresh_every is not None:
                momentum = 0.0 if (step.index + 1) % section.refresh_every == 0 else 1.0
            else:
                continue
            if momentum < 1.0:
                for path in section.copy_of:
                    _move(self[name].part(path), self._source(section, path, objective), momentum)

    def _source(self, section: TeacherSection, path: str, objective: nn.Module) -> nn.Module:
        return self[section.of_teacher].part(path) if section.of_teacher else objective.get_submodule(path)


@dataclass
class TeacherSession:
    """Teacher passes of one micro-batch, each computed when first asked for and then kept."""

    teachers: Teachers
    bfloat16: bool
    _passes: dict[tuple[str, int, int], tuple[Tensor, Mask | None, Latent]] = field(default_factory=dict)

    def encode(self, name: str, view: Tensor, mask: Mask | None = None) -> Latent:
        """The pass of teacher `name` over `view`; nothing is hidden unless a mask is given."""
        key = (name, id(view), id(mask))
        if key not in self._passes:  # the key's objects are kept with the pass, so that no id can be used again
            self._passes[key] = (view, mask, self._encode(self.teachers[name], view, mask))
        return self._passes[key][2]

    def part(self, name: str, path: str) -> nn.Module:
        """A copied module, for objectives that call more than the encoder.

        Raises:
            ValueError: if the teacher holds no copy of it.
        """
        copied = self.teachers.sections[name].copy_of
        if path not in copied:
            copies = f"copies {', '.join(copied)}" if copied else "is frozen"
            raise ValueError(f"teacher '{name}' {copies}, '{path}' is asked for too; give it in teachers.{name}.copy")
        return self.teachers[name].part(path)

    @torch.no_grad()
    def _encode(self, teacher: Teacher, view: Tensor, mask: Mask | None) -> Latent:
        encoder = teacher.part("encoder")
        mask = Mask.none(len(view), encoder.spec.grid, view.device) if mask is None else mask  # type: ignore[union-attr]
        with autocast(view.device.type, self.bfloat16):  # also inside a target's precision island
            return encoder(teacher.prepare(view), mask, teacher.ask)


def _move(copied: nn.Module, source: nn.Module, momentum: float) -> None:
    """copied = momentum * copied + (1 - momentum) * source; buffers are copied. Shards move with their own shard."""
    ours = [local(parameter) for parameter in copied.parameters()]
    theirs = [local(parameter).detach() for parameter in source.parameters()]
    if ours:
        get_ema_multi_avg_fn(momentum)(ours, theirs, 0)
    for ours_buffer, their_buffer in zip(copied.buffers(), source.buffers(), strict=True):
        ours_buffer.copy_(their_buffer)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Containers are never called, what they contain is."""
    if isinstance(module, nn.ModuleDict | nn.ModuleList | Head):
        for child in module.children():
            yield from _units(child)
    elif any(True for _ in module.parameters()):
        yield module, list(module.repeated_blocks()) if isinstance(module, Component) else []


def _key(path: str) -> str:
    """A module name cannot hold a dot."""
    return path.replace(".", "/")
