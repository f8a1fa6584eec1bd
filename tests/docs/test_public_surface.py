"""Public names do not change unseen: a file lists them, and each change asks for a line in the changelog."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import make_public_names
import pytest
from make_public_names import CHANGELOG, COMMAND, PAGE, changes, described, main, page, read, show, surface, unnamed
from pydantic import Field

import mim_framework
from mim_framework import Mask, Section, layouts, nn
from mim_framework.contract import mask, records, specs, step
from mim_framework.registry.static_reader import HOOKS


def test_the_file_of_public_names_is_what_the_code_offers():
    changed = changes(read(PAGE.read_text()), surface())
    told = "\n".join(f"  {name}: {what}" for name, what in changed.items())
    cure = f"Name each in the section 'Unreleased' of CHANGELOG.md, then run {COMMAND}"
    assert not changed, f"public names differ from docs/reference/{PAGE.name}:\n{told}\n{cure}"


def test_every_exported_name_every_record_and_every_hook_is_listed():
    listed = read(PAGE.read_text())
    assert set(mim_framework.__all__) - {"__version__"} <= listed["names"].keys()
    for package in (nn, layouts):
        assert set(package.__all__) <= listed[package.__name__.rpartition(".")[2]].keys()
    for module in (mask, records, specs, step):
        own = {name: value for name, value in vars(module).items() if dataclasses.is_dataclass(value)}
        public = {name for name, value in own.items() if name[0] != "_" and value.__module__ == module.__name__}
        assert public <= listed["names"].keys()
    assert listed["hooks"].keys() == set(HOOKS)
    assert {"name", "heads.NAME.weight", "phases.N.optimizers", "train.steps"} <= listed["recipe"].keys()
    assert "masker.random.mask_ratio" in listed["options"]


def test_the_file_reads_back():
    assert read(page(surface())) == surface()


# --- what is seen ----------------------------------------------------------------------------------------------------


class Before:
    """A class of a public module."""

    size: ClassVar[int] = 1

    class Config(Section):
        ratio: float = Field(0.5, gt=0)

    def draw(self, n: int, *, seed: int = 0) -> list[int]:
        """A method."""

    @property
    def area(self) -> int:
        """A property."""

    def test_it_holds(self, tmp_path: Path) -> None:
        """A test that plugins inherit."""

    def _private(self) -> None:
        """Nobody's business."""


def test_a_class_is_described_by_its_fields_and_signatures():
    assert described("Before", Before) == {
        "Before": "class",
        "Before.size": "ClassVar[int] = 1",
        "Before.Config.ratio": "float, > 0 = 0.5",
        "Before.draw": "method (n: int, *, seed: int = 0) -> list[int]",
        "Before.area": "property -> int",
    }


CHANGED = {
    "a signature": ("draw", lambda self, n, seed=0: None, "Before.draw"),
    "the type of a property": ("area", property(lambda self: 2), "Before.area"),
    "a value": ("size", 2, "Before.size"),
    "a new method": ("fill", lambda self: None, "Before.fill"),
    "a bound": ("Config", type("Config", (Before.Config,), {"__annotations__": {"ratio": "float"}}), "Before.Config.r"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_of_a_class_is_seen(monkeypatch, case):
    name, value, seen = CHANGED[case]
    old = {"names": described("Before", Before)}
    monkeypatch.setattr(Before, name, value, raising=False)
    assert [each for each in changes(old, {"names": described("Before", Before)}) if each.startswith(seen)]


def test_a_removed_name_a_new_field_and_a_changed_signature_of_the_framework_are_seen(monkeypatch):
    old = surface()

    known = [("data", "Any"), ("name", "str"), ("label", "int | None", None), ("page", "int", 0)]
    grown = dataclasses.make_dataclass("Sample", [*known, ("weight", "float", 1.0)], frozen=True)
    monkeypatch.setattr(records, "Sample", grown)
    monkeypatch.setattr(Mask, "at", lambda self, grid, strict=False: self)
    monkeypatch.setattr(mim_framework, "__all__", [name for name in mim_framework.__all__ if name != "attend"])
    assert changes(old, surface()) == {
        "Mask.at": "was method (grid: Grid) -> Mask, is method (grid, strict = False)",
        "Sample.weight": "new",
        "attend": "gone",
    }


def test_a_field_that_moves_is_seen_where_positions_count():
    def record(*names: str) -> type:
        return dataclasses.make_dataclass("Record", [(name, "int") for name in names])

    old, new = ({"names": described("Record", record(*names))} for names in (("a", "b"), ("b", "a")))
    assert changes(old, new) == {
        "Record.a": "was field 1: int, is field 2: int",
        "Record.b": "was field 2: int, is field 1: int",
    }


def test_defaults_read_the_same_in_every_process():
    assert show(frozenset({"varies", "equal", "none"})) == "{'equal', 'none', 'varies'}"
    assert show((1, (2.5, None))) == "[1, [2.5, None]]"
    assert show(int) == "int"


# --- what the changelog has to say -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "line", "silent"),
    [
        ({"Mask.at": "was a, is b"}, "- `Mask.at` takes `strict`.", []),
        ({"Mask.at": "was a, is b"}, "- `Mask.at(grid, strict=True)` is new.", []),
        ({"Mask.at": "was a, is b"}, "- Mask.at takes strict.", ["Mask.at"]),
        ({"Mask.at": "was a, is b"}, "- `Mask` has changed, `at` last.", ["Mask.at"]),
        ({"Mask.at": "was a, is b"}, "- `Mask.at_once` is new.", ["Mask.at"]),
        ({"Mask": "new", "Mask.at": "new"}, "- `Mask` is new.", []),
        ({"Mask": "new", "Mask.at": "new"}, "- `Mask.at` is new.", ["Mask"]),
        ({"Mask": "was a, is b", "Mask.at": "gone"}, "- `Mask` is frozen.", ["Mask.at"]),
        ({"attend": "gone"}, "", ["attend"]),
        ({"attend": "gone"}, "\n## 0.1.0\n\n- `attend` is gone.", ["attend"]),
    ],
)
def test_the_section_unreleased_must_name_each_change_in_code(changed, line, silent):
    assert unnamed(changed, f"# Changelog\n\n## Unreleased\n\n{line}\n") == silent


def test_the_command_refuses_to_write_until_the_changelog_names_the_change(tmp_path: Path, capsys, monkeypatch):
    names, changelog = tmp_path / "reference" / "public_names.txt", tmp_path / "CHANGELOG.md"
    old = surface()
    old["names"]["attend"] = "function (q: Tensor) -> Tensor"
    del old["names"]["Mask.partner"]
    names.parent.mkdir()
    names.write_text(page(old))
    changelog.write_text("## Unreleased\n\n- `attend` is faster.\n")
    assert main(names, changelog) == 1
    assert read(names.read_text()) == old
    refusal = capsys.readouterr().out
    assert "must name, in `code`:\n  Mask.partner: new\n" in refusal
    assert "attend" not in refusal

    changelog.write_text("## Unreleased\n\n- `attend` is faster, `Mask.partner` new.\n")
    assert main(names, changelog) == 0
    assert read(names.read_text()) == surface()
    assert "2 changes written\n  Mask.partner: new\n" in capsys.readouterr().out


def test_without_the_file_every_name_is_new(tmp_path: Path, capsys):
    assert main(tmp_path / "public_names.txt", CHANGELOG) == 1
    assert "  Ask: new\n" in capsys.readouterr().out


def test_what_plugins_are_handed_is_listed_too():
    """Classes that no plugin imports: `step.world`, `step.teachers`, the run of an event, what a source raises."""
    listed = read(PAGE.read_text())["names"]
    assert {name for names in make_public_names.GIVEN.values() for name in names} <= listed.keys()
    assert {"World.mean", "TeacherSession.part", "Run.dir"} <= listed.keys()
