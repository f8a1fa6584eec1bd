"""What is installed: entry points, and what the source of each plugin says of it, without importing it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mim_framework import __version__
from mim_framework.registry.static_reader import Reading, Unreadable, read_constant, read_plugin

GROUP = "mim_framework"
BUILTINS = "builtins"


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


@dataclass(frozen=True)
class Entry:
    """An entry point and the distribution it comes from; `broken` says why its metadata cannot be used."""

    point: metadata.EntryPoint
    distribution: str
    version: str = ""
    requires: tuple[str, ...] = ()
    broken: str = ""

    @property
    def names(self) -> frozenset[str]:
        """Names by which a user may mean this plugin."""
        return frozenset((normal_name(self.point.name), normal_name(self.distribution)))

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
        if twice or (self.point.name == BUILTINS and self is not BUILTIN_ENTRY):
            what, cure = "another installed package has a plugin of the same name", f"pip uninstall {self.distribution}"
            return plugin_fault(self.point.name, self.distribution, what, cure, leave_out=self.distribution)
        if missing := [name for name in self.requires if not _is_installed(name)]:
            what = f"it requires {', '.join(missing)}, which is not installed"
            return self._say(what, f"pip install {' '.join(missing)}")
        return api_fault(self.point.name, self.distribution, reading.requires_api)

    def _say(self, what: str, cure: str) -> str:
        return plugin_fault(self.point.name, self.distribution, what, cure)


BUILTIN_ENTRY = Entry(
    metadata.EntryPoint(BUILTINS, "mim_framework.own_components", GROUP), "mim-framework", __version__
)


def plugin_fault(plugin: str, distribution: str, what: str, cure: str, leave_out: str = "") -> str:
    """One line about a plugin that cannot be used, and what the user can do."""
    if plugin == BUILTINS and distribution == BUILTIN_ENTRY.distribution:
        return f"the built-in components: {what}. Cure: {cure}"
    switch = f"MIM_DISABLE_PLUGINS={leave_out or plugin}"
    return f"plugin '{plugin}' ({distribution}): {what}. Cure: {cure}, or leave it out with {switch}"


CHANGED_SINCE_1 = (
    "since 1 a loss may return Measured and an objective Outcome, an objective's encode takes a Masked, specs grow by "
    "Specs.also, view specs have axes and size, strides one number an axis, and step.rand_shared is step.rand_batch"
)


def api_fault(plugin: str, distribution: str, requires_api: object) -> str:
    api = read_constant("mim_framework.contract.components", "API_VERSION")
    if requires_api is None or str(requires_api) == api:
        return ""
    what = f"it is made for plugin API {requires_api}, and mim-framework {__version__} has plugin API {api}"
    if str(requires_api) == "1":
        what = f"{what}; {CHANGED_SINCE_1}"
    return plugin_fault(plugin, distribution, what, f"pip install --upgrade mim-framework {distribution}")


def installed_entries() -> list[Entry]:
    """The entry points of all installed distributions, by name. Broken metadata takes no other plugin down."""
    entries: dict[str, list[Entry]] = {}
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
        entries.setdefault(normal_name(name), [Entry(point, name, version, requires, fault) for point, fault in points])
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


def first_comment(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            comments = (line.strip("# \t\r\n") for line in file if line.startswith("#"))
            return next((comment for comment in comments if comment), "")
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def normal_name(name: str) -> str:
    """A distribution or plugin name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
