"""Draws of stochastic depth by sample position, pass by pass. Start at `DropPaths.drawn`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from mim_framework.base import rng
from mim_framework.contract.components import Component
from mim_framework.contract.drop_path import DropPath
from mim_framework.contract.step import Step


class DropPaths:
    """All `DropPath` of an objective, by the component around them: a call of it is a pass."""

    def __init__(self, objective: Component) -> None:
        found = [(path, each) for path, each in objective.named_modules() if isinstance(each, Component)]
        inside = {path: (component, list(dict.fromkeys(_inside(component)))) for path, component in found}
        self.owned = {path: (component, own) for path, (component, own) in inside.items() if own}

    @contextmanager
    def drawn(self, step: Step) -> Iterator[None]:
        """While it is open, every pass of a component has draws by the step's positions; afterwards there are none."""
        with ExitStack() as stack:
            for path, (component, own) in self.owned.items():
                passes = _Passes(step, path, own)
                stack.callback(passes.end)
                stack.enter_context(_removed(component.register_forward_pre_hook(passes)))
            yield


class _Passes:
    """Draws anew for every call of a component but the first, for which it has drawn from the start."""

    def __init__(self, step: Step, path: str, own: list[DropPath]) -> None:
        self.step, self.path, self.own, self.called = step, path, own, 0
        self.draw()

    def __call__(self, *_: Any) -> None:
        if self.called:
            self.draw()
        self.called += 1

    def draw(self) -> None:
        stream = f"drop path of {self.path}, phase {self.step.phase}, pass {self.called}"
        bits = rng.random_bits(self.step.seed, stream, self.step.positions, len(self.own)).T.contiguous()
        for module, patterns, noise in zip(self.own, bits, rng.uniform_from(bits), strict=True):
            module.draw(patterns, noise)

    def end(self) -> None:
        for module in self.own:
            module.draw(None)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _inside(module: nn.Module) -> Iterator[DropPath]:
    """Those whose nearest component is the one that is asked for."""
    for child in module.children():
        if isinstance(child, DropPath):
            yield child
        elif not isinstance(child, Component):
            yield from _inside(child)
