"""Settings that all tests share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from clean_install import build_wheels, clean_environment

torch.set_num_threads(1)  # so that tests can fork ranks: OpenMP threads do not survive a fork


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--figures", metavar="FILE", help="write what the fault tests measured to a JSON file")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow") and not config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if item.get_closest_marker("fault") and "fault" not in (config.getoption("-m") or ""):
            item.add_marker(pytest.mark.skip(reason="a fault test; run with -m fault"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels of the core and all plugins, by package name with `_`."""
    return build_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """A new environment without any package of ours, but with what they need."""
    return clean_environment(tmp_path)


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Installs a made-up distribution with one plugin: `install_plugin("spiral", source)`; returns its site folder."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(
        name: str,
        source: str,
        *,
        distribution: str = "",
        module: str = "",
        entry_points: str = "",
        requires: tuple[str, ...] = (),
        files: Mapping[str, str] | None = None,
    ) -> Path:
        distribution = distribution or f"mim-plugin-{name}"
        module = module or f"mim_plugin_{name}"
        package = site / module
        package.mkdir()
        for file, text in {"__init__.py": source, **(files or {})}.items():
            (package / file).parent.mkdir(exist_ok=True)
            (package / file).write_text(text)
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        required = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n{required}")
        (info / "entry_points.txt").write_text(entry_points or f"[mim_framework]\n{name} = {module}\n")
        importlib.invalidate_caches()
        return site

    yield install
    for module in [each for each in sys.modules if each.startswith("mim_plugin_")]:
        if site.as_posix() in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]
