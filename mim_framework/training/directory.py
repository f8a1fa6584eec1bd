"""The directory of a run: made or checked, locked, and what is written down about it."""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mim_framework.base.errors import MimError, RecipeError
from mim_framework.base.files import replace_file
from mim_framework.checkpoints.checkpoint import list_checkpoints
from mim_framework.contract.world import World
from mim_framework.recipe.draft import load_written
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry

EXPLOSIONS = "explosions.json"
"""Name of the record of losses that exploded."""

MAY_CHANGE = (
    "description", "output_dir", "init", "data.workers", "data.prefetch_factor", "data.source.root", "data.max_broken",
    "data.accept_changed_source", "data.tokens", "train.batch_size", "train.device", "train.precision",
    "train.distributed", "train.compile", "train.max_nonfinite_steps", "train.on_explosion", "train.max_rewinds",
    "train.on_save_error",
    "train.step_timeout", "log", "checkpoint", "evaluate",
)  # fmt: skip
"""Keys that a resumed run may change: none of them changes what is learned, beyond rounding."""


def prepare_directory(recipe: Recipe, registry: Registry, world: World, *, fresh: bool) -> Path:
    """Create the run directory with `recipe.yaml` and `environment.json`, or check that an existing one is this run's.

    Raises:
        RecipeError: if the directory holds a run of another recipe, or any run and `fresh` is set.
        MimError: if it cannot be written.
    """
    directory = run_directory(recipe)
    written = directory / "recipe.yaml"

    def prepare() -> None:
        begun = written.exists() and list_checkpoints(directory / "checkpoints")
        if begun:
            if fresh:
                raise RecipeError(
                    f"{directory} holds a run already, and --fresh refuses to go on with it; choose another name"
                )
            changed = changed_keys(load_written(written, registry), recipe)
            if changed:
                raise RecipeError(
                    f"{directory} holds a run of another recipe, which cannot be resumed: {'; '.join(changed)}. "
                    "Undo the change, or give the run another name: name=..."
                )
        with _writing(recipe):
            directory.mkdir(parents=True, exist_ok=True)
            if not begun and not _is_of(written, recipe, registry):
                (directory / EXPLOSIONS).unlink(missing_ok=True)  # those of another run that never was saved
            replace_file(written, dump_recipe(recipe).encode())
            facts = json.dumps(environment(registry, world), indent=1) + "\n"
            replace_file(directory / "environment.json", facts.encode())

    world.on_main(prepare)
    return directory


def _is_of(written: Path, recipe: Recipe, registry: Registry) -> bool:
    """Whether the recipe in a run directory is this one."""
    try:
        return written.exists() and not changed_keys(load_written(written, registry), recipe)
    except RecipeError:
        return False


def run_directory(recipe: Recipe) -> Path:
    """Where the recipe's run lives."""
    return Path(recipe.output_dir) / recipe.name


@contextmanager
def sole_run(recipe: Recipe, world: World) -> Iterator[None]:
    """Keep other processes from training in the same run directory meanwhile, by a lock on its `run.lock`.

    The operating system gives the lock back when the process ends, however it ends.

    Raises:
        MimError: if another run has the directory, or it cannot be written.
    """
    file = world.on_main(lambda: _lock(recipe))
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def _lock(recipe: Recipe) -> int:
    """The descriptor of the locked file. Not `flock`, which the data workers would inherit and hold on to."""
    import fcntl

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
        return file  # a file system without locks
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
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
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
        "arguments": sys.argv,
    }
