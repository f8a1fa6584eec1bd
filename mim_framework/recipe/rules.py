"""What no single section of a recipe can see: heads, optimizers, phases and teachers that do not fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mim_framework.base.validation import Problem
from mim_framework.recipe.evaluations import repeated

HEAD_SLOTS = ("target", "decoder", "loss")
DEFAULT_OBJECTIVE = "masked_prediction"
TOKENIZER = "tokenizer"


def inconsistencies(data: dict[str, Any]) -> list[Problem]:
    """What no single section can see. The data may be wrong in other ways too, so that all is reported at once."""
    problems = []
    present = [slot for slot in HEAD_SLOTS if data.get(slot) is not None]
    objective = data.get("objective", DEFAULT_OBJECTIVE)
    objective = objective.get("type") if isinstance(objective, dict) else objective
    if data.get("heads") is not None and present:
        problems.append(
            Problem(("heads",), f"stands beside {and_list(present)}; write all heads here, or one head without it")
        )
    elif data.get("heads") is None and (present or objective == DEFAULT_OBJECTIVE):
        for slot in HEAD_SLOTS:
            if slot not in present:
                problems.append(Problem((slot,), f"missing; a recipe needs {and_list(HEAD_SLOTS)}, or 'heads'"))
    if (data.get("optim") is None) == (data.get("optimizers") is None):
        both = data.get("optim") is not None
        text = (
            "stands beside 'optimizers'; use one of the two" if both else "missing; a recipe needs it, or 'optimizers'"
        )
        problems.append(Problem(("optim",), text))
    return [*problems, *_phase_problems(data), *_teacher_problems(data), *repeated(data)]


def _phase_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """Phases of one name, optimizers that are not there, and optimizers that no phase steps."""
    optimizers, phases = data.get("optimizers") or {"main": None}, data.get("phases") or ()
    if not isinstance(optimizers, dict) or not isinstance(phases, list | tuple):
        return
    seen: set[Any] = set()
    stepped: set[Any] = set()
    for index, phase in enumerate(phases):
        phase = phase if isinstance(phase, dict) else {}
        name, names = phase.get("name"), phase.get("optimizers")
        if isinstance(name, str) and name in seen:
            yield Problem(("phases", index, "name"), f"there is a phase '{name}' already; give each its own name")
        seen |= {name} if isinstance(name, str) else set()
        for each in names if isinstance(names, list | tuple) else ():
            if isinstance(each, str) and each not in optimizers:
                text = f"there is no optimizer '{each}'; the recipe has {and_list(optimizers)}"
                yield Problem(("phases", index, "optimizers"), text)
            stepped |= {each} if isinstance(each, str) else set()
    if phases and (idle := [name for name in optimizers if name not in stepped]):
        yield Problem(("phases",), f"no phase steps optimizer {and_list(idle)}; its parameters would never change")


def _teacher_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """A teacher that copies another one needs one that is copied before it, with the same parts."""
    teachers = data.get("teachers") or {}
    if data.get("tokenizer") is not None and isinstance(teachers, dict) and TOKENIZER in teachers:
        yield Problem(("tokenizer",), f"stands beside 'teachers.{TOKENIZER}'; use one of the two")
    earlier: dict[str, Any] = {}
    for name, teacher in teachers.items() if isinstance(teachers, dict) else ():
        teacher = teacher if isinstance(teacher, dict) else {}
        source, copied = teacher.get("of_teacher"), teacher.get("copy", teacher.get("copy_of"))
        place = ("teachers", name, "of_teacher")
        if isinstance(source, str) and source not in teachers:
            yield Problem(place, f"there is no teacher '{source}'")
        elif isinstance(source, str) and source not in earlier:
            yield Problem(place, f"teacher '{source}' must stand before '{name}', which copies it")
        elif isinstance(source, str) and not earlier[source]:
            yield Problem(place, f"teacher '{source}' is frozen, not a copy; give '{name}' its own 'encoder'")
        elif isinstance(source, str) and isinstance(copied, list | tuple) and isinstance(earlier[source], list | tuple):
            for part in copied:
                if part not in earlier[source]:
                    yield Problem(("teachers", name, "copy"), f"teacher '{source}' holds no copy of '{part}'")
        earlier[name] = copied


def and_list(names: Iterable[str]) -> str:
    *most, last = [f"'{name}'" for name in names]
    return f"{', '.join(most)} and {last}" if most else last
