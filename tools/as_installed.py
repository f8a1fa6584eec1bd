"""What an installation would add to a checkout: the metadata in which Python looks for entry points.

For tools that run a checkout where it lies, whatever is installed beside it. Needs the standard library only.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def packages(root: Path) -> list[Path]:
    """Folders from which the packages of a checkout are imported."""
    return [root, *sorted(root.glob("plugins/*/src"))]


def describe(root: Path, site: Path) -> None:
    """Write the metadata of all distributions of a checkout into a folder, which belongs into PYTHONPATH."""
    site.mkdir(parents=True, exist_ok=True)
    for file in (root / "pyproject.toml", *sorted(root.glob("plugins/*/pyproject.toml"))):
        write_metadata(tomllib.loads(file.read_text())["project"], site)


def write_metadata(project: Mapping[str, Any], site: Path) -> None:
    """The name, version and entry points of one distribution, from the table `project` of its pyproject.toml."""
    version = project.get("version", "0")
    folder = site / f"{project['name'].replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    lines = [line for group, points in groups.items() for line in (f"[{group}]", *map(" = ".join, points.items()))]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
