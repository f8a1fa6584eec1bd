"""Inputs that somebody damaged or made to do harm: a sentence, never a traceback, never a minute, never code."""

from __future__ import annotations

from pathlib import Path

import mutation
import pytest
import tiny
import yaml

from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

NUM_RECIPES, NUM_FILES, NUM_OVERRIDES = 2000, 500, 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> mutation.Runs:
    return mutation.Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [info.path.read_text() for info in Registry().recipes()]


KEYS = ["name", "encoder", "encoder.depth", "data", "data.source.root", "train.steps", "optim.lr", "evaluate", "heads"]


def check_recipes(seeds: range, folder: Path, registry: Registry, texts: list[str]) -> list[mutation.Outcome]:
    file = folder / "mutated.yaml"
    found = []
    with mutation.little_memory():
        for seed in seeds:
            file.write_bytes(mutation.mutated_recipe(seed, texts))
            source = ("data.source=digits",) if seed % 2 else ()
            found.append(mutation.outcome(lambda source=source: mutation.check_recipe(file, registry, source)))
    return found


def check_files(seeds: range, runs: mutation.Runs) -> list[mutation.Outcome]:
    with mutation.little_memory():
        return [mutation.outcome(runs.damaged(seed)[1]) for seed in seeds]


def check_overrides(seeds: range, folder: Path, registry: Registry) -> list[mutation.Outcome]:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny.RECIPE))
    changes = [mutation.mutated_override(seed, KEYS) for seed in seeds]
    return [mutation.outcome(lambda each=each: mutation.check_recipe(file, registry, (each,))) for each in changes]


def assert_harmless(outcomes: list[mutation.Outcome]) -> None:
    assert [each.traceback for each in outcomes if each.traceback] == []
    assert max(each.seconds for each in outcomes) < mutation.SECONDS
    assert max(len(each.refused) for each in outcomes) < 10_000
    assert not any("\x1b" in each.refused or "secret@" in each.refused for each in outcomes)


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_hostile_recipes_ends_in_sentences(tmp_path: Path, texts: list[str]) -> None:
    file = tmp_path / "mutated.yaml"
    outcomes = []
    for seed in range(20):
        file.write_bytes(mutation.mutated_recipe(seed, texts))
        outcomes.append(mutation.outcome(lambda: load_recipe(file, (), Registry())))
    assert_harmless(outcomes)
    assert sum(bool(each.refused) for each in outcomes) > 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_damaged_files_ends_in_sentences(runs: mutation.Runs) -> None:
    assert_harmless(check_files(range(40), runs))
    assert not runs.canary.exists()


@pytest.mark.fault(row="20")
@pytest.mark.filterwarnings("ignore")
def test_recipes_that_were_mutated(tmp_path: Path, texts: list[str], figure) -> None:
    outcomes = check_recipes(range(NUM_RECIPES), tmp_path, Registry(), texts)
    slowest = max(each.seconds for each in outcomes)
    figure(f"{sum(not each.traceback for each in outcomes)}/{NUM_RECIPES} without a traceback, slowest {slowest:.1f} s")
    assert_harmless(outcomes)


@pytest.mark.fault(row="18")
@pytest.mark.filterwarnings("ignore")
def test_files_that_were_damaged_or_do_harm(runs: mutation.Runs, figure) -> None:
    outcomes = check_files(range(NUM_FILES), runs)
    ran = int(runs.canary.exists())
    figure(f"{sum(not each.traceback for each in outcomes)}/{NUM_FILES} without a traceback, code was run {ran} times")
    assert_harmless(outcomes)
    assert not ran


@pytest.mark.fault(row="19")
@pytest.mark.filterwarnings("ignore")
def test_overrides_that_were_mutated(tmp_path: Path, figure) -> None:
    outcomes = check_overrides(range(NUM_OVERRIDES), tmp_path, Registry())
    figure(f"{sum(not each.traceback for each in outcomes)}/{NUM_OVERRIDES} without a traceback")
    assert_harmless(outcomes)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in ["ab", "bc", "cd"]
)
HOSTILE_YAML = {
    "python object": "name: !!python/object/apply:os.system ['touch CANARY']\n",
    "python name": "name: !!python/name:os.system\n",
    "alias bomb": BOMB,
    "self reference": "a: &a [*a]\n",
    "20,000 lists deep": "a: " + "[" * 20_000,
    "20,000 maps deep": "a: " + "{a: " * 20_000,
    "3,000 indents deep": "".join(" " * i + "a:\n" for i in range(3000)),
    "100,000 keys": "".join(f"k{i}: 1\n" for i in range(100_000)),
    "15,000 keys": "".join(f"k{i}: 1\n" for i in range(15_000)),
    "a key of 500 kB": "k" * 500_000 + ": 1\n",
    "20 MB": "a: " + "x" * 20_000_000,
    "NUL": "name: a\0b\n",
    "escape sequence": 'name: "\\u001b[31mred"\n',
    "direction mark": "name: \u202eabc\n",
    "lone surrogate": b"name: \xed\xa0\x80\n",
    "UTF-16": "name: a\n".encode("utf-16"),
    "latin-1": b"name: caf\xe9\n",
    "huge integer": "seed: " + "9" * 50_000 + "\n",
    "huge float": "seed: 1e" + "9" * 500 + "\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "key that is a list": "? [a, b]\n: c\n",
    "merge": "a: {<<: {b: 1}}\n",
    "nothing": "",
}


@pytest.mark.fault(row="19")
@pytest.mark.parametrize("what", HOSTILE_YAML)
def test_hostile_yaml_is_refused_in_a_sentence(what: str, tmp_path: Path, figure) -> None:
    text = HOSTILE_YAML[what]
    file = tmp_path / "hostile.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.replace("CANARY", str(tmp_path / "canary")).encode())
    found = mutation.outcome(lambda: mutation.check_recipe(file, Registry()))
    figure(f"{what}: {found.seconds:.1f} s")
    assert found.refused
    assert_harmless([found])
    assert not (tmp_path / "canary").exists()
