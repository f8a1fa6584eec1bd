"""Figures of the fault tests, collected into the file that `--figures` names; `docs/reliability.md` is made of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch

FIGURES: list[dict[str, str]] = []


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes what a fault test measured, under the row of its marker and the test's name."""
    mark = request.node.get_closest_marker("fault")
    row = mark.kwargs["row"] if mark else ""
    name = request.node.originalname.removeprefix("test_").replace("_", " ")
    return lambda text: FIGURES.append({"row": row, "test": name, "figure": text})


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
