"""What a plugin offers, read from its source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mim_framework.registry.static_reader import HOOKS, Unreadable, locate, read_constant, read_plugin

HEAD = "from mim_framework import Masker, hookimpl\n"
SPIRAL = "class Spiral(Masker):\n    '''Hide along a spiral.\n\n    More.\n    '''\n    name = 'spiral'\n"
HOOK = "@hookimpl\ndef mim_maskers():\n    return [Spiral]\n"


def read(install_plugin, source: str, **options):
    install_plugin("spiral", source, **options)
    return read_plugin("mim_plugin_spiral")


@pytest.mark.parametrize(
    ("source", "files"),
    [
        (HEAD + SPIRAL + HOOK, {}),
        (HEAD + SPIRAL + HOOK.replace("[Spiral]", "(Spiral,)"), {}),
        (HEAD + SPIRAL + "ALL = [Spiral]\n" + HOOK.replace("[Spiral]", "[*ALL] + []"), {}),
        (HEAD + SPIRAL.replace("'spiral'", "NAME") + "NAME = 'spiral'\n" + HOOK, {}),
        (HEAD + SPIRAL.replace("name =", "name: str =") + HOOK, {}),
        (HEAD + "try:\n    import nothing\nexcept ImportError:\n    nothing = None\n" + SPIRAL + HOOK, {}),
        (HEAD + HOOK.replace("hookimpl", "hookimpl(tryfirst=True)") + SPIRAL, {}),
        (HEAD + SPIRAL + "@hookimpl(specname='mim_maskers')\ndef give():\n    return [Spiral]\n", {}),
        (HEAD + "from .maskers import Spiral\n" + HOOK, {"maskers.py": HEAD + SPIRAL}),
        (
            HEAD + "from mim_plugin_spiral.maskers import Spiral as S\n" + HOOK.replace("[Spiral]", "[S]"),
            {"maskers.py": SPIRAL},
        ),
        (HEAD + "from . import maskers\n" + HOOK.replace("[Spiral]", "[maskers.Spiral]"), {"maskers.py": SPIRAL}),
        (HEAD + HOOK.replace("    return", "    from .maskers import Spiral\n    return"), {"maskers.py": SPIRAL}),
        ("from .hooks import mim_maskers\n", {"hooks.py": HEAD + SPIRAL + HOOK}),
    ],
)
def test_a_class_is_found_however_the_plugin_spells_it(install_plugin, source, files):
    reading = read(install_plugin, source, files=files)
    assert reading.offers == (("masker", "spiral", "Hide along a spiral."),)
    assert not reading.unread
    assert "mim_plugin_spiral" not in sys.modules


def test_a_name_is_inherited_from_a_base_in_another_module(install_plugin):
    source = HEAD + "from .base import Base\nclass Spiral(Base):\n    '''Mine.'''\n" + HOOK
    reading = read(install_plugin, source, files={"base.py": HEAD + SPIRAL.replace("Spiral", "Base")})
    assert reading.offers == (("masker", "spiral", "Mine."),)


@pytest.mark.parametrize(
    "source",
    [
        HEAD + SPIRAL + HOOK.replace("[Spiral]", "list(make())"),
        HEAD + SPIRAL.replace("'spiral'", "'spi' + 'ral'") + HOOK,
        HEAD + "from nowhere import Spiral\n" + HOOK,
        HEAD + "Spiral = type('Spiral', (Masker,), {})\n" + HOOK,
        HEAD + "class A(B):\n    pass\nclass B(A):\n    pass\n" + HOOK.replace("Spiral", "A"),
        HEAD + "from mim_plugin_spiral import Spiral\n" + HOOK,
        HEAD + "from .hooks import *\n",
        HEAD + SPIRAL + HOOK + "    return []\n",
    ],
)
def test_what_only_running_can_tell_is_reported_as_unread(install_plugin, source):
    reading = read(install_plugin, source, files={"hooks.py": ""})
    assert "masker" in reading.unread
    assert reading.offers == ()


def test_events_and_the_api_version_are_read(install_plugin):
    reading = read(
        install_plugin, "requires_api = '7'\n" + HEAD + "@hookimpl\ndef mim_run_started(run):\n    print(run)\n"
    )
    assert reading.events == ("mim_run_started",)
    assert reading.requires_api == "7"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "syntax error at .*__init__.py:1: "),
        ("x = '\0'\n", "null bytes"),
        (
            HEAD + SPIRAL + HOOK.replace("mim_maskers", "mim_masker"),
            "there is no hook 'mim_masker', did you mean 'mim_maskers'",
        ),
        (HEAD + SPIRAL + HOOK.replace("@hookimpl\n", ""), "function 'mim_maskers' lacks the decorator @hookimpl"),
        ("(" * 5000 + ")" * 5000, "cannot be read|syntax error"),
    ],
)
def test_faults_that_the_source_shows(install_plugin, source, message):
    with pytest.raises(Unreadable, match=message):
        read(install_plugin, source)


def test_an_invalid_escape_in_a_plugin_warns_nobody(install_plugin):
    assert read(install_plugin, HEAD + SPIRAL + HOOK + "PATTERN = '\\d'\n").offers


def test_a_missing_module_is_unreadable():
    for module in ("mim_plugin_nowhere", "mim_framework.nowhere", "json.decoder.deeper"):
        with pytest.raises(Unreadable, match="not found"):
            locate(module)


def test_a_compiled_plugin_must_be_imported(monkeypatch):
    monkeypatch.setattr("mim_framework.registry.static_reader.locate", lambda module: Path("plugin.so"))
    assert "masker" in read_plugin("compiled").unread


def test_constants_are_read_from_the_contract():
    assert read_constant("mim_framework.contract.components", "API_VERSION") == "2"
    assert read_constant("mim_framework.contract.components", "NOTHING") is None
    assert {"mim_maskers", "mim_run_finished"} <= set(HOOKS)
