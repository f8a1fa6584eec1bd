"""`mim plugins new` and docs/plugins.md: what is written works, it is what is shown, and what is said is run."""

from __future__ import annotations

import json
import os
import re
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from clean_install import ROOT, call
from click.testing import CliRunner

from mim_framework.base.errors import MimError
from mim_framework.commands.cli import main
from mim_framework.commands.scaffold import TEMPLATE, new_plugin
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.training.trainer import train

MODULE = TEMPLATE / "src/mim_plugin_my_method/__init__.py"
RECIPE = TEMPLATE / "src/mim_plugin_my_method/recipes/my_method_quickstart.yaml"
TESTS = TEMPLATE / "tests/test_my_method.py"
GUIDE = ROOT / "docs/plugins.md"


@dataclass(frozen=True)
class Block:
    """A block of code in the guide; one without a language holds commands."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        return [] if self.language else [line for line in self.text.splitlines() if line]


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)]


def blocks(language: str) -> list[str]:
    return [block.text for block in BLOCKS if block.language == language]


def sides(diff: str) -> tuple[str, str]:
    """A diff's lines before and after."""
    lines = diff.splitlines(keepends=True)
    return tuple("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def new(*arguments: str):
    return CliRunner().invoke(main, ["plugins", "new", *arguments])


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_new_plugin_bears_its_own_name_everywhere(tmp_path):
    result = new("dust-cloud", "--output", str(tmp_path))
    folder = tmp_path / "mim-plugin-dust-cloud"
    assert result.output == (
        f"{folder} is a plugin that works; change it. Next:\n"
        f"  pip install -e '{folder}[test]'\n"
        f"  pytest {folder}\n"
        "  mim run dust_cloud_quickstart\n"
    )
    assert files_in(folder) == {
        "README.md",
        "pyproject.toml",
        "src/mim_plugin_dust_cloud/__init__.py",
        "src/mim_plugin_dust_cloud/recipes/dust_cloud_quickstart.yaml",
        "tests/test_dust_cloud.py",
    }
    for file in files_in(folder):
        assert not re.search("my.method", (folder / file).read_text()), file
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "mim-plugin-dust-cloud"
    assert project["entry-points"] == {"mim_framework": {"dust_cloud": "mim_plugin_dust_cloud"}}
    assert 'requires_api = "2"\n' in (folder / "src/mim_plugin_dust_cloud/__init__.py").read_text()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_a_space_is_quoted_in_what_to_do_next(tmp_path):
    (tmp_path / "my code").mkdir()
    output = new("dust", "--output", str(tmp_path / "my code")).output
    assert f"  pytest '{tmp_path}/my code/mim-plugin-dust'\n" in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dust cloud", "called 'dust cloud': write at most 60 lower-case letters and digits .*; 'dust-cloud' would do"),
        ("Dust", "called 'Dust': .*; 'dust' would do"),
        ("3d", "called '3d': .* a letter first, .*; 'd' would do"),
        ("dust--cloud", "called 'dust--cloud': .* with single '-' or '_' between.*; 'dust-cloud' would do"),
        ("staub_wölkchen", "called 'staub_wölkchen': .*; 'staub-w-lkchen' would do"),
        ("mim-plugin-dust", "called 'mim-plugin-dust': .*without 'mim-plugin'; 'dust' would do"),
        ("../dust", "called '../dust': .*; 'dust' would do"),
        ("", "called '': .* without 'mim-plugin'$"),
        ("x" * 61, f"called 'x*': write at most 60 .*; '{'x' * 60}' would do"),
        ("class", "called 'class', which is a word of Python; 'class_mim' would do"),
        ("mae", r"plugin 'mae' \(mim-plugin-mae\) is installed already; choose another name"),
        ("random", "called 'random', that is a masker of plugin 'builtins'; choose another name"),
        ("pixels", "called 'pixels', that is a target of plugin 'builtins'"),
        ("beit-dvae", "called 'beit-dvae': its recipe would be 'beit_dvae_quickstart', which plugin 'beit' has"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_used_is_refused_and_nothing_written(tmp_path, name, message):
    with pytest.raises(MimError, match=message):
        new_plugin(name, tmp_path, Registry())
    assert list(tmp_path.iterdir()) == []


def test_a_package_of_ours_that_is_not_installed_keeps_its_name(tmp_path):
    with pytest.raises(
        MimError, match="mim-plugin-mae is a package of MIM Framework; .* or pip install mim-plugin-mae"
    ):
        new_plugin("mae", tmp_path, Registry(only=()))


def test_an_installed_plugin_keeps_its_name_however_it_is_spelt(tmp_path, install_plugin):
    install_plugin("dust_cloud", "", distribution="dusty")
    for name in ("dust-cloud", "dust_cloud"):
        with pytest.raises(MimError, match=r"plugin 'dust_cloud' \(dusty\) is installed already"):
            new_plugin(name, tmp_path, Registry())


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_already_is_left_as_it_is(tmp_path, kind):
    there = tmp_path / "mim-plugin-dust"
    {"folder": there.mkdir, "file": there.touch, "link": lambda: there.symlink_to("nowhere")}[kind]()
    result = new("dust", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == f"mim: {there} is there already; choose another name, or another folder with --output\n"
    assert list(tmp_path.iterdir()) == [there]
    assert not there.is_dir() or list(there.iterdir()) == []


def test_nothing_is_left_of_a_plugin_that_could_not_be_written(tmp_path, monkeypatch):
    write, calls = Path.write_text, []

    def full_after_two_files(path, *arguments, **options):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full_after_two_files)
    result = new("dust", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == f"mim: {tmp_path / 'mim-plugin-dust'} cannot be written: No space left on device\n"
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_must_not_be_written_to_is_named(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(MimError, match="mim-plugin-dust cannot be written: Permission denied"):
        new_plugin("dust", tmp_path, Registry())


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_plugin_that_the_guide_shows_is_the_template_and_has_at_most_60_lines():
    module = MODULE.read_text()
    assert blocks("python")[0] == module
    assert len(module.splitlines()) <= 60


def test_all_else_that_the_guide_shows_is_in_the_template_too():
    recipe, _, *sections = blocks("yaml")
    assert recipe in RECIPE.read_text()
    assert [text.partition(":")[0] for text in sections] == ["teachers", "optimizers"]
    _, listener, contract = blocks("python")
    assert contract in TESTS.read_text()
    assert listener.startswith("@hookimpl\n")
    [diff] = blocks("diff")
    before, after = sides(diff)
    assert MODULE.read_text().count(before) == 1
    assert before != after


def test_the_sections_that_the_guide_shows_are_part_of_a_recipe(tmp_path):
    data = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    del data["optim"]
    for section in blocks("yaml")[2:]:
        data |= yaml.safe_load(section)
    (tmp_path / "all.yaml").write_text(yaml.dump(data))
    recipe = load_recipe(tmp_path / "all.yaml")
    assert set(recipe.named_teachers()) == {"ema", "big"}
    assert [phase.sign for phase in recipe.named_phases()] == [1, -1]


def test_the_protocol_that_the_guide_shows_is_a_recipe(tmp_path):
    data = yaml.safe_load((ROOT / "recipes/mae_finetune_quickstart.yaml").read_text())
    shown = yaml.safe_load(blocks("yaml")[1].replace("spiral_vit", "mae_vit"))
    (tmp_path / "protocol.yaml").write_text(yaml.dump(data | shown))
    recipe = load_recipe(tmp_path / "protocol.yaml")
    assert (recipe.objective.type, recipe.published.value) == ("classify", 83.6)


def test_every_command_of_the_guide_stands_in_a_block_that_is_run():
    prose = re.sub(r"^```.*?^```$", "", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`((?:mim|pip|pytest|python) [^`]*)`", prose)) <= {"mim plugins list", "mim schema"}
    commands = [command for block in BLOCKS for command in block.commands]
    assert {"mim plugins new my-method", "pytest mim-plugin-my-method", "mim run my_method_quickstart"} < set(commands)
    assert {command.split()[0] for command in commands} == {"mim", "pip", "pytest"}


def test_the_shortest_plugin_trains(tmp_path, install_plugin):
    recipe = {f"recipes/{RECIPE.name}": RECIPE.read_text()}
    install_plugin("my_method", MODULE.read_text(), files=recipe)
    registry = Registry()
    short = ["train.epochs=null", "train.steps=12", "train.total_batch_size=16", "optim.warmup_epochs=0"]
    quiet = ["log.every_steps=4", "log.tensorboard=false", "log.num_images=0", "evaluate=[]"]
    run_dir = train(load_recipe("my_method_quickstart", [f"output_dir={tmp_path}", *short, *quiet], registry), registry)
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert losses[2] < 0.9 * losses[0]


# --- what is said is run ---------------------------------------------------------------------------------------------


class Author:
    """Somebody who types commands in a folder, with a clean environment and an index that holds our wheels."""

    def __init__(self, environment: Path, wheels: dict[str, Path], folder: Path) -> None:
        self.folder, self.bin = folder, environment / "bin"
        self.index = next(iter(wheels.values())).parent
        for program in ("pip", "pytest"):  # a venv has them; here both are borrowed, without their scripts
            script = self.bin / program
            script.write_text(f'#!/bin/sh\nexec "{self.bin}/python" -m {program} "$@"\n')
            script.chmod(0o755)

    def type(self, command: str) -> str:
        offline = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_NO_BUILD_ISOLATION": "0",
        }  # 0 means none
        paths = {"PATH": f"{self.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        result = call("sh", "-c", command, cwd=self.folder, timeout=900, **offline, **paths)
        return result.stdout


@pytest.fixture
def author(clean, wheels, tmp_path) -> Author:
    (tmp_path / "work").mkdir()
    return Author(clean, wheels, tmp_path / "work")


def columns_of(printed: str, title: str) -> dict[str, str]:
    """The numbers of one table that `mim eval` printed for one subject, by the names of its columns."""
    head, row = printed[printed.index(title) :].splitlines()[:2]
    return dict(zip(head.removeprefix(title).split(), re.findall(r"([\d.]+) \[", row), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_who_follows_the_guide_has_a_method_that_passes_its_tests_and_learns(author):
    module, printed = author.folder / "mim-plugin-my-method" / MODULE.relative_to(TEMPLATE), {}
    for block in BLOCKS:
        if block.language == "diff":
            before, after = sides(block.text)
            assert module.read_text().count(before) == 1
            module.write_text(module.read_text().replace(before, after))
        elif block.text.startswith("@hookimpl"):
            module.write_text(f"{module.read_text()}\n\n{block.text}")
        for command in block.commands:
            printed[command] = author.type(command)
    assert "masker my_method: Hide all patches but a random one" in printed["mim plugins show my_method"]
    assert " passed" in printed["pytest mim-plugin-my-method"]
    said = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) % \|$", GUIDE.read_text(), re.MULTILINE))
    assert said.keys() == {"untrained", "my_method_quickstart", "unsigned"}
    for run in ("my_method_quickstart", "unsigned"):
        measured = columns_of(printed[f"mim eval knn runs/{run}"], "knn top1")
        for name, share in (("untrained", said["untrained"]), ("trained", said[run])):
            assert 100 * float(measured[name]) == pytest.approx(float(share), abs=5), run
    assert "signed: false" in (author.folder / "runs/unsigned/recipe.yaml").read_text()
    assert "type: mae_vit" in (author.folder / "runs/mae_on_edges/recipe.yaml").read_text()
    [on_two_ranks] = [text for command, text in printed.items() if "--nproc-per-node 2" in command]
    assert "my_method watches two_ranks, 22 steps" in on_two_ranks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plugin_of_another_name_passes_its_tests(author):
    author.type('pip install "mim-framework[demo]"')
    written = author.type("mim plugins new dust-cloud")
    install, test, run = (line.strip() for line in written.splitlines()[1:])
    author.type(install)
    assert " passed" in author.type(test)
    author.type(f"{run} train.epochs=null train.steps=1 evaluate=[]")
    assert (author.folder / "runs/dust_cloud_quickstart/checkpoints/step_00000001/manifest.json").exists()
