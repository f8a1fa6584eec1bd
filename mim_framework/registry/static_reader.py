"""Reads what a plugin offers from its source code, without importing it. Start reading at `read_plugin`.

Listing plugins must stay cheap and must survive a plugin that raises on import, so nothing here runs a line of theirs.
What cannot be read this way (a list built in a loop, a compiled module) is named in `Reading.unread`, and the registry
imports that plugin instead.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from mim_framework.base.errors import did_you_mean
from mim_framework.contract import hooks
from mim_framework.contract.hooks import HOOK_OF_KIND

KIND_OF_HOOK = {hook: kind for kind, hook in HOOK_OF_KIND.items()}
HOOKS = tuple(name for name in vars(hooks) if name.startswith("mim_"))
EVENTS = tuple(hook for hook in HOOKS if hook not in KIND_OF_HOOK)
MAX_FOLLOW = 20  # imports or base classes followed from one name; a longer chain is a circle


class Unreadable(Exception):
    """The source cannot answer; the message says why, in words for the user."""


@dataclass(frozen=True)
class Reading:
    """What the source of one plugin says.

    `offers` holds (kind, name, first line of the docstring). `unread` are the kinds whose hook returns something that
    only running it can tell. `events` are the run events it listens to.
    """

    offers: tuple[tuple[str, str, str], ...] = ()
    unread: frozenset[str] = frozenset()
    events: tuple[str, ...] = ()
    requires_api: str | None = None


def locate(module: str) -> Path:
    """The file of a module, found without importing it or a parent package.

    Raises:
        Unreadable: if there is no such module.
    """
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        raise Unreadable(f"module '{top}' cannot be located: {error}") from error
    name = top
    for part in rest:
        locations = spec.submodule_search_locations if spec else None
        name = f"{name}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(name, locations) if locations is not None else None
    if spec is None or spec.origin is None:
        raise Unreadable(f"module '{module}' is not found")
    return Path(spec.origin)


def read_plugin(module: str) -> Reading:
    """What the plugin in `module` registers.

    Raises:
        Unreadable: if the module is missing, has a syntax error, or spells a hook wrongly.
    """
    path = locate(module)
    if path.suffix != ".py":  # compiled: only an import can tell
        return Reading(unread=frozenset(HOOK_OF_KIND), events=EVENTS)
    source = _source(module)
    offers, unread, events = [], set(), []
    for home, function, hook in _hook_functions(source):
        if hook in EVENTS:
            events.append(hook)
            continue
        kind = KIND_OF_HOOK[hook]
        try:
            for scope, node in _returned(home, function):
                offers.append((kind, *_describe(*_resolve(scope, node))))
        except Unreadable:
            unread.add(kind)
    if "*" in source.names:  # hooks may hide behind `from .hooks import *`
        unread |= set(HOOK_OF_KIND)
    offers.sort(key=lambda offer: list(HOOK_OF_KIND).index(offer[0]))  # in the order of a loaded plugin's
    requires_api = source.constant("requires_api")
    return Reading(tuple(offers), frozenset(unread), tuple(events), None if requires_api is None else str(requires_api))


def read_constant(module: str, name: str) -> object:
    """The value of a constant at the top of a module, None if there is none."""
    return _source(module).constant(name)


@dataclass(frozen=True)
class _Source:
    """One parsed module (or, with `local`, one function in it): which name means what."""

    module: str
    path: Path
    tree: ast.Module
    local: tuple[ast.stmt, ...] = field(default=())

    def within(self, function: ast.FunctionDef) -> _Source:
        """The same module as seen from inside a function, which may import lazily."""
        return _Source(self.module, self.path, self.tree, tuple(function.body))

    @cached_property
    def names(self) -> dict[str, ast.AST | tuple[str, str | None]]:
        """Name -> its class, function or value, or (module, attribute) if it is imported."""
        names: dict[str, ast.AST | tuple[str, str | None]] = {}
        for node in _statements([*self.tree.body, *self.local]):
            match node:
                case ast.ClassDef() | ast.FunctionDef():
                    names[node.name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    names[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    names[name] = value
                case ast.ImportFrom():
                    for alias in node.names:  # the name "*" is kept as any other
                        names[alias.asname or alias.name] = (self._absolute(node), alias.name)
                case ast.Import():
                    for alias in node.names:
                        top = alias.name.partition(".")[0]
                        names[alias.asname or top] = (alias.name if alias.asname else top, None)
        return names

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.module.split(".")
        drop = node.level - (self.path.stem == "__init__")
        return ".".join(package[: len(package) - drop] + ([node.module] if node.module else []))

    def constant(self, name: str) -> object:
        value = self.names.get(name)
        return value.value if isinstance(value, ast.Constant) else None


@lru_cache(maxsize=256)
def _parse(module: str, path: Path, _modified: int) -> _Source:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in a plugin is not our user's business
            return _Source(module, path, ast.parse(path.read_bytes(), filename=str(path)))
    except SyntaxError as error:
        raise Unreadable(f"syntax error at {path}:{error.lineno}: {error.msg}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error


def _source(module: str) -> _Source:
    path = locate(module)
    if path.suffix != ".py":
        raise Unreadable(f"{path} is not Python source")
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    return _parse(module, path, modified)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run in this scope, those inside if, try and with included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _hook_functions(source: _Source) -> Iterator[tuple[_Source, ast.FunctionDef, str]]:
    """The functions that implement a hook, each with the module it stands in and the hook's name.

    Raises:
        Unreadable: at a function that is meant to be a hook but is none.
    """
    for name, node in source.names.items():
        home = source
        if name in HOOKS and isinstance(node, tuple):  # `from mim_plugin_x.hooks import mim_maskers`
            home = _source(node[0])
            node = home.names.get(node[1] or "")
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = [decorator for decorator in node.decorator_list if "hookimpl" in ast.unparse(decorator)]
        options = {key.arg: key.value for mark in marks for key in getattr(mark, "keywords", ())}
        specname = options.get("specname")
        hook = specname.value if isinstance(specname, ast.Constant) else node.name
        if hook in HOOKS and node.decorator_list:
            yield home, node, hook
        elif hook in HOOKS:
            raise Unreadable(f"{home.path}:{node.lineno}: function '{hook}' lacks the decorator @hookimpl")
        elif marks and "optionalhook" not in options:
            raise Unreadable(f"{home.path}:{node.lineno}: there is no hook '{hook}'{did_you_mean(hook, HOOKS)}")


def _returned(source: _Source, function: ast.FunctionDef) -> list[tuple[_Source, ast.expr]]:
    """The expressions that a registration hook returns, one per class, with the scope in which to read them."""
    returns = [node for node in _statements(function.body) if isinstance(node, ast.Return)]
    if len(returns) != 1 or returns[0].value is None:
        raise Unreadable("not one plain return")
    scope = source.within(function)
    return [(scope, element) for element in _elements(scope, returns[0].value)]


def _elements(source: _Source, node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [
                each
                for element in elements
                for each in (_elements(source, element.value) if isinstance(element, ast.Starred) else [element])
            ]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _elements(source, left) + _elements(source, right)
        case ast.Name(id=name) if isinstance(source.names.get(name), ast.List | ast.Tuple):
            return _elements(source, source.names[name])  # type: ignore[arg-type]
    raise Unreadable("not a plain list of classes")


def _resolve(source: _Source, node: ast.AST) -> tuple[_Source, ast.ClassDef]:
    """The class that an expression names, with the module it stands in; imports are followed."""
    for _ in range(MAX_FOLLOW):
        match node:
            case ast.ClassDef():
                return source, node
            case ast.Name(id=name):
                found = source.names.get(name)
            case ast.Attribute():
                path = ast.unparse(node).split(".")
                found = source.names.get(path[0])
                if not isinstance(found, tuple):
                    raise Unreadable("not a class of a module")
                module = ".".join([part for part in (*found, *path[1:-1]) if part])
                found = (module, path[-1])
            case _:
                raise Unreadable("not a name")
        if found is None:
            raise Unreadable("an unknown name")
        if isinstance(found, tuple):
            module, attribute = found
            if attribute is None:
                raise Unreadable("a module, not a class")
            source, node = _source(module), ast.Name(attribute)
        else:
            node = found
    raise Unreadable("imports in a circle")


def _describe(source: _Source, cls: ast.ClassDef) -> tuple[str, str]:
    """(name, first line of the docstring); the name may stand in a base class."""
    docstring = ast.get_docstring(cls) or ""
    return _component_name(source, cls, MAX_FOLLOW), docstring.partition("\n")[0]


def _component_name(source: _Source, cls: ast.ClassDef, left: int) -> str:
    for node in cls.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="name")], value=value)
                | ast.AnnAssign(target=ast.Name(id="name"), value=ast.expr() as value)
            ):
                if isinstance(value, ast.Name):
                    value = source.names.get(value.id)
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    return value.value
                raise Unreadable("a computed name")
    for base in cls.bases if left else ():
        try:
            return _component_name(*_resolve(source, base), left - 1)
        except Unreadable:
            continue
    raise Unreadable("a class without a name")
