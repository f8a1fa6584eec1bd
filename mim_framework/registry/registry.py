"""Which plugins are installed, what they offer, and the classes behind the names in a recipe. Start at `Registry`.

Listing reads entry points and source code and imports nothing. Only `find`, `load` and `hook` import, and only what is
needed; a plugin that fails then is an error for the recipes that need it, and for no other.
"""

from __future__ import annotations

import os
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from mim_framework.base.errors import PluginError, RecipeError, did_you_mean
from mim_framework.contract import hooks
from mim_framework.registry.importing import (
    generators_kept,
    import_plugin,
    moved_fault,
    new_manager,
    registered_classes,
    told_if_slow,
)
from mim_framework.registry.installed import (
    BUILTIN_ENTRY,
    BUILTINS,
    ComponentInfo,
    Entry,
    PluginInfo,
    RecipeInfo,
    first_comment,
    installed_entries,
    normal_name,
)
from mim_framework.registry.static_reader import Unreadable, locate

if TYPE_CHECKING:
    from mim_framework.base.section import Choice, Section


@cache
def known_packages() -> dict[str, str]:
    """First letters of a component's or recipe's name -> the package that brings it."""
    with (Path(__file__).parent / "known_packages.toml").open("rb") as file:
        return tomllib.load(file)["packages"]


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
        self.disabled = frozenset(normal_name(name) for name in disabled)
        self.only = None if only is None else frozenset(normal_name(name) for name in only)
        self._manager = new_manager()
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
        return list(self._enabled)

    def plugin(self, name: str) -> PluginInfo:
        """The enabled plugin of that entry-point or distribution name.

        Raises:
            UnknownName: if there is none.
        """
        for info in self.plugins():
            if normal_name(name) in (normal_name(info.name), normal_name(info.distribution)):
                return info
        names = {info.name for info in self.plugins()}
        if any(normal_name(name) in entry.names for entry in installed_entries() if not self._is_enabled(entry)):
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
            found += [RecipeInfo(path.stem, info.name, path, first_comment(path)) for path in folder.glob("*.yaml")]
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
        from mim_framework.base.sizes import oversized
        from mim_framework.base.validation import describe, validate

        cls = self.find(kind, choice.type)
        config, problems = validate(cls.Config, choice.options)
        problems += oversized(choice.options)
        if config is None or problems:
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
                with generators_kept() as moved, told_if_slow(info):
                    module = import_plugin(info)
                    classes = registered_classes(info, module)
            except PluginError as error:
                self._failures[name] = error
            else:
                self._classes[name] = classes
                self._manager.register(module, name=name)
                if moved:
                    warnings.warn(moved_fault(info, moved), RuntimeWarning, stacklevel=2)
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

    def listen(self, listener: object, name: str | None = None) -> None:
        """Tell an object about run events too: it has methods decorated with `hookimpl`, like a plugin's functions.

        Args:
            name: what it is called in messages.

        Raises:
            PluginError: if it implements no hook, or one that there is not.
        """
        try:
            self._manager.register(listener, name=name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{listener!r} cannot listen to run events: {error}") from error

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
        entries = installed_entries()
        known = {name for entry in entries for name in entry.names} | {BUILTINS}
        for name in sorted((self.only or frozenset()) - known):
            hint = did_you_mean(name, sorted(known))
            raise PluginError(f"MIM_LOAD_PLUGINS names the plugin '{name}', which is not installed{hint}")
        enabled = [entry for entry in entries if self._is_enabled(entry)]
        count = Counter(entry.point.name for entry in enabled)
        return [BUILTIN_ENTRY.info(), *(entry.info(twice=count[entry.point.name] > 1) for entry in enabled)]

    def _is_enabled(self, entry: Entry) -> bool:
        if "1" in self.disabled or self.disabled & entry.names:
            return False
        return self.only is None or bool(self.only & entry.names)

    def _unknown(self, kind: str, name: str, doubtful: list[PluginError]) -> UnknownName:
        """The error for a name that nobody offers."""
        owner, _, short = name.rpartition(":")
        infos = [info for info in self.plugins() if owner in ("", info.name)]
        names = {each.name for info in infos for each in info.components if each.kind == kind}
        names |= {cls.name for info in infos for cls in self._classes.get(info.name, {}).get(kind, ())}
        for entry in () if owner else installed_entries():
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


def _missing_package(name: str) -> str:
    """The package of ours that is likely to bring a component or recipe of this name and is not installed, or ""."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("mimplugin")
    package = next((package for prefix, package in known_packages().items() if plain.startswith(prefix)), "")
    return "" if any(normal_name(package) in entry.names for entry in installed_entries()) else package


def _none(kind: str, name: str, names: Iterable[str], package: str) -> str:
    """Nothing of that name is installed: the nearest one, what to install, and what there is."""
    hint = did_you_mean(name.rpartition(":")[2], sorted(names)) or ";"
    install = f" pip install {package} brings it;" if package else ""
    return f"no {kind} '{name}' is installed{hint}{install} installed: {_list(names)}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
