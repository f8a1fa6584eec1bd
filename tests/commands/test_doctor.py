"""What `mim doctor` says about an environment."""

from __future__ import annotations

from importlib import metadata

import pytest

from mim_framework import __version__
from mim_framework.commands import doctor
from mim_framework.commands.doctor import Finding, examine
from mim_framework.registry.registry import Registry


def by_topic(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


@pytest.mark.slow
def test_a_healthy_environment_is_told_part_by_part(install_plugin):
    install_plugin("spiral", "")
    install_plugin("broken", "import surely_not_there\n")
    findings = by_topic(examine(Registry(only=["spiral", "broken"])))
    assert findings["mim-framework"] == Finding("mim-framework", __version__)
    assert findings["torch and torchvision"] == Finding("torch and torchvision", "fit together")
    assert "cores" in findings["cpu"].text
    assert findings["cpu"].ok
    assert "libjpeg" in findings["Pillow decodes with"].text
    assert findings["plugin spiral"].text.startswith("1.2, loads in 0.")
    assert findings["built-in components"].ok
    assert not findings["plugin broken"].ok
    assert "needs the library 'surely_not_there'" in findings["plugin broken"].text
    assert "free in" in findings["disk"].text


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("surely-not-there",))
    text = "not installed; pip install surely-not-there"
    assert Finding("surely-not-there", text, False) in list(doctor._versions())


@pytest.mark.parametrize("line", ["torch==2.0.1", "torch (==2.0.1)"])
def test_a_torchvision_for_another_torch_is_named(monkeypatch, line):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", line])
    [finding] = doctor._torchvision_pair()
    assert not finding.ok
    assert finding.text.startswith("torchvision is built for torch 2.0.1, not ")
    assert "pip install --upgrade --force-reinstall torch==" in finding.text


def test_another_package_with_a_command_mim_is_named(install_plugin):
    assert list(doctor._command_clash()) == []
    install_plugin("none", "", distribution="openmim", entry_points="[console_scripts]\nmim = mim.cli:cli\n")
    [finding] = doctor._command_clash()
    assert not finding.ok
    assert finding.text == (
        "package 'openmim' also brings a command `mim`; type `mim-framework` (or python -m mim_framework) instead"
    )


def test_little_disk_space_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_DISK", 10**30)
    [finding] = doctor._disk()
    assert not finding.ok
    assert finding.text.endswith("little for checkpoints")


@pytest.mark.slow
def test_a_check_that_fails_does_not_hide_the_others(monkeypatch):
    def broken():
        raise OSError("no such library")
        yield

    monkeypatch.setattr(doctor, "_decoders", broken)
    findings = by_topic(examine(Registry(only=())))
    assert findings["decoders"] == Finding("decoders", "cannot be examined: OSError: no such library", False)
    assert "disk" in findings
