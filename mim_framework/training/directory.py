"""The directory of a run: made or checked, locked, and what is written down about it."""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mim_framework.base.errors import MimError, RecipeError
from mim_framework.base.files import content_of, replace_file
from mim_framework.base.text import plain_logger, without_secrets
from mim_framework.checkpoints.checkpoint import list_checkpoints, step_of
from mim_framework.contract.world import World
from mim_framework.recipe.draft import load_written
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry

logger = plain_logger(__name__)

EXPLOSIONS = "explosions.json"
"""Name of the record of losses that exploded."""

MAY_CHANGE = (
    "description", "output_dir", "init", "data.workers", "data.prefetch_factor", "data.source.root",
    "data.source.retries", "data.source.timeout", "data.source.storage_options",
    "data.eval_source", "data.eval_train_source", "data.max_broken", "data.accept_changed_source", "data.tokens",
    "train.batch_size", "train.device", "train.precision", "train.distributed", "train.compile",
    "train.max_nonfinite_steps", "train.on_explosion", "train.max_rewinds", "train.on_save_error",
    "train.step_timeout", "log", "checkpoint", "evaluate", "published",
)  # fmt: skip
"""Keys that a resumed run may change: none of them changes what is learned, beyond rounding."""


CHANGED_BY_WORD = ("train.epochs", "train.steps", "optim", "optimizers")
"""Keys that a resumed run may change by an explicit word. What they decide follows the new recipe from the step where
the run goes on: schedules are functions of the step and of the length of the run, so that a cosine over more epochs
stands higher at the same step."""

NEVER_CHANGED = ("type", "parameters", "options", "layer_decay", "layer_decay_of", "multipliers")
"""Keys of an optimizer that decide what its state and its groups are."""

NO_LOCKS = "this {} has no file locks: do not start a second run in {}"


def prepare_directory(
    recipe: Recipe, registry: Registry, world: World, *, fresh: bool, allow_change: Sequence[str] = ()
) -> Path:
    """Create the run directory with `recipe.yaml` and `environment.json`, or check that an existing one is this run's.

    Args:
        allow_change: keys that may change although they change what is learned; the change is recorded.

    Raises:
        RecipeError: if the directory holds a run of another recipe, or any run and `fresh` is set, or if a key cannot
            be changed in a run.
        MimError: if it cannot be written.
    """
    directory = run_directory(recipe)
    written = directory / "recipe.yaml"
    check_changeable(allow_change)

    def prepare() -> None:
        begun = written.exists() and list_checkpoints(directory / "checkpoints")
        if begun:
            if fresh:
                raise RecipeError(
                    f"{directory} holds a run already, and --fresh refuses to go on with it; choose another name"
                )
            changes = changed_values(load_written(written, registry), recipe)
            if refused := [key for key in changes if not _among(key, allow_change)]:
                listed = "; ".join(f"{key}: {changes[key][0]} -> {changes[key][1]}" for key in refused)
                by_word = [key for key in refused if _by_word(key)]
                word = f", add {' '.join(f'--allow-change {key}' for key in by_word)}" if by_word == refused else ""
                raise RecipeError(
                    f"{directory} holds a run of another recipe, which cannot be resumed: {listed}. "
                    f"Undo the change{word}, or give the run another name: name=..."
                )
        with _writing(recipe):
            directory.mkdir(parents=True, exist_ok=True)
            if not begun and not _is_of(written, recipe, registry):
                (directory / EXPLOSIONS).unlink(missing_ok=True)  # those of another run that never was saved
            step = _newest_step(directory)
            if begun and changes:
                entry = {"at": _now(), "step": step, "changed": {key: list(both) for key, both in changes.items()}}
                _append_record(directory / "changes.json", entry)
            replace_file(written, dump_recipe(recipe).encode())
            facts = {"at": _now(), "step": step, **environment(registry, world)}
            earlier = _append_record(directory / "environment.json", facts)
        if begun and earlier and (differing := changed_versions(earlier[-1], facts)):
            logger.warning(
                f"{directory} goes on under other versions: {'; '.join(differing)}. Up to step {step} it is what it "
                "was; from there on it need not be, bit for bit, what it would have become"
            )

    world.on_main(prepare)
    return directory


def check_changeable(keys: Sequence[str]) -> None:
    """
    Raises:
        RecipeError: if one of the keys cannot be changed in a run, whatever the word.
    """
    if wrong := [key for key in keys if not _by_word(key)]:
        raise RecipeError(
            f"--allow-change {wrong[0]}: a run cannot change it and go on; what can be changed so: the length "
            "(train.epochs, train.steps) and the numbers of its optimizers (optim.lr, optim.clip_grad_norm, ...)"
        )


def _by_word(key: str) -> bool:
    return _among(key, CHANGED_BY_WORD) and not any(part in NEVER_CHANGED for part in key.split("."))


def _among(key: str, allowed: Sequence[str]) -> bool:
    return any(key == each or key.startswith(each + ".") for each in allowed)


def _newest_step(directory: Path) -> int:
    found = list_checkpoints(directory / "checkpoints")
    return step_of(found[-1]) if found else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The entries of a record such as `environment.json`; of one that cannot be read, none."""
    try:
        content = json.loads(content_of(path))
    except (OSError, ValueError, RecursionError):
        return []
    entries = content if isinstance(content, list) else [content]  # earlier versions kept the last start alone
    return [entry for entry in entries if isinstance(entry, dict)]


def _append_record(path: Path, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Add an entry; returns those before it."""
    earlier = read_records(path)
    write_records(path, [*earlier, entry])
    return earlier


def write_records(path: Path, entries: list[dict[str, Any]]) -> None:
    """What `read_records` reads, in the place of what was there."""
    replace_file(path, (json.dumps(entries, indent=1) + "\n").encode())


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has another version than at an earlier start, as 'torch 2.14.0 -> 2.14.1'."""
    found = []
    for kind in ("packages", "plugins"):
        old, new = before.get(kind), now[kind]
        for name in sorted(old.keys() | new.keys()) if isinstance(old, dict) else ():
            if old.get(name) != new.get(name):
                found.append(f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    return found


def _is_of(written: Path, recipe: Recipe, registry: Registry) -> bool:
    """Whether the recipe in a run directory is this one."""
    try:
        return written.exists() and not changed_keys(load_written(written, registry), recipe)
    except RecipeError:
        return False


def run_directory(recipe: Recipe) -> Path:
    """Where the recipe's run lives."""
    return Path(recipe.output_dir) / recipe.name


_RUNS_OF_PROCESS: set[tuple[int, Path]] = set()
"""Process and directory of the runs in threads of this process, which share its file locks."""
_ONE_THREAD = threading.Lock()


@contextmanager
def sole_run(recipe: Recipe, world: World) -> Iterator[None]:
    """Keep other processes and threads from training in the same run directory, by a lock on its `run.lock`.

    The operating system gives the lock back when the process ends, however it ends.

    Raises:
        MimError: if another run has the directory, or it cannot be written.
    """
    locks = world.on_main(lambda: _locks(recipe))
    try:
        yield
    finally:
        if locks is not None:
            locks.close()


def _locks(recipe: Recipe) -> ExitStack:
    """What keeps the directory for this run until it is closed."""
    directory = run_directory(recipe)
    here = (os.getpid(), directory.resolve())
    with ExitStack() as stack:
        with _ONE_THREAD:
            if here in _RUNS_OF_PROCESS:
                raise MimError(
                    f"{directory} is in use by another run of this process; wait until it has ended, or give this one "
                    "another name: name=..."
                )
            _RUNS_OF_PROCESS.add(here)
        stack.callback(_RUNS_OF_PROCESS.discard, here)
        if (file := _lock(recipe)) is not None:
            stack.callback(os.close, file)
        return stack.pop_all()


def _lock(recipe: Recipe) -> int | None:
    """The descriptor of the locked file, None where there are no locks.

    Not `flock`, which the data workers would inherit and hold on to.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        logger.warning(NO_LOCKS.format("system", run_directory(recipe)))
        return None
    path = run_directory(recipe) / "run.lock"
    with _writing(recipe):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(file, 1000).decode(errors="replace").strip()
            os.close(file)
            raise MimError(
                f"{path.parent} is in use by another run ({holder}); wait until it has ended, or give this one another "
                f"name: name=... If that process is no more, which some file systems notice late, delete {path}"
            ) from None
        logger.warning(NO_LOCKS.format("file system", path.parent))
        return file
    with _writing(recipe):
        os.ftruncate(file, 0)
        os.write(file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


@contextmanager
def _writing(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or run_directory(recipe)
        raise MimError(f"output_dir {recipe.output_dir}: cannot write {where}: {error.strerror}") from error


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Keys whose change would make the resumed run another run, as 'key: old -> new'."""
    return [f"{key}: {before} -> {after}" for key, (before, after) in changed_values(old, new).items()]


def changed_values(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys whose change would make the resumed run another run, with both values."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _among(key, MAY_CHANGE)
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Without the secrets of URLs, which are not written down and so cannot be compared."""
    if not isinstance(value, dict):
        return {prefix: without_secrets(value) if isinstance(value, str) else value}
    return {k: v for key, child in value.items() for k, v in _flat(child, f"{prefix}.{key}" if prefix else key).items()}


def environment(registry: Registry, world: World) -> dict[str, Any]:
    """Versions and hardware, for the record. Names of environment variables, never their values."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ["mim-framework", "torch", "torchvision", "timm", "pydantic", "torchdata", "Pillow", "torchcodec"]
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": found,
        "plugins": {plugin.name: plugin.version for plugin in registry.plugins()},
        "devices": gpus or [platform.processor() or "cpu"],
        "world_size": world.size,
        "cpu_count": os.cpu_count(),
        "arguments": [without_secrets(argument) for argument in sys.argv],
    }
