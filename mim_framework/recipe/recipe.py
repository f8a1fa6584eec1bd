"""A recipe: which components make a run, with all their options. Start at `Recipe`; `draft.load_recipe` reads one."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from mim_framework.base.schedule import Schedule
from mim_framework.base.section import Choice, LocalPath, Section
from mim_framework.base.validation import describe, show
from mim_framework.checkpoints.checkpoint import CheckpointSection
from mim_framework.data.loader import DataSection
from mim_framework.recipe.evaluations import EvaluationChoice
from mim_framework.recipe.rules import DEFAULT_OBJECTIVE, TOKENIZER, inconsistencies
from mim_framework.recipe.training import PhaseSection, TrainSection
from mim_framework.runtime.metrics import LogSection
from mim_framework.runtime.optim import OptimSection
from mim_framework.runtime.teachers import TeacherSection


def _file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ValueError(f"needs letters, digits, '.', '_' and '-', the first a letter or digit, got {show(text)}")
    return text


def _part_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text):
        raise ValueError(f"a name needs letters, digits and '_', the first a letter, got {show(text)}")
    return text


def _none_for_null(value: Any) -> Any:
    return () if value is None else value


PartName = Annotated[str, AfterValidator(_part_name)]
"""Name of a head, teacher or optimizer; it becomes part of parameter and file names."""


class HeadSection(Section):
    """One prediction: what is predicted, by which decoder, and how the error counts."""

    target: Choice
    """What should be predicted."""
    decoder: Choice
    """From the encoder's tokens to the prediction."""
    loss: Choice
    """One number from prediction and target."""
    weight: Schedule = 1.0
    """Factor of this head's loss in the sum."""
    view: str = Field("x", min_length=1)
    """The view that it predicts."""


class PublishedSection(Section):
    """What a paper reports for a recipe, told at the end of a run beside its own number."""

    recipe: str
    """The shipped recipe that the number is for: what another run does differently is told with it."""
    metric: str = "accuracy_top1"
    """Name of the number in the metrics of a run, a share."""
    value: float
    """The paper's number, in percent."""
    source: str
    """Where it stands."""
    pretraining: str | None = None
    """The shipped recipe of the pre-training before it, compared where `init` is a run."""
    pretraining_epochs: float | None = Field(None, gt=0)
    """Length of that pre-training, which may be longer than the recipe's."""


class Recipe(Section):
    """All that makes a run. Slots hold a component's name, or `{type: NAME, ...}` with its options."""

    name: Annotated[str, AfterValidator(_file_name)]
    """Name of the run, and of its folder inside `output_dir`."""
    description: str = ""
    """What the recipe is for."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random is a function of this number and the sample's position."""
    output_dir: LocalPath = Field("runs", min_length=1)
    """Folder that holds the run's folder."""
    data: DataSection
    """Where images come from, and how they are read."""
    views: Choice = Choice(type="image")
    """From a sample to the views that the encoder sees."""
    masker: Choice
    """What is hidden."""
    encoder: Choice
    """Tokens out of an image under a mask: what is being trained."""
    target: Choice | None = None
    """What should be predicted, by the single head of most recipes."""
    decoder: Choice | None = None
    """From the encoder's tokens to the prediction, for the single head."""
    loss: Choice | None = None
    """One number from prediction and target, for the single head."""
    heads: dict[PartName, HeadSection] | None = None
    """Several heads by name, instead of `target`, `decoder` and `loss`."""
    teachers: dict[PartName, TeacherSection] = {}
    """Frozen networks and momentum copies by name."""
    tokenizer: LocalPath | None = Field(None, min_length=1)
    """A run that trained a tokenizer, or a folder that `mim import` wrote: short for a frozen teacher `tokenizer`."""
    objective: Choice = Choice(type=DEFAULT_OBJECTIVE)
    """The order of a step."""
    optim: OptimSection | None = None
    """The optimizer, if there is one."""
    optimizers: dict[PartName, OptimSection] | None = None
    """Several optimizers by name, instead of `optim`."""
    phases: tuple[PhaseSection, ...] = ()
    """Passes of a step, where there is more than one."""
    init: LocalPath | None = None
    """Weights to start from: a run directory, a checkpoint folder or a safetensors file."""
    train: TrainSection
    """How long, how many images at a time, on what."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the state is saved, and how many are kept."""
    log: LogSection = LogSection()
    """What is written down on the way."""
    evaluate: Annotated[tuple[EvaluationChoice, ...], BeforeValidator(_none_for_null)] = (EvaluationChoice(type="knn"),)
    """Evaluations on the way, each made where its labels are there; `[]` for none."""

    published: PublishedSection | None = None
    """What the paper reports."""

    _file: str = PrivateAttr("recipe")
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if problems := inconsistencies(self.model_dump(exclude_none=True)):
            raise ValueError(describe(problems))
        return self

    def __eq__(self, other: object) -> bool:
        """Equal contents; where they were written does not count."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def location(self, where: str) -> str:
        """Where a key such as "heads.main.decoder" stands: 'file:line:column: key', as errors begin."""
        parts = where.split(".") if where else []
        for length in range(len(parts), 0, -1):
            if place := self._places.get(".".join(parts[:length])):
                return f"{place}: {where}"
        return f"{self._file}: {where}" if where else self._file

    def named_heads(self) -> dict[str, HeadSection]:
        """The heads by name; `target`, `decoder` and `loss` are the head `main`."""
        if self.heads is not None:
            return self.heads
        if self.target is None or self.decoder is None or self.loss is None:
            return {}
        return {"main": HeadSection(target=self.target, decoder=self.decoder, loss=self.loss)}

    def named_teachers(self) -> dict[str, TeacherSection]:
        """The teachers by name, with that of `tokenizer`, which is not needed where its token ids are stored."""
        if self.tokenizer is None or self.data.tokens is not None:
            return self.teachers
        return {TOKENIZER: TeacherSection(checkpoint=self.tokenizer), **self.teachers}

    def named_optimizers(self) -> dict[str, OptimSection]:
        """The optimizers by name; `optim` is the optimizer `main`."""
        if self.optimizers is not None:
            return self.optimizers
        assert self.optim is not None
        return {"main": self.optim}

    def named_phases(self) -> tuple[PhaseSection, ...]:
        """The phases; by default one, `main`, that steps every optimizer."""
        return self.phases or (PhaseSection(name="main", optimizers=tuple(self.named_optimizers())),)

    def phase_names(self) -> list[str]:
        return [phase.name for phase in self.named_phases()]

    def doubts(self, epochs: float) -> list[str]:
        """What is allowed but hardly meant, in a run of so many epochs; `assembly.doubts` has more to say."""
        found = [
            f"the warm-up of optimizer '{name}', {section.warmup_epochs:g} epochs, is no shorter than the run of "
            f"{epochs:g}: the learning rate stays below its peak"
            for name, section in self.named_optimizers().items()
            if section.warmup_epochs >= epochs
        ]
        names, best = [choice.type for choice in self.evaluate], self.checkpoint.keep_best
        if best is not None and not any(best.startswith(f"{name}_") for name in names):
            given = f"those of {', '.join(names)} begin with these names" if names else "'evaluate' is empty"
            found.append(f"checkpoint.keep_best is '{best}', which no evaluation gives; {given}: no best state is kept")
        if self.init is None and "encoder.*" in self.train.frozen:
            found.append("train.frozen holds the whole encoder and no 'init' gives it weights of an earlier run")
        return found
