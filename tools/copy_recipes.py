"""The recipes of all plugins of this repository, copied to recipes/, where they are found at a glance.

    python tools/copy_recipes.py        # writes them

Those in the wheels, plugins/*/src/*/recipes, are the ones that `mim run NAME` finds and the ones to edit.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
COMMAND = "python tools/copy_recipes.py"


def shipped() -> dict[str, bytes]:
    """File name -> content, of every recipe in a plugin."""
    return {path.name: path.read_bytes() for path in ROOT.glob("plugins/*/src/*/recipes/*.yaml")}


def copied() -> dict[str, bytes]:
    """File name -> content, of every recipe in recipes/."""
    return {path.name: path.read_bytes() for path in FOLDER.glob("*.yaml")}


def main() -> None:
    wanted = shipped()
    for name in copied().keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, content in wanted.items():
        (FOLDER / name).write_bytes(content)
    print(f"{len(wanted)} recipes in {FOLDER}")


if __name__ == "__main__":
    main()
