"""Settings that all tests share."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date
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
        only_there = item.path.parent.name == "faults" and item.get_closest_marker("fault")
        if only_there and "fault" not in (config.getoption("-m") or ""):
            item.add_marker(pytest.mark.skip(reason="a fault test; run with -m fault"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


# --- figures of the fault tests, of which docs/reliability.md is made ------------------------------------------------

FIGURES: list[dict[str, str]] = []


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what a fault test measured, under the row of its marker or another, and the test's name."""
    row = request.node.get_closest_marker("fault").kwargs["row"]
    name = request.node.originalname.removeprefix("test_").replace("_", " ")
    return lambda text, row=row: FIGURES.append({"row": row, "test": name, "figure": text})


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--figures")
    if file and FIGURES:
        facts = {
            "date": date.today().isoformat(),
            "machine": f"{platform.system()}, {torch.get_num_threads()} thread, Python {platform.python_version()}, "
            f"torch {torch.__version__}",
            "failed": session.testsfailed,
            "figures": FIGURES,
        }
        Path(file).write_text(json.dumps(facts, indent=1) + "\n")


# --- packages and plugins --------------------------------------------------------------------------------------------


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
