"""The reference is current, every page's links lead somewhere, and nothing that a user can set or call lacks a text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import click
import make_reference
import pytest
from make_reference import (
    COMMAND,
    FOLDER,
    command_entry,
    house_plugins,
    item,
    kind_of,
    markdown,
    options,
    pages,
    undocumented_commands,
    undocumented_components,
    undocumented_keys,
    undocumented_members,
    undocumented_names,
    undocumented_recipes,
)
from pydantic import Field

import mim_framework
from mim_framework import Loss, Schedule, Section, layouts, nn
from mim_framework.base.section import Choice
from mim_framework.commands.cli import main
from mim_framework.contract import hooks
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

PAGES = pages()


# --- the pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_the_generated_one(name: str):
    assert (FOLDER / name).read_text() == PAGES[name], f"docs/reference/{name} is not current: run {COMMAND}"


def test_no_page_is_left_over():
    assert {path.name for path in FOLDER.iterdir()} == {*PAGES, "public_names.txt"}


def test_pages_tell_nothing_of_the_machine_they_were_made_on():
    text = "\n".join(PAGES.values())
    assert not re.search(r"/(home|work|usr|tmp|opt)/|\bat 0x[0-9a-f]+|site-packages", text)


def test_every_link_leads_to_a_page_and_a_heading_that_are_there():
    def anchors(page: str) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 50
    for page, link in links:
        target, _, anchor = link.partition("#")
        assert (FOLDER / (target or page)).exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target or page), f"{page} links to {link}"


def test_every_public_name_is_a_heading_of_one_page():
    text = "\n".join(PAGES.values())
    names = {*mim_framework.__all__, *nn.__all__, *layouts.__all__}
    names -= {"__version__", "Schedule", "Curve"}  # the last two are the section Schedules
    names -= {"train"}  # which is a section of recipes, too
    assert [name for name in sorted(names) if text.count(f"\n## `{name}`\n") != 1] == []
    assert "\n## Schedules\n" in PAGES["recipe.md"]


def test_every_hook_component_recipe_and_command_is_on_its_page():
    registry = house_plugins()
    for hook in (name for name in vars(hooks) if name.startswith("mim_")):
        assert f"\n### `{hook}`\n" in PAGES["hooks.md"]
    for kind in hooks.HOOK_OF_KIND:
        for name, cls in registry.classes(kind).items():
            _, _, entry = PAGES["installed.md"].partition(f"\n### {kind} `{name}`\n")
            own = re.split(r"\n##", entry)[0]
            for key, field in getattr(getattr(cls, "Config", None), "model_fields", {}).items():
                assert f"\n- `{field.alias or key}` (" in own, f"{kind} {name}: {key}"
    for recipe in registry.recipes():
        assert f"\n- `{recipe.name}`: " in PAGES["recipes.md"]
    for path, command in make_reference.commands(main):
        _, _, entry = PAGES["commands.md"].partition(f"\n## `{path}`\n")
        assert all(each.opts[0] in entry.split("\n## ")[0] for each in command.params if isinstance(each, click.Option))


def test_the_reference_holds_the_plugins_of_this_repository_whatever_else_is_installed(install_plugin):
    install_plugin("spiral", "", files={"recipes/spiral.yaml": "# A spiral.\n"})
    assert [info.name for info in house_plugins().plugins()] == [
        "builtins", "beit", "beitv2", "mae", "maskfeat", "mff", "mixmim", "simmim",
    ]  # fmt: skip


# --- how things are written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("note", "bounds", "words"),
    [
        (int, {"gt": 0}, "whole number above 0"),
        (float, {"ge": 0, "lt": 1}, "number at least 0 and below 1"),
        (float | None, {"gt": 0}, "number above 0"),
        (bool, {}, "true or false"),
        (str, {"min_length": 1}, "text"),
        (Literal["a", "b", "c"], {}, "`a`, `b` or `c`"),
        (tuple[int, ...], {"min_length": 2}, "list of at least 2, each whole number"),
        (tuple[float, float], {}, "[number, number]"),
        (Annotated[int, Field(ge=0)] | Literal["auto"], {}, "whole number at least 0 or `auto`"),
        (dict[str, Section], {}, "mapping of names, each section"),
        (Choice, {}, "component"),
        (Schedule | None, {}, "number or [schedule](recipe.md#schedules)"),
    ],
)
def test_the_kind_of_an_option_in_words(note, bounds, words):
    assert kind_of(note, Field(**bounds).metadata) == words


def test_an_option_is_one_list_item_with_its_default():
    class Config(Section):
        ratio: tuple[float, float] = (0.75, 4 / 3)
        """Smallest and largest
        width / height."""
        root: str
        """A folder."""
        steps: int | None = None
        """Half of all*."""

    assert options(Config) == (
        "- `ratio` ([number, number], default `[0.75, 1.333]`): Smallest and largest\n  width / height.\n"
        "- `root` (text, required): A folder.\n"
        "- `steps` (whole number, optional): Half of all\\*."
    )


def test_a_docstring_becomes_markdown():
    docstring = """A * B.

        `x*y` stays.

            code * stays

        Raises:
            ValueError: if it
                fails.
            KeyError: never.
        """
    assert markdown(docstring) == (
        "A \\* B.\n\n`x*y` stays.\n\n    code * stays\n\n"
        "Raises:\n\n- `ValueError`: if it\n  fails.\n- `KeyError`: never."
    )
    assert item("`f()`", "One.\n\nTwo.") == "- `f()`: One.\n\n  Two."


# --- nothing lacks a text --------------------------------------------------------------------------------------------


def test_every_public_name_hook_and_method_is_documented():
    assert list(undocumented_names()) == []


def test_every_recipe_key_is_documented():
    assert list(undocumented_keys(Recipe, "recipe")) == []


def test_every_installed_component_and_each_of_its_options_is_documented():
    assert list(undocumented_components(Registry())) == []


def test_every_shipped_recipe_begins_with_what_it_is():
    assert list(undocumented_recipes(Registry())) == []


def test_every_command_and_each_of_its_options_is_documented():
    assert list(undocumented_commands(main)) == []


def test_a_hook_and_a_method_without_a_docstring_are_found(monkeypatch):
    def mim_secrets() -> list[type]: ...

    class Base:
        def told(self) -> int: ...
        def _private(self) -> int: ...

        @property
        def hidden(self) -> int: ...

    monkeypatch.setattr(hooks, "mim_secrets", mim_secrets, raising=False)
    monkeypatch.setattr(Section, "__doc__", None)
    assert list(undocumented_names()) == ["Section", "mim_secrets"]
    assert list(undocumented_members(Base)) == ["Base.told", "Base.hidden"]


def test_a_recipe_key_without_help_is_found_at_any_depth():
    class Inner(Section):
        told: int = 1
        """Told."""
        silent: int = 2

    class Outer(Section):
        """A recipe."""

        parts: dict[str, Inner] = {}
        """Parts."""
        bare: int = 3

    assert list(undocumented_keys(Outer, "recipe")) == [
        "recipe.bare", "recipe.parts.NAME", "recipe.parts.NAME.silent",
    ]  # fmt: skip


def test_a_component_without_a_docstring_and_an_option_without_help_are_found():
    from mim_framework.testing import RegistryWith

    class Silent(Loss):
        name = "silent"

        class Config(Section):
            told: int = 1
            """Told."""
            power: int = 2

    class Only(RegistryWith):
        def classes(self, kind: str) -> dict[str, type]:
            return {name: cls for (of, name), cls in self.extra.items() if of == kind}

    assert list(undocumented_components(Only(Silent))) == ["loss silent", "loss silent: power"]


def test_a_recipe_without_a_first_comment_is_found(install_plugin):
    install_plugin("spiral", "", files={"recipes/told.yaml": "# A spiral.\n", "recipes/silent.yaml": "name: x\n"})
    assert list(undocumented_recipes(Registry(only=["spiral"]))) == ["recipe silent"]


def test_a_command_and_an_option_without_help_are_found():
    @click.group()
    def tool() -> None:
        """A tool."""

    @tool.command()
    @click.argument("run")
    @click.option("--told", help="Told.", type=int, default=3)
    @click.option("--silent")
    def work(run: str, told: int, silent: str) -> None: ...

    assert list(undocumented_commands(tool)) == ["mim work", "mim work --silent"]
    assert command_entry(tool.commands["work"], "mim work") == (
        "## `mim work`\n\n```\nmim work [OPTIONS] RUN\n```\n\n"
        "- `--told INTEGER`: Told. Default: `3`.\n- `--silent TEXT`"
    )


def test_the_readme_leads_to_the_reference():
    assert "](docs/reference/README.md)" in (Path(FOLDER).parents[1] / "README.md").read_text()
