"""`mim plugins new`: a new plugin from the one in the folder `template`, which is complete and works as it is.

Only names are exchanged, so that the template is code like any other: read, linted and tested. Nothing here imports
torch or a plugin.
"""

from __future__ import annotations

import keyword
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from mim_framework.base.errors import MimError
from mim_framework.registry.registry import Registry, known_packages

TEMPLATE = Path(__file__).parent / "template"
TEMPLATE_NAME = "my-method"
"""What the plugin in `template` is called; with `_` for `-` in Python."""
MAX_LENGTH = 60
"""Letters of a name, so that the names of files and runs made of it stay short enough everywhere."""


def new_plugin(name: str, output: Path, registry: Registry) -> Path:
    """Write the package `mim-plugin-NAME` into `output`, as a whole or not at all; returns its folder.

    Raises:
        MimError: if the name cannot be used, or the folder is there already or cannot be written.
    """
    dashed, module = name.replace("_", "-"), name.replace("-", "_")
    check_name(name, registry)
    folder = output / f"mim-plugin-{dashed}"
    if folder.exists() or folder.is_symlink():
        raise MimError(f"{folder} is there already; choose another name, or another folder with --output")
    aside: Path | None = None
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=output))
        whole = aside / folder.name
        for source in sorted(TEMPLATE.rglob("*")):
            if source.is_file() and source.suffix != ".pyc":
                target = whole / _renamed(str(source.relative_to(TEMPLATE)), dashed, module)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(_renamed(source.read_text(encoding="utf-8"), dashed, module), encoding="utf-8")
        whole.rename(folder)
    except OSError as error:
        raise MimError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def next_commands(folder: Path) -> list[str]:
    """How to install, test and run a plugin that has just been written."""
    module = folder.name.removeprefix("mim-plugin-").replace("-", "_")
    return [
        f"pip install -e {shlex.quote(f'{folder}[test]')}",
        f"pytest {shlex.quote(str(folder))}",
        f"mim run {module}_quickstart",
    ]


def check_name(name: str, registry: Registry) -> None:
    """That a plugin may be called so: the name becomes that of a package, a module, two components and a recipe.

    Raises:
        MimError: with what is wrong, and what would work.
    """
    module = name.replace("-", "_")
    well_formed = re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) and not module.startswith("mim_plugin")
    if not well_formed or len(name) > MAX_LENGTH:
        rule = f"at most {MAX_LENGTH} lower-case letters and digits with single '-' or '_' between them, a letter first"
        raise MimError(f"a plugin cannot be called {name!r}: write {rule}, without 'mim-plugin'{_suggestion(name)}")
    if keyword.iskeyword(module):
        raise MimError(f"a plugin cannot be called '{name}', which is a word of Python; '{module}_mim' would do")
    infos = registry.plugins()
    for info in infos:
        if module in (_module(info.name), _module(info.distribution).removeprefix("mim_plugin_")):
            raise MimError(f"plugin '{info.name}' ({info.distribution}) is installed already; choose another name")
    if package := next((each for each in known_packages().values() if each == f"mim-plugin-{name}"), None):
        raise MimError(f"{package} is a package of MIM Framework; choose another name, or pip install {package}")
    for info in infos:
        for component in info.components:
            if component.kind in ("masker", "target") and component.name == module:
                owner = f"a {component.kind} of plugin '{info.name}'"
                raise MimError(f"a plugin cannot be called '{name}', that is {owner}; choose another name")
    for recipe in registry.recipes():
        if recipe.name == f"{module}_quickstart":
            text = f"its recipe would be '{recipe.name}', which plugin '{recipe.plugin}' has"
            raise MimError(f"a plugin cannot be called '{name}': {text}; choose another name")


def _suggestion(name: str) -> str:
    """ "; 'x' would do", for the nearest name that is well formed."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("mim-plugin").lstrip("0123456789-")
    return f"; '{plain[:MAX_LENGTH].rstrip('-')}' would do" if plain else ""


def _module(name: str) -> str:
    return re.sub(r"[-.]", "_", name).lower()


def _renamed(text: str, dashed: str, module: str) -> str:
    return text.replace(TEMPLATE_NAME, dashed).replace(TEMPLATE_NAME.replace("-", "_"), module)
