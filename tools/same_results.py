"""Proves that two checkouts compute the same to the last bit: short runs of all quickstarts, and the parity tests.

    python tools/same_results.py BEFORE AFTER

Both are folders, such as `git worktree add` makes. Modules and tests may move and be renamed in between, as they are
not what is compared: of a quickstart, it is the metrics of every step and all tensors of the last checkpoint, by name;
of the parity tests, every tensor they compare and every parameter and gradient of an optimizer step, as a multiset per
case. What a parity test computes without tensors, such as a schedule, is not seen here.

Start at `main`. pytest loads this file too, as the plugin that records: see `Recorder`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import as_installed
import pytest
import torch
import yaml
from as_installed import describe, packages
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

SETTINGS = (
    "train.epochs=null", "train.device=cpu", "train.precision=float32", "data.workers=0",
    "checkpoint={every_epochs: 0}",
    "log={every_steps: 1, tensorboard: false, images_every_epochs: 0, num_images: 0}",
)  # fmt: skip
STAGE_ONE = ("train.steps=22", "train.total_batch_size=16")
"""So long trains the first of two stages: enough for every code to begin somewhere."""
EVALUATION_OFF = ("evaluate=[]", "evaluate.knn=null")
"""A checkout understands one of them: `evaluate` was a section before it became a list."""
METRICS = re.compile(r"(^|/)(loss|grad_norm|lr)")
"""Names of the metrics that are compared; the others measure time and memory, or follow from the weights."""
PARITY = "parity"
WITHOUT_CASE = "tests without a case"


class Failed(Exception):
    """A command of a checkout did not do what it should."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a checkout")
    parser.add_argument("after", type=Path, metavar="AFTER", help="another one")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of a quickstart (default: 50)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some quickstarts, or '{PARITY}' for those tests")
    arguments = parser.parse_args()
    for root in (arguments.before, arguments.after):
        if not (root / "pyproject.toml").is_file():
            parser.error(f"{root} is no checkout: it has no pyproject.toml")
    with tempfile.TemporaryDirectory(prefix="same_results_") as scratch:
        checkouts = [
            Checkout(label, getattr(arguments, label).resolve(), Path(scratch) / label) for label in ("before", "after")
        ]
        names = list(dict.fromkeys(name for checkout in checkouts for name in checkout.quickstarts()))
        if unknown := set(arguments.only or ()) - {*names, PARITY}:
            parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join([*names, PARITY])}")
        for checkout in checkouts:
            checkout.prepare()
        wanted = [name for name in [*names, PARITY] if not arguments.only or name in arguments.only]
        same = [compare_quickstart(name, *checkouts, arguments.steps) for name in wanted if name != PARITY]
        same += compare_parity(*checkouts) if PARITY in wanted else []
    return 0 if same and all(same) else 1


def tell(name: str, compared: str, difference: str) -> bool:
    """Print the line of a comparison; returns whether there is no difference."""
    print(f"{name:28} {compared:>40}  {f'DIFFERENT: {difference}' if difference else 'same'}", flush=True)
    return not difference


# --- a checkout, as if it were installed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkout:
    """A working tree, and a folder outside of it for what it writes."""

    label: str
    root: Path
    scratch: Path

    @property
    def packages(self) -> list[Path]:
        """Folders from which its packages are imported."""
        return packages(self.root)

    @property
    def records(self) -> Path:
        """File of the comparisons of its parity tests."""
        return self.scratch / "comparisons.json"

    @property
    def comparisons(self) -> list[Comparison]:
        """What its parity tests have compared; none before they run."""
        return [Comparison(**each) for each in json.loads(self.records.read_text())] if self.records.exists() else []

    @property
    def site(self) -> Path:
        """Folder of the metadata that an installation would have, and of this file as a plugin of pytest."""
        return self.scratch / "site"

    def quickstarts(self) -> dict[str, Path]:
        """The shipped recipes whose names end in `quickstart`; that of the template for new plugins is none."""
        found = [
            path
            for folder in self.packages
            for path in folder.glob("mim_*/**/recipes/*quickstart.yaml")
            if "template" not in path.relative_to(folder).parts
        ]
        return {path.stem: path for path in found}

    def prepare(self) -> None:
        """Describe its distributions, whatever is installed here, and make sure that its own modules are imported.

        Raises:
            Failed: if another installation comes first.
        """
        describe(self.root, self.site)
        for module in (__file__, as_installed.__file__):
            shutil.copy(module, self.site)
        names = [path.parent.name for folder in self.packages for path in folder.glob("mim_*/__init__.py")]
        ask = "import sys, importlib.util as u; print(*(u.find_spec(name).origin for name in sys.argv[1:]), sep='\\n')"
        origins = self.python("-c", ask, *names).stdout.splitlines()
        foreign = [origin for origin in origins if not Path(origin).resolve().is_relative_to(self.root)]
        if foreign or not origins:
            raise Failed(f"{self.label}: {', '.join(foreign) or 'nothing'} would be imported, not {self.root}")

    def python(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run Python with the packages of this checkout, on one thread of the CPU."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, [*self.packages, self.site])),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd or self.scratch, env=environment, capture_output=True, text=True)


def files_of_tests(root: Path, pattern: str) -> list[Path]:
    """Files beside the tests of a checkout, of the core and of the plugins."""
    return sorted(path for folder in ("tests", "plugins") for path in root.glob(f"{folder}/**/{pattern}"))


def end_of(result: subprocess.CompletedProcess[str]) -> str:
    """The status of a command, and the last lines that it printed."""
    lines = [text.strip().splitlines()[-1] for text in (result.stdout, result.stderr) if text.strip()]
    return f"status {result.returncode}: {'; '.join(lines)}"


# --- quickstarts -----------------------------------------------------------------------------------------------------


def compare_quickstart(name: str, before: Checkout, after: Checkout, steps: int) -> bool:
    found: list[dict[str, str]] = []
    for checkout in (before, after):
        try:
            found.append(results_of(train_quickstart(checkout, name, steps)))
        except Failed as error:
            return tell(name, "", f"{checkout.label}: {error}")
    num_metrics = sum(key.startswith("step ") for key in found[0])
    compared = f"{num_metrics:,} metrics, {len(found[0]) - num_metrics:,} tensors"
    return tell(name, compared, difference_by_name(*found))


def train_quickstart(checkout: Checkout, name: str, steps: int) -> Path:
    """Returns the run directory. The first of two stages is trained by the same checkout.

    Raises:
        Failed: if there is no such recipe, or no run comes of it.
    """
    recipe, folder = checkout.quickstarts().get(name), checkout.scratch / name
    if recipe is None:
        raise Failed("no such recipe")
    overrides = [f"train.steps={steps}"]
    if tokenizer := yaml.safe_load(recipe.read_text()).get("tokenizer"):
        overrides.append(f"tokenizer={train(checkout, Path(tokenizer).name, folder / 'tokenizer', *STAGE_ONE)}")
    return train(checkout, name, folder / "run", *overrides)


def train(checkout: Checkout, recipe: str, folder: Path, *overrides: str) -> Path:
    errors = []
    for off in EVALUATION_OFF:
        settings = [*SETTINGS, *overrides, off, f"output_dir={folder}"]
        result = checkout.python("-m", "mim_framework", "run", recipe, *settings)
        if result.returncode == 0:
            return next(folder.glob("*/metrics.jsonl")).parent
        errors.append(f"{recipe} with {off}: {end_of(result)}")
    raise Failed("; ".join(errors))


def results_of(run: Path) -> dict[str, str]:
    """Every metric of every step as it is written, and a hash of every tensor of the last checkpoint.

    Raises:
        Failed: if there is no checkpoint.
    """
    found = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        metrics = {key: value for key, value in line.items() if METRICS.search(key)}
        found |= {f"step {line['step']} {key}": repr(value) for key, value in metrics.items()}
    last = max(run.glob("checkpoints/step_*"), default=None)
    if last is None:
        raise Failed(f"the run of {run.name} left no checkpoint")
    for path in sorted(last.glob("*.safetensors")):
        found |= {f"{path.stem}: {name}": hash_of(tensor) for name, tensor in load_file(path).items()}
    return found


def difference_by_name(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The first difference in words, empty if there is none."""
    names = [*before, *(name for name in after if name not in before)]
    differing = [name for name in names if before.get(name) != after.get(name)]
    if not names:
        return "nothing was compared"
    if not differing:
        return ""
    was, now = (found.get(differing[0], "missing") for found in (before, after))
    return f"{len(differing):,} of {len(names):,}, first {differing[0]}: {was:.24} before, {now:.24} after"


def hash_of(tensor: Tensor) -> str:
    """SHA-256 of type, shape and bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content.tobytes()).hexdigest()


# --- parity tests ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What a parity test compared at once: usually a tensor of ours and an official one."""

    case: str
    """Stem of the file of official numbers."""
    label: str
    """For a reader; tests may be renamed."""
    hash: str


def compare_parity(before: Checkout, after: Checkout) -> list[bool]:
    """One line for every case."""
    found, same = [], []
    for checkout in (before, after):
        result = run_parity_tests(checkout)
        if result.returncode:
            same.append(tell(f"{PARITY} tests", "", f"{checkout.label}: {end_of(result)}"))
        found.append(by_case(checkout.comparisons))
    for case in sorted(found[0].keys() | found[1].keys()):
        was, now = (cases.get(case, []) for cases in found)
        same.append(tell(f"{PARITY} {case}", f"{len(was):,} comparisons", difference_by_count(was, now)))
    return same


def run_parity_tests(checkout: Checkout) -> subprocess.CompletedProcess[str]:
    """Run all files of tests that have `parity` in their path, slow tests too; what they compare is recorded."""
    root = checkout.root
    tests = [path for path in files_of_tests(root, "test_*.py") if PARITY in str(path.relative_to(root))]
    recorder = ["-p", "same_results", f"--comparisons={checkout.records}"]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *recorder, *(tests or ["no parity tests"])]
    result = checkout.python(*command, "--slow", cwd=root)
    if result.returncode == pytest.ExitCode.USAGE_ERROR:  # there may be no such option
        result = checkout.python(*command, cwd=root)
    return result


def by_case(comparisons: list[Comparison]) -> dict[str, list[Comparison]]:
    cases: dict[str, list[Comparison]] = {}
    for each in comparisons:
        cases.setdefault(each.case, []).append(each)
    return cases


def difference_by_count(before: list[Comparison], after: list[Comparison]) -> str:
    """The first difference of two multisets in words, empty if there is none."""
    if not before and not after:
        return "nothing was compared"
    was, now = (Counter(each.hash for each in comparisons) for comparisons in (before, after))
    lost, added = was - now, now - was
    differing = [each for each in (*before, *after) if each.hash in lost or each.hash in added]
    if not differing:
        return ""
    first = min(differing, key=lambda each: min(was[each.hash], now[each.hash]))  # gone, or compared less often
    counts = f"{lost.total():,} only before and {added.total():,} only after"
    return f"{counts}, first {first.label}: {was[first.hash]} times before, {now[first.hash]} after"


# --- inside pytest ---------------------------------------------------------------------------------------------------

COMPARING = (
    (Tensor, "__sub__"), (Tensor, "__rsub__"), (Tensor, "__eq__"), (Tensor, "item"), (Tensor, "tolist"),
    (torch, "equal"), (torch, "allclose"), (torch.testing, "assert_close"),
)  # fmt: skip
"""What a test compares tensors with, or takes numbers out of them to compare those."""
TEST_CODE = re.compile(rf"(^|[/_-])(test|conftest|harness|{PARITY})")
"""Paths inside a checkout that hold tests and their helpers."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--comparisons", type=Path, help="file for all that tests compare, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--comparisons"):
        config.pluginmanager.register(Recorder(path, Path.cwd()))


class Recorder:
    """A plugin of pytest that hashes every tensor that is compared in a test's own code, and those of optimizers.

    It is there before tests are collected, so that they cannot import what it replaces.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root
        self.cases = {file.stem for file in files_of_tests(root, "*.safetensors")}
        self.case = self.test = ""
        self.comparisons: list[Comparison] = []
        for owner, name in COMPARING:
            setattr(owner, name, self.recorded(getattr(owner, name)))
        register_optimizer_step_post_hook(self.after_step)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        named = [case for case in self.cases if case in item.name]
        self.case, self.test = max(named, key=len, default=WITHOUT_CASE), item.name
        return (yield)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps([asdict(each) for each in self.comparisons]))

    def recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which from now on records the tensors that tests call it with."""

        @wraps(function)
        def recording(*args: Any, **kwargs: Any) -> Any:
            if is_test_code(sys._getframe(1).f_code.co_filename, self.root):
                self.record(function.__name__, [args, kwargs])
            return function(*args, **kwargs)

        return recording

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.record("parameter and gradient of a step", [parameter, parameter.grad])

    def record(self, what: str, values: Any) -> None:
        """Note tensors that belong together; in which order does not count."""
        tensors = list(tensors_in(values))
        if tensors:
            label = f"{self.test} {what} {' '.join(str(tuple(tensor.shape)) for tensor in tensors)}"
            together = hashlib.sha256("".join(sorted(map(hash_of, tensors))).encode()).hexdigest()
            self.comparisons.append(Comparison(self.case, label, together))


@cache
def is_test_code(file: str, root: Path) -> bool:
    path = Path(file)
    return path.is_relative_to(root) and bool(TEST_CODE.search(path.relative_to(root).as_posix()))


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, list | tuple):
        for each in values:
            yield from tensors_in(each)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(str(error))
