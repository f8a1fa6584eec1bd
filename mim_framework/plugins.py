"""Which plugins are installed, what they offer, and the classes behind the names in a recipe. Start at `Registry`.

Listing reads entry points and source code and imports nothing. Only `find`, `load` and `hook` import, and only what is
needed; a plugin that fails then is an error for the recipes that need it, and for no other.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from mim_framework import __version__
from mim_framework.base.errors import PluginError, RecipeError, did_you_mean
from mim_framework.contract import hooks
from mim_framework.static_reader import Reading, Unreadable, locate, read_constant, read_plugin

if TYPE_CHECKING:
    from mim_framework.base.section import Choice, Section

GROUP = "mim_framework"
BUILTINS = "builtins"
SLOW_IMPORT_SECONDS = 5.0
"""A plugin whose import takes longer is named on stderr."""
KNOWN_METHODS = {
    "maskfeat": "mim-plugin-maskfeat",
    "mixmim": "mim-plugin-mixmim",
    "simmim": "mim-plugin-simmim",
    "beitv2": "mim-plugin-beitv2",
    "beit": "mim-plugin-beit",
    "mff": "mim-plugin-mff",
    "mae": "mim-plugin-mae",
}
"""First letters of a component's or recipe's name, without `_` and `-` -> the package that brings it."""


@dataclass(frozen=True)
class ComponentInfo:
    """A component as the plugin's source describes it."""

    kind: str
    name: str
    summary: str
    plugin: str


@dataclass(frozen=True)
class RecipeInfo:
    """A recipe shipped by a plugin; `summary` is its first comment line."""

    name: str
    plugin: str
    path: Path
    summary: str


@dataclass(frozen=True)
class PluginInfo:
    """An installed plugin, known without importing it.

    `unread` are kinds of components that only an import can list, `events` the run events it listens to. `error` says
    why it cannot be used, and the cure; empty if nothing is known against it.
    """

    name: str
    distribution: str
    version: str
    module: str
    components: tuple[ComponentInfo, ...] = ()
    error: str = ""
    unread: frozenset[str] = frozenset()
    events: tuple[str, ...] = ()

    def offers(self, kind: str, name: str) -> bool:
        return any(each.kind == kind and each.name == name for each in self.components)


class UnknownName(PluginError):
    """No installed plugin offers the name. `package` is the distribution that would, empty if that is unknown."""

    def __init__(self, message: str, package: str = "") -> None:
        super().__init__(message)
        self.package = package


class Registry:
    """The plugins of this environment, and the components of those that have been loaded.

    Args:
        disabled: entry-point or distribution names to leave out. Default: `MIM_DISABLE_PLUGINS`, names separated by
            commas, or `1` for all.
        only: the only ones to use. Default: `MIM_LOAD_PLUGINS`, names separated by commas; set but empty means none.

    The core's own components are a plugin named `builtins`, which is always there. A registry is pickled as its two
    arguments, so that another process finds the plugins anew.
    """

    def __init__(self, *, disabled: Iterable[str] | None = None, only: Iterable[str] | None = None) -> None:
        if disabled is None:
            disabled = _names(os.environ.get("MIM_DISABLE_PLUGINS", ""))
        if only is None and "MIM_LOAD_PLUGINS" in os.environ:
            only = _names(os.environ["MIM_LOAD_PLUGINS"])
        self.disabled = frozenset(_normal(name) for name in disabled)
        self.only = None if only is None else frozenset(_normal(name) for name in only)
        self._manager = _new_manager()
        self._classes: dict[str, dict[str, list[type]]] = {}
        self._failures: dict[str, PluginError] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.disabled, self.only)

    # --- without importing --------------------------------------------------------------------------------------------

    def plugins(self) -> list[PluginInfo]:
        """All enabled plugins, the built-in one first, then by name. Imports none of them.

        Raises:
            PluginError: if `only` names a plugin that is not installed.
        """
        return [_BUILTIN_ENTRY.info(), *self._enabled]

    def plugin(self, name: str) -> PluginInfo:
        """The enabled plugin of that entry-point or distribution name.

        Raises:
            UnknownName: if there is none.
        """
        for info in self.plugins():
            if _normal(name) in (_normal(info.name), _normal(info.distribution)):
                return info
        names = {info.name for info in self.plugins()}
        if any(_normal(name) in entry.names for entry in _installed() if not self._is_enabled(entry)):
            raise UnknownName(f"plugin '{name}' is installed but switched off; {_SWITCHES}")
        package = _missing_package(name)
        raise UnknownName(_none("plugin", name, names, package), package)

    def recipes(self) -> list[RecipeInfo]:
        """The recipes that enabled plugins ship in a folder `recipes` beside their module, by name."""
        found = []
        for info in self.plugins():
            try:
                folder = locate(info.module).parent / "recipes"
            except Unreadable:
                continue
            found += [RecipeInfo(path.stem, info.name, path, _first_comment(path)) for path in folder.glob("*.yaml")]
        return sorted(found, key=lambda recipe: (recipe.name, recipe.plugin))

    def recipe(self, name: str) -> RecipeInfo:
        """The shipped recipe `name`, or `plugin:name` where two plugins ship one of that name.

        Raises:
            UnknownName: if there is none.
            PluginError: if there are two.
        """
        plugin, _, short = name.rpartition(":")
        shipped = self.recipes()
        found = [each for each in shipped if each.name == short and plugin in ("", each.plugin)]
        if len(found) == 1:
            return found[0]
        if found:
            choices = " or ".join(f"'{each.plugin}:{short}'" for each in found)
            raise PluginError(f"recipe '{short}' is shipped by several plugins; choose {choices}")
        package = _missing_package(short)
        raise UnknownName(_none("recipe", name, {each.name for each in shipped}, package), package)

    # --- importing what is needed -------------------------------------------------------------------------------------

    def find(self, kind: str, name: str) -> type[Any]:
        """The class of the component `name` (or `plugin:name`) of a kind such as "masker".

        Imports the plugins whose source offers the name; if there are none, those whose source cannot tell.

        Raises:
            UnknownName: if no plugin offers it; with the nearest name, the installed ones, and what to install.
            PluginError: if two plugins offer it, or the one that does cannot be used.
        """
        owner, _, short = name.rpartition(":")
        candidates = [self.plugin(owner)] if owner else self.plugins()
        found, failed = self._load_offers(kind, short, [info for info in candidates if info.offers(kind, short)])
        doubtful: list[PluginError] = []
        if not found and not failed:
            unclear = [info for info in candidates if kind in info.unread or (info.error and not info.components)]
            found, doubtful = self._load_offers(kind, short, unclear)
        if len(found) > 1:
            packages = " and ".join(f"'{plugin}' ({self.plugin(plugin).distribution})" for plugin in found)
            choices = " or ".join(f"'{plugin}:{short}'" for plugin in found)
            text = f"{kind} '{short}' is offered by the plugins {packages}; choose with type: {choices}"
            leave = next(plugin for plugin in reversed(found) if plugin != BUILTINS)
            raise PluginError(f"{text}, or leave one out, for example with MIM_DISABLE_PLUGINS={leave}")
        if found:
            return next(iter(found.values()))
        if failed or (owner and doubtful):
            raise (failed + doubtful)[0]
        raise self._unknown(kind, name, doubtful)

    def resolve(self, kind: str, choice: Choice) -> tuple[type[Any], Section]:
        """The class that a recipe chose, and its options as an instance of the class's `Config`.

        Raises:
            PluginError: see `find`.
            RecipeError: naming every wrong option.
        """
        from mim_framework.base.validation import describe, validate

        cls = self.find(kind, choice.type)
        config, problems = validate(cls.Config, choice.options)
        if config is None:
            raise RecipeError(f"{kind} '{choice.type}': {describe(problems)}")
        return cls, config

    def classes(self, kind: str) -> dict[str, type[Any]]:
        """Every usable component of a kind, under the name a recipe would write. Imports all plugins.

        Plugins that cannot be used are left out; `load_all` says why.
        """
        self.load_all()
        every = [(plugin, cls) for plugin, kinds in self._classes.items() for cls in kinds.get(kind, ())]
        count = Counter(cls.name for _, cls in every)
        return {cls.name if count[cls.name] == 1 else f"{plugin}:{cls.name}": cls for plugin, cls in every}

    def components(self, plugin: str) -> list[ComponentInfo]:
        """What a plugin offers: as registered if it is loaded, else as its source says."""
        info = self.plugin(plugin)
        if info.name not in self._classes:
            return list(info.components)
        return [
            ComponentInfo(kind, cls.name, (cls.__doc__ or "").strip().partition("\n")[0], info.name)
            for kind, classes in self._classes[info.name].items()
            for cls in classes
        ]

    def load(self, name: str) -> None:
        """Import a plugin and check what it registers; a second call does nothing.

        Raises:
            PluginError: naming the plugin, what is wrong with it, and the cure.
        """
        if name in self._classes:
            return
        if name not in self._failures:
            info = self.plugin(name)
            try:
                if info.error:
                    raise PluginError(info.error)
                with _generators_kept() as moved, _told_if_slow(info):
                    module = _import(info)
                    classes = _registered(info, module)
            except PluginError as error:
                self._failures[name] = error
            else:
                self._classes[name] = classes
                self._manager.register(module, name=name)
                if moved:
                    warnings.warn(_moved_fault(info, moved), RuntimeWarning, stacklevel=2)
                return
        raise self._failures[name]

    def load_all(self) -> dict[str, PluginError]:
        """Import every enabled plugin; returns the errors of those that failed, by plugin name."""
        failures = {}
        for info in self.plugins():
            try:
                self.load(info.name)
            except PluginError as error:
                failures[info.name] = error
        return failures

    @property
    def hook(self) -> Any:
        """Calls a run event, for example `registry.hook.mim_run_started(run=run)`, on every plugin that listens to it.

        Plugins that listen are imported by the first use, as they need not offer a component of the recipe. One that
        cannot be used is warned about and left out.
        """
        for info in self.plugins():
            if info.events and info.name not in self._classes and info.name not in self._failures:
                try:
                    self.load(info.name)
                except PluginError as error:
                    warnings.warn(f"run events go without this plugin: {error}", RuntimeWarning, stacklevel=2)
        return self._manager.hook

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _load_offers(
        self, kind: str, name: str, infos: list[PluginInfo]
    ) -> tuple[dict[str, type[Any]], list[PluginError]]:
        """Loads plugins; the components of that name by plugin, and the errors of plugins that cannot be used."""
        found: dict[str, type] = {}
        failed: list[PluginError] = []
        for info in infos:
            try:
                self.load(info.name)
            except PluginError as error:
                failed.append(error)
            else:
                offered = [cls for cls in self._classes[info.name].get(kind, ()) if cls.name == name]
                if offered:
                    found[info.name] = offered[0]
        return found, failed

    @cached_property
    def _enabled(self) -> list[PluginInfo]:
        entries = _installed()
        known = {name for entry in entries for name in entry.names} | {BUILTINS}
        for name in sorted((self.only or frozenset()) - known):
            hint = did_you_mean(name, sorted(known))
            raise PluginError(f"MIM_LOAD_PLUGINS names the plugin '{name}', which is not installed{hint}")
        enabled = [entry for entry in entries if self._is_enabled(entry)]
        count = Counter(entry.point.name for entry in enabled)
        return [entry.info(twice=count[entry.point.name] > 1) for entry in enabled]

    def _is_enabled(self, entry: _Entry) -> bool:
        if "1" in self.disabled or self.disabled & entry.names:
            return False
        return self.only is None or bool(self.only & entry.names)

    def _unknown(self, kind: str, name: str, doubtful: list[PluginError]) -> UnknownName:
        """The error for a name that nobody offers."""
        owner, _, short = name.rpartition(":")
        infos = [info for info in self.plugins() if owner in ("", info.name)]
        names = {each.name for info in infos for each in info.components if each.kind == kind}
        names |= {cls.name for info in infos for cls in self._classes.get(info.name, {}).get(kind, ())}
        for entry in () if owner else _installed():
            if not self._is_enabled(entry) and entry.info().offers(kind, short):
                plugin = entry.point.name
                return UnknownName(f"{kind} '{short}' comes from plugin '{plugin}', which is switched off; {_SWITCHES}")
        for other in hooks.HOOK_OF_KIND:
            if any(info.offers(other, short) for info in infos):
                return UnknownName(f"'{short}' is a component of kind {other}, not {kind}. Installed: {_list(names)}")
        package = "" if owner else _missing_package(short)
        text = _none(kind, name, names, package)
        return UnknownName(text + "".join(f". It may belong to a faulty one: {error}" for error in doubtful), package)


_SWITCHES = "see MIM_DISABLE_PLUGINS, MIM_LOAD_PLUGINS and --no-plugins"


def _restore(disabled: frozenset[str], only: frozenset[str] | None) -> Registry:
    """A pickled registry; where `only` was not given, the environment of that process has been read already."""
    registry = Registry(disabled=disabled, only=only)
    registry.only = only
    return registry


@dataclass(frozen=True)
class _Entry:
    """An entry point and the distribution it comes from; `broken` says why its metadata cannot be used."""

    point: metadata.EntryPoint
    distribution: str
    version: str = ""
    requires: tuple[str, ...] = ()
    broken: str = ""

    @property
    def names(self) -> frozenset[str]:
        """Names by which a user may mean this plugin."""
        return frozenset((_normal(self.point.name), _normal(self.distribution)))

    def info(self, *, twice: bool = False) -> PluginInfo:
        """What the source says; `twice` if another distribution has an entry point of the same name."""
        name, reading = self.point.name, Reading()
        if self.broken:
            error = self._say(self.broken, f"pip install --force-reinstall {self.distribution}")
            return PluginInfo(name, self.distribution, self.version, "", error=error)
        try:
            reading = read_plugin(self.point.module)
            error = self._fault(reading, twice)
        except Unreadable as unreadable:
            error = self._say(str(unreadable), f"pip install --upgrade --force-reinstall {self.distribution}")
        components = tuple(ComponentInfo(kind, offer, summary, name) for kind, offer, summary in reading.offers)
        return PluginInfo(
            name, self.distribution, self.version, self.point.module, components, error, reading.unread, reading.events
        )

    def _fault(self, reading: Reading, twice: bool) -> str:
        if twice or (self.point.name == BUILTINS and self is not _BUILTIN_ENTRY):
            what, cure = "another installed package has a plugin of the same name", f"pip uninstall {self.distribution}"
            return _fault(self.point.name, self.distribution, what, cure, leave_out=self.distribution)
        if missing := [name for name in self.requires if not _is_installed(name)]:
            what = f"it requires {', '.join(missing)}, which is not installed"
            return self._say(what, f"pip install {' '.join(missing)}")
        return _api_fault(self.point.name, self.distribution, reading.requires_api)

    def _say(self, what: str, cure: str) -> str:
        return _fault(self.point.name, self.distribution, what, cure)


_BUILTIN_ENTRY = _Entry(metadata.EntryPoint(BUILTINS, "mim_framework.builtins", GROUP), "mim-framework", __version__)


def _fault(plugin: str, distribution: str, what: str, cure: str, leave_out: str = "") -> str:
    """One line about a plugin that cannot be used, and what the user can do."""
    if plugin == BUILTINS and distribution == _BUILTIN_ENTRY.distribution:
        return f"the built-in components: {what}. Cure: {cure}"
    switch = f"MIM_DISABLE_PLUGINS={leave_out or plugin}"
    return f"plugin '{plugin}' ({distribution}): {what}. Cure: {cure}, or leave it out with {switch}"


def _api_fault(plugin: str, distribution: str, requires_api: object) -> str:
    api = read_constant("mim_framework.contract.components", "API_VERSION")
    if requires_api is None or str(requires_api) == api:
        return ""
    what = f"it is made for plugin API {requires_api}, and mim-framework {__version__} has plugin API {api}"
    return _fault(plugin, distribution, what, f"pip install --upgrade mim-framework {distribution}")


def _installed() -> list[_Entry]:
    """The entry points of all installed distributions, by name. Broken metadata takes no other plugin down."""
    entries: dict[str, list[_Entry]] = {}
    for dist in metadata.distributions():
        text = dist.read_text("entry_points.txt") or ""
        if GROUP not in text:
            continue
        name, version = dist.metadata["Name"] or "unknown", dist.version or ""
        try:
            points = [(point, _entry_point_fault(point)) for point in dist.entry_points.select(group=GROUP)]
        except Exception:  # importlib.metadata lets whatever its parser trips over escape
            points = [(metadata.EntryPoint(name, "", GROUP), "its entry_points.txt cannot be read")]
        # A requirement with a marker may not apply here; only unconditional ones are checked.
        found = [re.match(r"[\w.-]+", line) for line in dist.requires or () if ";" not in line]
        requires = tuple(each[0] for each in found if each)
        # The first on sys.path wins, as it does for imports.
        entries.setdefault(_normal(name), [_Entry(point, name, version, requires, fault) for point, fault in points])
    return sorted(
        (each for found in entries.values() for each in found), key=lambda each: (each.point.name, each.distribution)
    )


def _entry_point_fault(point: metadata.EntryPoint) -> str:
    if not re.fullmatch(r"[\w.-]+", point.name):
        return "a plugin's name may hold letters, digits, '_', '-' and '.'"
    if not re.fullmatch(r"[\w.]+", point.value):
        return f"its entry point must name a module, not '{point.value}'"
    return ""


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def _told_if_slow(info: PluginInfo) -> Iterator[None]:
    """Says on stderr which plugin is being imported if that takes long, for it may never end."""

    def tell() -> None:
        text = f"plugin '{info.name}' ({info.distribution}) has been importing for {SLOW_IMPORT_SECONDS:g} s"
        cure = f"to go without it, stop with Ctrl-C and set MIM_DISABLE_PLUGINS={info.name}"
        print(f"mim: {text}; {cure}", file=sys.stderr, flush=True)

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
def _generators_kept() -> Iterator[list[str]]:
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


def _moved_fault(info: PluginInfo, moved: list[str]) -> str:
    what = f"its import moves the global random generator of {' and '.join(moved)}"
    note = "the generator is put back, but what the plugin drew does not follow from the run's seed"
    cure = f"pip install --upgrade {info.distribution}"
    return _fault(info.name, info.distribution, f"{what}; {note}", cure)


def _import(info: PluginInfo) -> ModuleType:
    """Import a plugin's module."""
    try:
        module = importlib.import_module(info.module)
    except ModuleNotFoundError as error:
        what, cure = f"it needs the library '{error.name}', which is not installed", f"pip install {error.name}"
        if (error.name or "").partition(".")[0] in ("mim_framework", info.module.partition(".")[0]):
            what, cure = f"import failed with {error}", f"pip install --force-reinstall {info.distribution}"
        raise PluginError(_fault(info.name, info.distribution, what, cure)) from error
    except (Exception, SystemExit) as error:
        what = f"import failed with {type(error).__name__}: {error}"
        cure = f"pip install --upgrade {info.distribution}"
        raise PluginError(_fault(info.name, info.distribution, what, cure)) from error
    if fault := _api_fault(info.name, info.distribution, vars(module).get("requires_api")):
        raise PluginError(fault)
    return module


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    return manager


def _registered(info: PluginInfo, module: ModuleType) -> dict[str, list[type]]:
    """The classes a plugin registers, by kind; pluggy and then we check them.

    Raises:
        PluginError: at the first fault.
    """
    manager = _new_manager()  # one of its own, so that a faulty plugin leaves no trace in the registry's
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
            _fault(info.name, info.distribution, what, f"pip install --upgrade {info.distribution}")
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
    from mim_framework.contract.components import KINDS

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
    return cls


def _first_comment(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            comments = (line.strip("# \t\r\n") for line in file if line.startswith("#"))
            return next((comment for comment in comments if comment), "")
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _missing_package(name: str) -> str:
    """The package of ours that is likely to bring a component or recipe of this name and is not installed, or ""."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("mimplugin")
    package = next((package for prefix, package in KNOWN_METHODS.items() if plain.startswith(prefix)), "")
    return "" if any(_normal(package) in entry.names for entry in _installed()) else package


def _none(kind: str, name: str, names: Iterable[str], package: str) -> str:
    """Nothing of that name is installed: the nearest one, what to install, and what there is."""
    hint = did_you_mean(name.rpartition(":")[2], sorted(names)) or ";"
    install = f" pip install {package} brings it;" if package else ""
    return f"no {kind} '{name}' is installed{hint}{install} installed: {_list(names)}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _normal(name: str) -> str:
    """A distribution or plugin name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
