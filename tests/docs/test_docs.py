"""What the documents show is true: commands exist, recipes validate, files are there."""

from __future__ import annotations

import re

import click
import copy_recipes
import pytest
from clean_install import ROOT
from copy_recipes import COMMAND, copied, shipped

from mim_framework.commands.cli import main
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

DOCUMENTS = [
    path for pattern in ("*.md", "*/README.md", "plugins/*/README.md", "docs/*.md") for path in ROOT.glob(pattern)
]
PAGES = "\n".join(path.read_text() for path in DOCUMENTS)


PAPER_RECIPES = sorted(
    info.name
    for info in Registry().recipes()
    if not info.name.endswith("quickstart") and info.name not in ("mff_simmim_vit", "maskfeat_mvit_small")  # our own
)


def find_command(words: list[str]) -> click.Command:
    command: click.Command = main
    for word in words:
        if not isinstance(command, click.Group):
            break
        assert word in command.commands, f"mim has no command '{' '.join(words)}'"
        command = command.commands[word]
    return command


def shown_commands() -> set[str]:
    """Every `mim ...` in code, without its arguments' values."""
    code = re.findall(r"^(?:\$ )?mim ([^#|\n`]+)", PAGES, re.MULTILINE) + re.findall(r"`mim ([^`]+)`", PAGES)
    return {text.strip() for text in code}


@pytest.mark.parametrize("text", sorted(shown_commands()))
def test_every_command_shown_exists_with_its_options(text):
    words = text.split()
    command = find_command([word for word in words if not word.startswith("-")])
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


def test_enough_commands_are_found_to_trust_the_test_above():
    assert {"run", "check", "bench", "doctor", "eval"} <= {text.split()[0] for text in shown_commands()}


def test_every_make_target_shown_exists():
    makefile = (ROOT / "Makefile").read_text()
    shown = set(re.findall(r"^make ([\w-]+)", PAGES, re.MULTILINE))
    assert {"demo", "test"} <= shown
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in shown)


def test_every_recipe_shown_validates(tmp_path):
    recipes = re.findall(r"```yaml\n(name:.*?)```", PAGES, re.DOTALL)
    assert recipes
    for number, text in enumerate(recipes):
        file = tmp_path / f"shown_{number}.yaml"
        file.write_text(text)
        load_recipe(file, [], Registry())


def test_every_relative_link_leads_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_every_shipped_recipe_validates():
    for recipe in Registry().recipes():
        assert load_recipe(recipe.path, [], Registry()).name


def test_the_recipes_folder_holds_copies_of_the_shipped_recipes_and_nothing_else():
    in_wheels, here = shipped(), copied()
    differ = sorted(name for name in in_wheels.keys() | here.keys() if in_wheels.get(name) != here.get(name))
    assert in_wheels
    assert not differ, f"recipes/ differs from plugins/*/src/*/recipes in {differ}: edit the latter, then run {COMMAND}"
    assert not [path.name for path in (ROOT / "recipes").iterdir() if path.is_symlink()]


def test_copying_recipes_writes_what_is_shipped_and_removes_what_is_not(tmp_path, monkeypatch):
    (tmp_path / "gone.yaml").write_text("name: gone\n")
    (tmp_path / "mae.yaml").write_text("name: edited\n")
    monkeypatch.setattr(copy_recipes, "FOLDER", tmp_path)
    copy_recipes.main()
    assert copied() == shipped()


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_every_number_of_a_paper_recipe_says_where_it_comes_from(name):
    """On its own line, or on the line of its section."""
    section_has_source, without = False, []
    for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines():
        code, _, comment = line.partition("#")
        if code and not code.startswith(" "):
            section_has_source = bool(comment)
        if re.search(r":.*\d", code) and not code.startswith("name:") and not comment and not section_has_source:
            without.append(line)
    assert without == []
