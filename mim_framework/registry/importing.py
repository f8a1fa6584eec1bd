"""Importing a plugin, and checking what it registers."""

from __future__ import annotations

import importlib
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pluggy

from mim_framework.base.errors import PluginError
from mim_framework.base.text import for_people
from mim_framework.contract import hooks
from mim_framework.registry.installed import BUILTINS, PluginInfo, api_fault, plugin_fault

SLOW_IMPORT_SECONDS = 5.0
"""A plugin whose import takes longer is named on stderr."""


@contextmanager
def told_if_slow(info: PluginInfo) -> Iterator[None]:
    """Says on stderr which plugin is being imported if that takes long, for it may never end."""

    def tell() -> None:
        text = f"plugin '{info.name}' ({info.distribution}) has been importing for {SLOW_IMPORT_SECONDS:g} s"
        cure = f"to go without it, stop with Ctrl-C and set MIM_DISABLE_PLUGINS={info.name}"
        print(for_people(f"mim: {text}; {cure}"), file=sys.stderr, flush=True)

    timer = threading.Timer(SLOW_IMPORT_SECONDS, tell)
    timer.daemon = True
    if info.name != BUILTINS:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if timer.is_alive():
            timer.join()  # a fork must not find its thread


@contextmanager
def generators_kept() -> Iterator[list[str]]:
    """Puts the global random generators back in the end; the list then holds the libraries whose generator had moved.

    A run must not depend on which plugins are imported, and when.
    """
    import numpy as np
    import torch

    moved: list[str] = []
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield moved
    finally:
        if random.getstate() != python:
            moved.append("python")
            random.setstate(python)
        if not all(map(np.array_equal, np.random.get_state(), numpy)):  # noqa: NPY002
            moved.append("numpy")
            np.random.set_state(numpy)  # noqa: NPY002
        if not torch.equal(torch.get_rng_state(), generator):
            moved.append("torch")
            torch.set_rng_state(generator)


def moved_fault(info: PluginInfo, moved: list[str]) -> str:
    what = f"its import moves the global random generator of {' and '.join(moved)}"
    note = "the generator is put back, but what the plugin drew does not follow from the run's seed"
    cure = f"pip install --upgrade {info.distribution}"
    return plugin_fault(info.name, info.distribution, f"{what}; {note}", cure)


def import_plugin(info: PluginInfo) -> ModuleType:
    """Import a plugin's module."""
    try:
        module = importlib.import_module(info.module)
    except ModuleNotFoundError as error:
        what, cure = f"it needs the library '{error.name}', which is not installed", f"pip install {error.name}"
        if (error.name or "").partition(".")[0] in ("mim_framework", info.module.partition(".")[0]):
            what, cure = f"import failed with {error}", f"pip install --force-reinstall {info.distribution}"
        raise PluginError(plugin_fault(info.name, info.distribution, what, cure)) from error
    except (Exception, SystemExit) as error:
        what = f"import failed with {type(error).__name__}: {error}"
        cure = f"pip install --upgrade {info.distribution}"
        raise PluginError(plugin_fault(info.name, info.distribution, what, cure)) from error
    if fault := api_fault(info.name, info.distribution, vars(module).get("requires_api")):
        raise PluginError(fault)
    return module


def new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    return manager


def registered_classes(info: PluginInfo, module: ModuleType) -> dict[str, list[type]]:
    """The classes a plugin registers, by kind; pluggy and then we check them.

    Raises:
        PluginError: at the first fault.
    """
    manager = new_manager()  # one of its own, so that a faulty plugin leaves no trace in the registry's
    try:
        manager.register(module, name=info.name)
        manager.check_pending()
        return {
            kind: _distinct(
                [_checked(kind, cls) for classes in getattr(manager.hook, hook)() for cls in _as_list(hook, classes)]
            )
            for kind, hook in hooks.HOOK_OF_KIND.items()
        }
    except (Exception, SystemExit) as error:
        known = isinstance(error, pluggy.PluginValidationError | _Refused)
        what = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
        raise PluginError(
            plugin_fault(info.name, info.distribution, what, f"pip install --upgrade {info.distribution}")
        ) from error


class _Refused(Exception):
    """A plugin registers something that is no component."""


def _as_list(hook: str, classes: Any) -> list[Any]:
    if not isinstance(classes, list | tuple):
        raise _Refused(f"{hook}() returned {classes!r}, a list of classes is needed")
    return list(classes)


def _distinct(classes: list[type]) -> list[type]:
    for name, count in Counter(cls.name for cls in classes).items():  # type: ignore[attr-defined]
        if count > 1:
            raise _Refused(f"{count} classes of one kind are named '{name}'")
    return classes


def _checked(kind: str, cls: Any) -> type:
    from mim_framework.base.section import Section
    from mim_framework.contract.kinds import KINDS

    hook, base = hooks.HOOK_OF_KIND[kind], KINDS[kind]
    if not isinstance(cls, type):
        if isinstance(cls, tuple(KINDS.values())):
            raise _Refused(f"{hook}() returned an instance of {type(cls).__name__}; return the class itself")
        raise _Refused(f"{hook}() returned {cls!r}, which is no class")
    if not issubclass(cls, base):
        raise _Refused(f"{hook}() returned {cls.__name__}, which is no subclass of {base.__name__}")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        rule = "of letters, digits, '_', '-' and '.'"
        raise _Refused(f"{cls.__name__} needs a class attribute `name` {rule}, it has {name!r}")
    if hasattr(base, "Config"):
        config = getattr(cls, "Config", None)
        if not isinstance(config, type) or not issubclass(config, Section):
            raise _Refused(f"{cls.__name__}.Config must be a subclass of mim_framework.Section, got {config!r}")
        if "type" in config.model_fields:
            raise _Refused(
                f"{cls.__name__}.Config has a field 'type', which in a recipe names the component; rename it"
            )
        if taken := sorted(getattr(base, "reserved", frozenset()) & config.model_fields.keys()):
            raise _Refused(
                f"{cls.__name__}.Config has a field '{taken[0]}', a key that every {kind} has in a recipe; rename it"
            )
    return cls
