"""Plugins that misbehave, each an installed distribution: the command line stays usable, names culprit and cure."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mim_framework.assembly.builder import build_model
from mim_framework.commands.cli import main
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry import importing
from mim_framework.registry.registry import Registry

BAD = """
from mim_framework import Mask, Masked, Masker, MaskerSpec, hookimpl

class Bad(Masker):
    '''Hides nothing.'''

    name = "bad"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(specs.encoder.grid, equal=True)

    def forward(self, step, views):
        return Masked({"x": Mask.none(len(step.positions), self.spec.grid, step.positions.device)}, views)

@hookimpl
def mim_maskers():
    return [Bad]
"""
INSTANCE = """
from mim_framework import Specs
made = Bad(Bad.Config(), Specs(encoder=type("Spec", (), {"grid": None})))
@hookimpl
def mim_maskers():
    return [made]
"""
TWICE = """
class Other(Bad):
    pass
@hookimpl
def mim_maskers():
    return [Bad, Other]
"""
RECIPE = """\
name: {masker}
data: {{source: digits, workers: 0}}
views: {{type: image, img_size: 16}}
masker: {masker}
encoder: {{type: vit, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}
target: pixels
decoder: linear
loss: mse
optim: {{lr: 1e-3}}
train: {{total_batch_size: 8, steps: 2, device: cpu}}
checkpoint: {{every_epochs: 0}}
evaluate: []
log: {{tensorboard: false, num_images: 0}}
"""

FAULTS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "raises on import": ({"source": f"raise RuntimeError('boom')\n{BAD}"}, False, "failed with RuntimeError: boom"),
    "calls sys.exit": ({"source": f"import sys\nsys.exit(3)\n{BAD}"}, False, "import failed with SystemExit: 3"),
    "misses a library": (
        {"source": f"import no_such_library\n{BAD}"},
        False,
        "needs the library 'no_such_library', which is not installed. Cure: pip install no_such_library",
    ),
    "requires a distribution": (
        {"source": BAD, "requires": ("no-such-distribution>=2",)},
        True,
        "it requires no-such-distribution, which is not installed. Cure: pip install no-such-distribution",
    ),
    "misspells a hook": (
        {"source": BAD.replace("mim_maskers", "mim_masker")},
        True,
        "there is no hook 'mim_masker', did you mean 'mim_maskers'",
    ),
    "wrong API version": (
        {"source": f"requires_api = '7'\n{BAD}"},
        True,
        "it is made for plugin API 7, and mim-framework .* has plugin API 2.* pip install --upgrade mim-framework",
    ),
    "wrong API version, computed": (
        {"source": f"requires_api = str(3 + 4)\n{BAD}"},
        False,
        "it is made for plugin API 7, and mim-framework .* has plugin API 2",
    ),
    "one component name twice": ({"source": BAD + TWICE}, False, "2 classes of one kind are named 'bad'"),
    "an instance instead of a class": (
        {"source": BAD + INSTANCE},
        False,
        "an instance of Bad; return the class itself",
    ),
    "raises in a hook": (
        {"source": f"{BAD}\n@hookimpl\ndef mim_losses():\n    raise SystemExit('bye')\n"},
        False,
        "SystemExit: bye",
    ),
}
"""Fault -> how it is installed, whether the source alone shows it, and what is said of it."""


@pytest.fixture
def mim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in a folder with two recipes: good.yaml, and bad.yaml that needs the plugin's masker."""
    monkeypatch.delenv("MIM_LOAD_PLUGINS", raising=False)
    monkeypatch.delenv("MIM_DISABLE_PLUGINS", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(RECIPE.format(masker="none"))
    Path("bad.yaml").write_text(RECIPE.format(masker="bad"))

    def mim(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    return mim


def check_that_it_is_usable(mim: Callable[..., Result]) -> None:
    """Listings and a recipe that needs nothing of the plugin, without a word of complaint."""
    assert "\nmae " in mim("plugins", "list").stdout
    assert {"quickstart", "bad_recipe"} <= set(mim("recipes", "list").stdout.split())
    checked = mim("check", "good.yaml")
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert "tokens per image" in checked.stdout
    shown = mim("plugins", "show", "mae")
    assert (shown.exit_code, shown.stderr) == (0, "")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plugin_with_a_fault_stops_only_the_recipes_that_need_it(mim, install_plugin, monkeypatch, fault):
    options, shows, message = FAULTS[fault]
    install_plugin("bad", **options, files={"recipes/bad_recipe.yaml": "# Needs what is broken.\n"})
    culprit = r"plugin 'bad' \(mim-plugin-bad\)"

    check_that_it_is_usable(mim)
    assert "mim_plugin_bad" not in sys.modules
    assert bool(re.search(f"cannot be used: {culprit}.*{message}", mim("plugins", "list").stdout)) == shows
    with monkeypatch.context() as only:
        only.setenv("MIM_LOAD_PLUGINS", "bad")
        assert re.search(f"cannot be used: {culprit}.*{message}", mim("plugins", "list", "--load").stdout)
    shown = mim("plugins", "show", "bad")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("bad 1.2\npackage: mim-plugin-bad\n")
    assert ("cannot be used" in shown.stdout) == shows

    for command in ("check", "run"):
        refused = mim(command, "bad.yaml")
        assert refused.exit_code == 1
        assert re.search(f"bad.yaml:4:1: masker: .*{culprit}.*{message}", refused.stderr)
        assert re.search("Cure: pip install .*, or leave it out with MIM_DISABLE_PLUGINS=bad", refused.stderr)

    monkeypatch.setenv("MIM_DISABLE_PLUGINS", "bad")
    assert "mim-plugin-bad" not in mim("plugins", "list").stdout
    assert "masker: " in mim("check", "bad.yaml").stderr
    assert "mim-plugin-bad" not in mim("check", "bad.yaml").stderr


@pytest.mark.slow
def test_a_run_goes_through_while_every_bad_plugin_is_installed(mim, install_plugin):
    for number, (options, _, _) in enumerate(FAULTS.values()):
        install_plugin(f"bad{number}", **{**options, "source": options["source"].replace('"bad"', f'"bad{number}"')})
    short = ["train.epochs=null", "train.steps=2", "train.total_batch_size=8", "train.device=cpu", "evaluate=[]"]
    done = mim("run", "quickstart", *short, "log.tensorboard=false")
    assert done.exit_code == 0
    assert done.stdout.endswith("run directory: runs/quickstart\n")
    assert len(list(Path("runs/quickstart/checkpoints").iterdir())) == 1
    assert not [name for name in sys.modules if re.fullmatch(r"mim_plugin_bad\d+", name)]


# --- names that are taken --------------------------------------------------------------------------------------------


def test_a_component_with_a_taken_name_is_told_with_both_packages_and_how_to_choose(mim, install_plugin, monkeypatch):
    install_plugin("bad", BAD.replace('name = "bad"', 'name = "none"'))
    assert mim("plugins", "list").exit_code == 0
    refused = mim("check", "good.yaml")
    assert refused.exit_code == 1
    assert (
        "good.yaml:4:1: masker: masker 'none' is offered by the plugins 'builtins' (mim-framework) and 'bad' "
        "(mim-plugin-bad); choose with type: 'builtins:none' or 'bad:none', or leave one out, for example with "
        "MIM_DISABLE_PLUGINS=bad\n" in refused.stderr
    )
    for chosen in ("builtins:none", "bad:none"):
        assert mim("check", "good.yaml", f"masker={chosen}").exit_code == 0
    monkeypatch.setenv("MIM_DISABLE_PLUGINS", "bad")
    assert mim("check", "good.yaml").exit_code == 0


def test_a_broken_plugin_does_not_take_the_name_of_a_component_that_works(mim, install_plugin):
    install_plugin("bad", "raise RuntimeError('boom')\n" + BAD.replace('name = "bad"', 'name = "none"'))
    assert mim("check", "good.yaml").exit_code == 0
    assert "RuntimeError: boom" in mim("check", "good.yaml", "masker=bad:none").stderr


def test_two_distributions_with_one_entry_point_name_are_both_named(mim, install_plugin, monkeypatch):
    install_plugin("bad", BAD, files={"recipes/bad_recipe.yaml": "# A recipe.\n"})
    install_plugin("bad", BAD.replace('"bad"', '"worse"'), distribution="fork", module="mim_plugin_fork")
    check_that_it_is_usable(mim)
    listed = mim("plugins", "list").stdout
    for distribution, component in (("mim-plugin-bad", "bad"), ("fork", "worse")):
        assert f"bad 1.2 ({distribution})\n  masker: {component}\n" in listed, (
            "each with what it offers, not what its namesake offers"
        )
        cure = f"pip uninstall {distribution}, or leave it out with MIM_DISABLE_PLUGINS={distribution}"
        assert re.search(rf"plugin 'bad' \({distribution}\): another installed package .*Cure: {cure}\n", listed)
        assert f"package: {distribution}\n" in mim("plugins", "show", distribution).stdout
    refused = mim("check", "bad.yaml")
    assert refused.exit_code == 1
    assert "another installed package has a plugin of the same name" in refused.stderr
    monkeypatch.setenv("MIM_DISABLE_PLUGINS", "fork")
    assert mim("check", "bad.yaml").exit_code == 0


# --- an import that takes long ---------------------------------------------------------------------------------------

SLEEPY = "import time\ntime.sleep(0.5)\n" + BAD


@pytest.mark.fault(row="15")
def test_a_plugin_that_hangs_in_import_is_imported_only_by_recipes_that_need_it(mim, install_plugin, figure):
    install_plugin(
        "bad", "import time\ntime.sleep(30)\n" + BAD, files={"recipes/bad_recipe.yaml": "# Needs what hangs.\n"}
    )
    check_that_it_is_usable(mim)
    assert mim("plugins", "show", "bad").exit_code == 0
    assert "mim_plugin_bad" not in sys.modules
    figure("one that hangs for 30 s in import: not imported where it is not needed")


@pytest.mark.fault(row="15")
def test_a_slow_import_is_told_with_its_plugin_and_how_to_leave_it_out(mim, install_plugin, monkeypatch, figure):
    monkeypatch.setattr(importing, "SLOW_IMPORT_SECONDS", 0.1)
    install_plugin("bad", SLEEPY)
    checked = mim("check", "bad.yaml")
    assert checked.exit_code == 0
    assert checked.stderr == (
        "mim: plugin 'bad' (mim-plugin-bad) has been importing for 0.1 s; to go without it, stop with Ctrl-C and set "
        "MIM_DISABLE_PLUGINS=bad\n"
    )
    figure("one that is slow in import: named with the way to leave it out, and then used")


def test_an_import_within_the_time_is_not_told(mim, install_plugin, monkeypatch):
    monkeypatch.setattr(importing, "SLOW_IMPORT_SECONDS", 60.0)
    install_plugin("bad", SLEEPY)
    assert mim("check", "bad.yaml").stderr == ""


def test_no_thread_is_left_behind_that_a_fork_would_find(install_plugin, monkeypatch):
    import threading

    install_plugin("bad", "raise RuntimeError('boom')\n" + BAD)
    before = threading.active_count()
    assert "bad" in Registry().load_all()
    assert threading.active_count() == before


def test_a_stop_while_a_plugin_hangs_ends_the_command(mim, install_plugin):
    install_plugin("bad", "raise KeyboardInterrupt\n" + BAD)
    stopped = mim("check", "bad.yaml")
    assert (stopped.exit_code, stopped.stderr.strip()) == (130, "mim: interrupted")


# --- global random generators ----------------------------------------------------------------------------------------

DRAWS = {
    "python": "import random\nrandom.seed(3)\n",
    "numpy": "import numpy\nnumpy.random.rand(5)\n",
    "torch": "import torch\ntorch.manual_seed(3)\ntorch.rand(5)\n",
}


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]  # noqa: NPY002


def seed() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


@pytest.mark.parametrize("place", ["on import", "in a hook", "before an error"])
@pytest.mark.parametrize("library", DRAWS)
def test_a_plugin_that_moves_a_generator_changes_no_later_draw(install_plugin, library, place):
    hook = f"\n@hookimpl\ndef mim_losses():\n    {DRAWS[library].strip().replace(chr(10), '; ')}\n    return []\n"
    source = BAD + hook if place == "in a hook" else DRAWS[library] + BAD
    install_plugin("bad", source + ("\nraise RuntimeError('boom')\n" if place == "before an error" else ""))
    seed()
    expected = draws()
    seed()
    if place == "before an error":
        assert "bad" in Registry().load_all()
    else:
        with pytest.warns(RuntimeWarning, match=rf"plugin 'bad' \(mim-plugin-bad\): .* generator of {library};"):
            Registry().load("bad")
    assert draws() == expected


@pytest.mark.parametrize("library", DRAWS)
def test_the_weights_are_the_same_with_a_plugin_that_moves_a_generator(install_plugin, tmp_path, library):
    """The masker is imported between encoder and decoder, while the model is being built."""
    import yaml

    def weights(draw: str, module: str) -> dict[str, torch.Tensor]:
        install_plugin(module, (draw + BAD).replace('"bad"', f'"{module}"'))
        recipe = Recipe.model_validate(yaml.safe_load(RECIPE.format(masker=module).replace("1e-3", "0.001")))
        return build_model(recipe, Registry()).objective.state_dict()

    quiet = weights("", "quiet")
    with pytest.warns(RuntimeWarning, match=rf"generator of {library}; .* leave it out with MIM_DISABLE_PLUGINS=loud"):
        loud = weights(DRAWS[library], "loud")
    assert quiet.keys() == loud.keys()
    assert all(torch.equal(quiet[name], loud[name]) for name in quiet)


def test_a_plugin_that_draws_is_named_by_the_command_line(mim, install_plugin):
    install_plugin("bad", DRAWS["torch"] + BAD, files={"recipes/bad_recipe.yaml": "# Draws.\n"})
    check_that_it_is_usable(mim)
    with pytest.warns(RuntimeWarning, match=r"plugin 'bad' \(mim-plugin-bad\): its import moves the global random"):
        assert mim("check", "bad.yaml").exit_code == 0
