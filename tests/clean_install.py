"""Our packages as a user has them: wheels in an environment that holds nothing else of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGINS = sorted((ROOT / "plugins").glob("mim-plugin-*"))


def call(
    *command: object, cwd: Path, check: bool = True, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command without the settings of this Python, and fail with its output."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MIM_", "VIRTUAL_ENV"))}
    words, environment = [str(word) for word in command], {**clean, **environment}
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def build_wheels(folder: Path, projects: Iterable[Path] = (ROOT, *PLUGINS)) -> dict[str, Path]:
    """Wheels of the core and all plugins, or of other projects, by the names of their packages with `_`."""
    for project in projects:
        call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project, cwd=folder)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def clean_environment(folder: Path) -> Path:
    """A new environment that borrows the dependencies of this one, but none of our own packages."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "mim_" not in entry.name and not entry.name.endswith(".pth"):
            (borrowed / entry.name).symlink_to(entry)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "venv"


def install(clean: Path, *wheels: Path) -> None:
    call(clean / "bin/python", "-m", "pip", "install", "--no-deps", "--no-index", *wheels, cwd=clean)
