"""The command line: arguments reach the right function, and an error is one message without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mim_framework import __version__
from mim_framework.base.errors import DataError, RecipeError
from mim_framework.commands.cli import main
from mim_framework.registry.registry import Registry

GOOD = """\
# A tiny recipe.
name: tiny
data: {source: digits, workers: 0}
masker: none
encoder: {type: timm, model: vit_tiny_patch16_224}
target: pixels
decoder: linear
loss: mse
optim: {lr: 1e-3}
train: {total_batch_size: 8, steps: 3, device: cpu}
"""


@pytest.fixture
def mim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command in a folder that holds r.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(GOOD)

    def mim(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return mim


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """Replaces functions of other modules by ones that write down their arguments: calls(module, name, result)."""
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def replace(module: str, name: str, result: Any) -> None:
        def recorded(*arguments: Any, **options: Any) -> Any:
            made.append((name, arguments, options))
            if isinstance(result, Exception):
                raise result
            return result

        fake = types.ModuleType(module)
        setattr(fake, name, recorded)
        monkeypatch.setitem(sys.modules, module, fake)

    replace.made = made  # type: ignore[attr-defined]
    return replace


def test_run_trains_in_this_process(mim, calls):
    calls("mim_framework.training.trainer", "train", Path("elsewhere/tiny"))
    result = mim("run", "r.yaml", "seed=7", "--fresh", "--output", "else: where")
    assert result.output == "run directory: elsewhere/tiny\n"
    [(_, (recipe, _), options)] = calls.made
    assert (recipe.seed, recipe.output_dir, options) == (7, "else: where", {"fresh": True, "allow_change": ()})


def test_run_starts_the_ranks_it_is_asked_for(mim, monkeypatch):
    made = []
    monkeypatch.setattr(
        "mim_framework.runtime.launch.launch", lambda arguments, **options: made.append((arguments, options))
    )
    result = mim("--no-plugins", "run", "r.yaml", "seed=7", "--nproc-per-node", "2", "--fresh", "--output", "out")
    assert (result.exit_code, result.output) == (0, "")
    nowhere = {"node_rank": None, "rdzv_endpoint": None, "rdzv_id": None}
    arguments = ["--no-plugins", "run", "--fresh", "--", "r.yaml", "seed=7", 'output_dir="out"']
    assert made.pop() == (arguments, {"nproc_per_node": 2, "nnodes": 1, **nowhere})
    mim("run", "r.yaml", "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:29400", "--rdzv-id", "a")
    there = {"node_rank": 1, "rdzv_endpoint": "host:29400", "rdzv_id": "a"}
    assert made.pop() == (["run", "--", "r.yaml"], {"nproc_per_node": 1, "nnodes": 2, **there})
    mim("run", "r.yaml", "train.steps=9", "--nproc-per-node", "2", "--allow-change", "train.steps")
    assert made.pop()[0] == ["run", "--allow-change", "train.steps", "--", "r.yaml", "train.steps=9"]


def test_run_under_a_launcher_starts_no_ranks(mim, calls, monkeypatch):
    calls("mim_framework.training.trainer", "train", Path("runs/tiny"))
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mim_framework.commands.cli.TELLING_SECONDS", 0.0)
    result = mim("run", "r.yaml", "--nproc-per-node", "2")
    assert len(calls.made) == 1
    assert result.output == ""
    quiet = mim("run", "r.yaml", "seed=x")
    assert (quiet.exit_code, quiet.output) == (1, "")
    calls("mim_framework.training.trainer", "train", DataError("this rank's own disk"))
    assert mim("run", "r.yaml").stderr == "mim: this rank's own disk\n"


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_a_wrong_number_of_processes_is_a_usage_error(mim, count):
    result = mim("run", "r.yaml", "--nproc-per-node", count)
    assert result.exit_code == 2
    assert f"'{count}' is neither a number of processes nor 'auto'" in result.stderr


def test_check_and_bench_print_a_report(mim, calls):
    calls("mim_framework.commands.check", "report", "a page")
    calls("mim_framework.commands.bench", "run_bench", "a table")
    assert mim("check", "r.yaml", "seed=2", "--world-size", "4").output == "a page\n"
    assert mim("bench", "r.yaml", "--data", "loader-only", "--steps", "3").output == "a table\n"
    (_, check, check_options), (_, _, bench_options) = calls.made
    assert (check[0].seed, check_options) == (2, {"world_size": 4})
    assert bench_options == {"data": "loader-only", "steps": 3}


def test_commands_after_training_call_their_function(mim, calls, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "a.png").touch()
    calls("mim_framework.commands.evaluate", "report", iter(["a table", "of numbers"]))
    calls("mim_framework.commands.reconstruct", "reconstruct_run", [Path("x.png"), Path("y.png")])
    told = mim("eval", "knn,linear", "runs", "knn.k=3", "--train", "a", "--checkpoint", "all", "--cache", "c", "--json")
    assert told.output == "a table\nof numbers\n"
    assert mim("reconstruct", "runs", "a.png", "--output", "out").output == "x.png\ny.png\n"
    calls("mim_framework.convert", "export_run", Path("out.safetensors"))
    assert mim("export", "runs", "--to", "timm", "--output", "out").output == "out.safetensors\n"
    calls("mim_framework.convert", "import_checkpoint", "a report")
    assert mim("import", "a.png", "encoder.num_heads=12", "--layout", "mae").output == "a report\n"
    assert [
        (name, [each for each in arguments if not isinstance(each, Registry)]) for name, arguments, _ in calls.made
    ] == [
        ("report", [["knn", "linear"], ["runs"], ["knn.k=3"]]),
        ("reconstruct_run", [Path("runs"), [Path("a.png")], Path("out")]),
        ("export_run", [Path("runs"), "timm", Path("out")]),
        ("import_checkpoint", [Path("a.png"), None]),
    ]
    sources = {"train": "a", "test": None, "checkpoint": "all", "cache": Path("c")}
    options = dict(calls.made[0][2])
    assert callable(options.pop("progress"))
    assert options == {"as_json": True, **sources}
    defaults = {"key": None, "prefix": None, "allow_nonfinite": False}
    assert calls.made[-1][2] == {"layout": "mae", "options": {"encoder.num_heads": 12}, **defaults}
    assert mim("import", "a.png", "encoder").stderr == "mim: write it as KEY=VALUE, for example optim.lr=1e-3\n"


@pytest.mark.parametrize("command", [["export", "gone", "--to", "timm"], ["reconstruct", "gone", "x"]])
def test_a_run_that_is_not_there_is_a_usage_error(mim, command):
    result = mim(*command)
    assert result.exit_code == 2
    assert "Directory 'gone' does not exist" in result.stderr


def test_an_error_of_the_user_is_one_message(mim, calls):
    result = mim("run", "r.yaml", "seed=x", "los=1")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "mim: 2 problems in r.yaml\n"
        "  override 'los=1': los: unknown key, did you mean 'loss'?\n"
        "  override 'seed=x': seed: needs a whole number, got 'x'\n"
    )
    calls("mim_framework.training.trainer", "train", DataError("too many broken images"))
    assert mim("run", "r.yaml").stderr == "mim: too many broken images\n"


def test_debug_lets_the_error_through(mim):
    with pytest.raises(RecipeError, match="gone.yaml: no such file"):
        CliRunner().invoke(main, ["--debug", "check", "gone.yaml"], catch_exceptions=False)


def test_plugins_are_listed_and_shown_without_importing_them(mim, install_plugin):
    source = (
        "'''Never imported.'''\nraise RuntimeError('boom')\nfrom mim_framework import Loss, hookimpl\n"
        "class A(Loss):\n    '''A loss.'''\n    name = 'a'\n@hookimpl\ndef mim_losses():\n    return [A]\n"
        "@hookimpl\ndef mim_maskers():\n    return make()\n@hookimpl\ndef mim_run_started(run):\n    pass\n"
    )
    install_plugin("spiral", source, files={"recipes/swirl.yaml": "# A swirl.\n"})
    install_plugin("broken", "def f(:\n")
    result = mim("plugins", "list")
    assert result.exit_code == 0
    assert "builtins 0.1.0 (mim-framework)\n  masker: random, block, none\n" in result.output.replace(
        __version__, "0.1.0"
    )
    assert (
        "spiral 1.2 (mim-plugin-spiral)\n  loss: a\n  masker: (known when loaded)\n  recipes: swirl\n"
        "  listens to: mim_run_started\n" in result.output
    )
    assert (
        "broken 1.2 (mim-plugin-broken)\n  cannot be used: plugin 'broken' (mim-plugin-broken): syntax error"
        in result.output
    )
    assert mim("plugins", "show", "spiral").output == (
        "spiral 1.2\npackage: mim-plugin-spiral\nmodule: mim_plugin_spiral\nloss a: A loss.\nrecipe swirl: A swirl.\n"
        "listens to mim_run_started\n"
    )
    assert (
        "cannot be used: plugin 'spiral' (mim-plugin-spiral): import failed" in mim("plugins", "list", "--load").output
    )
    failed = mim("plugins", "show", "spiral", "--load")
    assert failed.exit_code == 1
    assert "RuntimeError: boom" in failed.stderr
    assert "no plugin 'spirall' is installed, did you mean 'spiral'?" in mim("plugins", "show", "spirall").stderr
    assert "spiral" not in mim("--no-plugins", "plugins", "list").output


def test_recipes_are_listed_and_copied(mim, install_plugin, monkeypatch):
    monkeypatch.setenv("MIM_LOAD_PLUGINS", "spiral")
    install_plugin("spiral", "", files={"recipes/swirl.yaml": GOOD, "recipes/whirl_pool.yaml": "# A whirl.\n"})
    assert mim("recipes", "list").output == "swirl       spiral: A tiny recipe.\nwhirl_pool  spiral: A whirl.\n"
    assert mim("recipes", "copy", "swirl").output == "swirl.yaml\n"
    assert Path("swirl.yaml").read_text() == GOOD
    again = mim("recipes", "copy", "swirl")
    assert again.exit_code == 1
    assert again.stderr == "mim: swirl.yaml is there already; name another file: mim recipes copy swirl DEST\n"
    assert mim("recipes", "copy", "swirl", "mine.yaml").output == "mine.yaml\n"
    assert (
        "gone/x.yaml cannot be written: No such file or directory"
        in mim("recipes", "copy", "swirl", "gone/x.yaml").stderr
    )
    assert "no recipe 'swirll' is installed, did you mean 'swirl'?" in mim("recipes", "copy", "swirll").stderr
    assert mim("--no-plugins", "recipes", "list").stderr == "no installed plugin ships a recipe\n"


def test_schema_is_json_and_names_what_it_leaves_out(mim, install_plugin, monkeypatch):
    monkeypatch.setenv("MIM_LOAD_PLUGINS", "broken")
    install_plugin("broken", "raise SystemExit\n")
    result = mim("schema")
    assert json.loads(result.stdout)["title"] == "Recipe"
    assert result.stderr.startswith("left out: plugin 'broken' (mim-plugin-broken): import failed with SystemExit")


def test_doctor_ends_with_status_1_if_something_is_wrong(mim, calls):
    from mim_framework.commands.doctor import Finding

    calls("mim_framework.commands.doctor", "examine", [Finding("a", "fine"), Finding("b", "broken", False)])
    result = mim("doctor")
    assert (result.exit_code, result.output) == (1, "  a: fine\n! b: broken\n")


def test_python_m_and_the_version(tmp_path):
    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mim_framework", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}
        )

    assert python("--version").stdout == f"mim, version {__version__}\n"
    failed = python("recipes", "copy", "nothing-of-that-name")
    assert failed.returncode == 1
    assert failed.stderr.startswith("mim: no recipe 'nothing-of-that-name' is installed")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "a: !!python/object/apply:os.system [ls]", "a: 1\na: 2", "\0", "[" * 10_000, ""]
)
def test_a_bad_recipe_never_ends_in_a_traceback(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    command = [sys.executable, "-m", "mim_framework", "run", "bad.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("mim: bad.yaml:")
    assert len(result.stderr.splitlines()) == 1
