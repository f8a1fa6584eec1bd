"""Listing, loading and choosing components, above all when plugins misbehave."""

from __future__ import annotations

import pickle
import re
import sys

import pytest

from mim_framework.base.errors import PluginError, RecipeError
from mim_framework.base.section import Choice
from mim_framework.registry import registry as registry_module
from mim_framework.registry.registry import Registry, UnknownName

SPIRAL = """
from pydantic import Field
from mim_framework import Masker, Section, hookimpl

class Spiral(Masker):
    '''Hide along a spiral.'''

    name = "spiral"

    class Config(Section):
        turns: int = Field(3, gt=0)
        '''Turns of the spiral.'''

@hookimpl
def mim_maskers():
    return [Spiral]
"""


def spiral(before: str = "", after: str = "") -> str:
    return before + SPIRAL + after


@pytest.fixture(autouse=True)
def no_switches(monkeypatch):
    monkeypatch.delenv("MIM_LOAD_PLUGINS", raising=False)
    monkeypatch.delenv("MIM_DISABLE_PLUGINS", raising=False)


def names(registry: Registry) -> list[str]:
    return [info.name for info in registry.plugins()]


def test_the_built_in_components_are_read_from_source():
    builtins = Registry(only=()).plugins()[0]
    assert (builtins.name, builtins.distribution, builtins.error) == ("builtins", "mim-framework", "")
    assert builtins.offers("masker", "random")
    assert builtins.offers("objective", "masked_prediction")
    assert not builtins.unread


def test_a_plugin_is_listed_without_importing_it(install_plugin):
    install_plugin("spiral", spiral("raise RuntimeError('never import me')\n"))
    info = Registry().plugin("spiral")
    assert (info.distribution, info.version, info.module) == ("mim-plugin-spiral", "1.2", "mim_plugin_spiral")
    assert [(each.kind, each.name, each.summary) for each in info.components] == [
        ("masker", "spiral", "Hide along a spiral.")
    ]
    assert "mim_plugin_spiral" not in sys.modules


def test_find_and_resolve_give_the_class_and_its_checked_options(install_plugin):
    install_plugin("spiral", spiral())
    registry = Registry()
    cls, config = registry.resolve("masker", Choice.model_validate({"type": "spiral", "turns": 5}))
    assert cls is registry.find("masker", "spiral") is registry.find("masker", "spiral:spiral")
    assert cls.__name__ == "Spiral"
    assert config.turns == 5
    with pytest.raises(
        RecipeError, match=r"masker 'spiral': turns: must be greater than 0, got -1; turn: unknown key, did"
    ):
        registry.resolve("masker", Choice.model_validate({"type": "spiral", "turns": -1, "turn": 1}))
    assert registry.components("spiral")[0].summary == "Hide along a spiral."


def test_only_the_plugin_that_offers_the_name_is_imported(install_plugin):
    install_plugin("spiral", spiral())
    install_plugin("other", spiral().replace('"spiral"', '"other"'))
    Registry().find("masker", "spiral")
    assert "mim_plugin_spiral" in sys.modules
    assert "mim_plugin_other" not in sys.modules


def test_a_plugin_that_cannot_be_read_is_imported_to_see(install_plugin):
    install_plugin("spiral", spiral().replace("[Spiral]", "[c for c in (Spiral,)]"))
    registry = Registry()
    assert registry.plugin("spiral").unread == {"masker"}
    assert registry.components("spiral") == []
    assert registry.find("masker", "spiral").__name__ == "Spiral"
    assert [each.name for each in registry.components("spiral")] == ["spiral"]


LOAD_FAULTS = {
    "raises": ("raise RuntimeError('boom')\n", "", "RuntimeError: boom"),
    "exits": ("import sys\nsys.exit(3)\n", "", "SystemExit: 3"),
    "misses a library": ("import no_such_library\n", "", "needs the library 'no_such_library'.*pip install no_such_l"),
    "misses a part of itself": ("from mim_plugin_spiral import gone\n", "", "cannot import name 'gone'"),
    "wrong api at run time": ("requires_api = str(10 - 1)\n", "", "made for plugin API 9"),
    "instance": ("", "@hookimpl\ndef mim_losses():\n    return [make()]\n"
                     "def make():\n    import mim_framework\n    return mim_framework.CheckpointFormat()\n",
                 "returned an instance of CheckpointFormat; return the class itself"),
    "no class": ("", "@hookimpl\ndef mim_losses():\n    return [3]\n", "mim_losses.. returned 3, which is no class"),
    "no list": ("", "@hookimpl\ndef mim_losses():\n    return Spiral\n", "a list of classes is needed"),
    "other kind": ("", "@hookimpl\ndef mim_losses():\n    return [Spiral]\n", "Spiral, which is no subclass of Loss"),
    "no name": ("", "class Bare(Masker):\n    pass\n@hookimpl\ndef mim_maskers():\n    return [Spiral, Bare]\n",
                "Bare needs a class attribute `name`"),
    "one name twice": ("", "class Two(Spiral):\n    pass\n@hookimpl\ndef mim_maskers():\n    return [Spiral, Two]\n",
                       "2 classes of one kind are named 'spiral'"),
    "no section": ("", "Spiral.Config = dict\n", "Spiral.Config must be a subclass of mim_framework.Section"),
    "field type": ("", "class Odd(Section):\n    type: str = ''\nSpiral.Config = Odd\n", "has a field 'type'"),
    "wrong arguments": ("", "@hookimpl\ndef mim_run_started(runner):\n    pass\n", "runner"),
    "hook raises": ("", "@hookimpl\ndef mim_losses():\n    return [1 / 0]\n", "ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LOAD_FAULTS)
def test_a_plugin_that_fails_on_import_is_an_error_only_for_its_own_names(install_plugin, fault):
    before, after, message = LOAD_FAULTS[fault]
    install_plugin("spiral", spiral(before, after))
    registry = Registry()
    assert registry.find("masker", "random").name == "random"
    for _ in range(2):
        with pytest.raises(PluginError, match=message) as error:
            registry.load("spiral")
        assert "plugin 'spiral' (mim-plugin-spiral)" in str(error.value)
        assert "MIM_DISABLE_PLUGINS=spiral" in str(error.value)
    with pytest.raises(PluginError, match=message):
        registry.find("masker", "spiral")
    assert list(registry.load_all()) == ["spiral"]
    assert "random" in registry.classes("masker")


STATIC_FAULTS = {
    "syntax error": ({"source": "def f(:\n"}, "syntax error at .*: .*force-reinstall mim-plugin-spiral"),
    "misspelt hook": (
        {"source": spiral().replace("mim_maskers", "mim_masker")},
        "there is no hook 'mim_masker', did you mean 'mim_maskers'",
    ),
    "old api": (
        {"source": spiral("requires_api = '0'\n")},
        "made for plugin API 0, and mim-framework .* has plugin API 2",
    ),
    "missing distribution": (
        {"source": spiral(), "requires": ("surely-not-there (>=1)", "pluggy>=1", "maybe; extra == 'x'")},
        "requires surely-not-there, which is not installed.*pip install surely-not-there,",
    ),
    "no module": (
        {"source": "", "entry_points": "[mim_framework]\nspiral = mim_plugin_gone\n"},
        "'mim_plugin_gone' is not found",
    ),
    "object": ({"source": "", "entry_points": "[mim_framework]\nspiral = mim_plugin_spiral:x\n"}, "must name a module"),
    "bad name": ({"source": "", "entry_points": "[mim_framework]\nspi ral = mim_plugin_spiral\n"}, "may hold letters"),
    "garbage": ({"source": "", "entry_points": "[mim_framework]\nnonsense\n"}, "entry_points.txt cannot be read"),
    "reserved name": (
        {"source": spiral(), "entry_points": "[mim_framework]\nbuiltins = mim_plugin_spiral\n"},
        "same name",
    ),
}


@pytest.mark.parametrize("fault", STATIC_FAULTS)
def test_a_fault_that_shows_without_importing_is_listed_with_its_cure(install_plugin, fault):
    options, message = STATIC_FAULTS[fault]
    install_plugin("spiral", **options)
    registry = Registry()
    [error] = [info.error for info in registry.plugins() if info.distribution == "mim-plugin-spiral"]
    assert re.search(message, error)
    assert "Cure: pip " in error
    assert "mim_plugin_spiral" not in sys.modules
    assert registry.find("masker", "random").name == "random"


def test_a_faulty_plugin_is_named_when_an_unknown_name_may_be_its(install_plugin):
    install_plugin("spiral", "def f(:\n")
    with pytest.raises(
        UnknownName, match=r"no masker 'spiral' is installed.*may belong to a faulty one: plugin 'spiral'"
    ):
        Registry().find("masker", "spiral")


def test_two_plugins_of_one_name_are_an_error_only_when_it_is_used(install_plugin):
    install_plugin("spiral", spiral())
    install_plugin("vortex", spiral())
    registry = Registry()
    assert registry.find("masker", "random").name == "random"
    message = r"plugins 'spiral' \(mim-plugin-spiral\) and 'vortex' \(mim-plugin-vortex\); choose with type: 'spiral:s"
    with pytest.raises(PluginError, match=message):
        registry.find("masker", "spiral")
    assert registry.find("masker", "vortex:spiral").__module__ == "mim_plugin_vortex"
    assert {"spiral:spiral", "vortex:spiral", "random"} <= registry.classes("masker").keys()


def test_two_distributions_with_the_same_entry_point_name_are_both_refused(install_plugin):
    install_plugin("spiral", spiral())
    install_plugin("spiral", spiral(), distribution="fork", module="mim_plugin_fork")
    registry = Registry()
    errors = [info.error for info in registry.plugins() if info.name == "spiral"]
    assert len(errors) == 2
    assert "pip uninstall fork, or leave it out with MIM_DISABLE_PLUGINS=fork" in errors[0]
    with pytest.raises(PluginError, match="another installed package has a plugin of the same name"):
        registry.find("masker", "spiral")
    assert registry.find("masker", "random")
    assert Registry(disabled=["fork"]).find("masker", "spiral").__module__ == "mim_plugin_spiral"


def test_an_unknown_name_gets_the_nearest_the_installed_and_the_package():
    registry = Registry(only=())
    with pytest.raises(
        UnknownName, match=r"no masker 'randon' is installed, did you mean 'random'\? installed: block, none, random"
    ):
        registry.find("masker", "randon")
    with pytest.raises(UnknownName, match="'linear' is a component of kind decoder, not masker"):
        registry.find("masker", "linear")
    with pytest.raises(UnknownName, match="no masker 'builtins:spiral' is installed; installed: block, none, random"):
        registry.find("masker", "builtins:spiral")
    with pytest.raises(UnknownName, match="no plugin 'buildins' is installed, did you mean 'builtins'"):
        registry.find("masker", "buildins:random")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("mae_vit", "mim-plugin-mae"),
        ("beit_vit", "mim-plugin-beit"),
        ("beit_v2_tokenizer", "mim-plugin-beitv2"),
        ("maskfeat", "mim-plugin-maskfeat"),
        ("mff_encoder", "mim-plugin-mff"),
    ],
)
def test_a_name_of_a_known_method_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setattr(registry_module, "installed_entries", list)
    with pytest.raises(
        UnknownName, match=f"no loss '{name}' is installed.* pip install {package} brings it; "
    ) as error:
        Registry(only=()).find("loss", name)
    assert error.value.package == package


def test_a_method_that_is_installed_is_not_to_be_installed_again(install_plugin):
    install_plugin("mae", "", distribution="mim-plugin-mae", module="mim_plugin_other")
    with pytest.raises(UnknownName, match="no loss 'mae_loss' is installed; installed: ") as error:
        Registry(only=()).find("loss", "mae_loss")
    assert error.value.package == ""


def test_the_environment_switches_plugins_off(install_plugin, monkeypatch):
    install_plugin("spiral", spiral())
    install_plugin("vortex", spiral())
    assert {"builtins", "spiral", "vortex"} <= set(names(Registry()))
    monkeypatch.setenv("MIM_DISABLE_PLUGINS", "vortex, mim_plugin_spiral")
    assert not {"spiral", "vortex"} & set(names(Registry()))
    with pytest.raises(
        UnknownName, match="masker 'spiral' comes from plugin 'spiral', which is switched off; see MIM_DIS"
    ):
        Registry().find("masker", "spiral")
    with pytest.raises(UnknownName, match="plugin 'vortex' is installed but switched off"):
        Registry().plugin("vortex")
    monkeypatch.setenv("MIM_DISABLE_PLUGINS", "1")
    assert names(Registry()) == ["builtins"]
    monkeypatch.delenv("MIM_DISABLE_PLUGINS")
    monkeypatch.setenv("MIM_LOAD_PLUGINS", "vortex")
    assert names(Registry()) == ["builtins", "vortex"]
    monkeypatch.setenv("MIM_LOAD_PLUGINS", "")
    assert names(Registry()) == ["builtins"]
    monkeypatch.setenv("MIM_LOAD_PLUGINS", "vortes")
    with pytest.raises(
        PluginError, match="MIM_LOAD_PLUGINS names the plugin 'vortes', which is not installed, did you mean 'v"
    ):
        Registry().plugins()


def test_a_pickled_registry_keeps_its_switches(install_plugin):
    install_plugin("spiral", spiral())
    registry = Registry(disabled=["spiral"])
    registry.find("masker", "random")
    assert names(pickle.loads(pickle.dumps(registry))) == names(registry)
    assert names(pickle.loads(pickle.dumps(Registry(only=())))) == ["builtins"]


@pytest.mark.parametrize(
    ("library", "draw"),
    [
        ("python", "import random\nrandom.random()\n"),
        ("numpy", "import numpy\nnumpy.random.rand()\n"),
        ("torch", "import torch\ntorch.manual_seed(3)\n"),
    ],
)
def test_a_plugin_that_moves_a_global_generator_on_import_is_named(install_plugin, library, draw):
    install_plugin("spiral", spiral(draw))
    registry = Registry()
    registry.load("builtins")
    message = rf"plugin 'spiral' \(mim-plugin-spiral\): its import moves the global .* of {library}; .* Cure: pip"
    with pytest.warns(RuntimeWarning, match=message):
        registry.load("spiral")


def test_plugins_that_listen_are_told_events_and_a_faulty_one_is_left_out(install_plugin):
    listener = (
        "from mim_framework import hookimpl\nheard = []\n@hookimpl\ndef mim_run_started(run):\n    heard.append(run)\n"
    )
    install_plugin("ears", listener)
    install_plugin("broken", "raise RuntimeError('boom')\n" + listener)
    registry = Registry()
    with pytest.warns(RuntimeWarning, match="run events go without this plugin: plugin 'broken'"):
        registry.hook.mim_run_started(run="first")
    registry.hook.mim_run_started(run="second")
    assert sys.modules["mim_plugin_ears"].heard == ["first", "second"]


def test_recipes_are_found_beside_the_module(install_plugin, monkeypatch):
    files = {
        "recipes/spiral.yaml": "\ufeff#\n# A spiral.\nname: x\n",
        "recipes/notes.txt": "",
        "recipes/bare.yaml": "name: x\n",
    }
    install_plugin("spiral", "raise RuntimeError\n", files=files)
    registry = Registry(only=["spiral"])
    assert [(each.name, each.plugin, each.summary) for each in registry.recipes()] == [
        ("bare", "spiral", ""),
        ("spiral", "spiral", "A spiral."),
    ]
    assert registry.recipe("spiral:bare").path.name == "bare.yaml"
    with pytest.raises(
        UnknownName, match=r"no recipe 'spirale' is installed, did you mean 'spiral'\? installed: bare, spiral"
    ):
        registry.recipe("spirale")
    monkeypatch.setitem(registry_module.known_packages(), "vortex", "mim-plugin-vortex")
    with pytest.raises(
        UnknownName, match="no recipe 'vortex' is installed; pip install mim-plugin-vortex brings it; ins"
    ):
        registry.recipe("vortex")
    install_plugin("vortex", "", files={"recipes/spiral.yaml": ""})
    with pytest.raises(
        PluginError, match="recipe 'spiral' is shipped by several plugins; choose 'spiral:spiral' or 'vortex:spi"
    ):
        Registry(only=["spiral", "vortex"]).recipe("spiral")


def test_a_recipe_that_cannot_be_read_disturbs_no_other(install_plugin):
    site = install_plugin("spiral", "", files={"recipes/spiral.yaml": "# A spiral.\n"})
    (site / "mim_plugin_spiral/recipes/folder.yaml").mkdir()
    assert [each.summary for each in Registry(only=["spiral"]).recipes()] == [
        "cannot be read: Is a directory",
        "A spiral.",
    ]
