"""Looks at the environment for whatever could keep a run from working: `mim doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mim_framework.base.errors import PluginError
from mim_framework.registry.installed import BUILTINS
from mim_framework.registry.registry import Registry

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "torchdata",
    "pydantic",
    "pluggy",
    "numpy",
    "Pillow",
    "safetensors",
    "PyYAML",
)
GIGABYTE = 10**9
MIN_FREE_DISK = 5 * GIGABYTE  # a few checkpoints of a large model


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str
    ok: bool = True


def examine(registry: Registry) -> list[Finding]:
    """Everything worth knowing about this environment. Imports every plugin, in this process."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "torch and torchvision": _torchvision_pair,
        "command mim": _command_clash,
        "devices": _devices,
        "decoders": _decoders,
        "plugins": lambda: _plugins(registry),
        "disk": _disk,
    }
    findings: list[Finding] = []
    for topic, check in checks.items():
        try:
            findings += check()
        except Exception as error:  # a broken library must not hide what else there is to say
            findings.append(Finding(topic, f"cannot be examined: {type(error).__name__}: {error}", False))
    return findings


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("mim-framework", *PACKAGES):
        version = _version(name)
        yield Finding(name, version or f"not installed; pip install {name}", bool(version))


def _torchvision_pair() -> Iterator[Finding]:
    """A torchvision wheel works with the one torch that it was built for, which its metadata names."""
    if not _version("torchvision"):
        return
    required = [re.match(r"torch\s*\(?==\s*([\d.]+)", line) for line in metadata.requires("torchvision") or ()]
    built_for = next((found[1] for found in required if found), None)
    installed = _version("torch").partition("+")[0]
    if built_for is not None and built_for != installed:
        cure = f"pip install --upgrade --force-reinstall torch=={installed} torchvision"
        yield Finding(
            "torch and torchvision", f"torchvision is built for torch {built_for}, not {installed}; {cure}", False
        )
        return
    import torchvision.ops  # noqa: F401  # registers the compiled operators, which fails if they do not fit

    yield Finding("torch and torchvision", "fit together")


def _command_clash() -> Iterator[Finding]:
    """OpenMMLab's installer has a script and a package that are both called `mim`."""
    scripts = metadata.entry_points(group="console_scripts", name="mim")
    others = {point.dist.metadata["Name"] for point in scripts if point.dist} - {"mim-framework"}
    for other in sorted(others | ({"openmim"} if _version("openmim") else set())):
        text = (
            f"package '{other}' also brings a command `mim`; type `mim-framework` (or python -m mim_framework) instead"
        )
        yield Finding("command mim", text, False)


def _devices() -> Iterator[Finding]:
    import torch

    from mim_framework.base.precision import uses_bfloat16

    def bfloat16(name: str) -> str:
        fast = uses_bfloat16("auto", torch.device(name))
        return "bfloat16" if fast else "no bfloat16 in hardware, so float32"

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / GIGABYTE:.0f} GB"
        yield Finding(f"cuda:{index}", f"{properties.name}, {memory}, {bfloat16(f'cuda:{index}')}")
    if torch.backends.mps.is_available():
        yield Finding("mps", bfloat16("mps"))
    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {bfloat16('cpu')}")


def _decoders() -> Iterator[Finding]:
    from PIL import features

    jpeg = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "plain libjpeg, which is slow"
    webp = "WebP" if features.check("webp") else "no WebP"
    yield Finding("Pillow decodes with", f"{jpeg}, {webp}")
    version = _version("torchcodec")
    yield Finding("torchcodec", version or "not installed; faster decoding with pip install mim-framework[fast]")


def _plugins(registry: Registry) -> Iterator[Finding]:
    for info in registry.plugins():
        name = "built-in components" if info.name == BUILTINS else f"plugin {info.name}"
        start = time.perf_counter()
        try:
            registry.load(info.name)
        except PluginError as error:
            yield Finding(name, str(error), False)
        else:
            yield Finding(name, f"{info.version}, loads in {time.perf_counter() - start:.1f} s")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / GIGABYTE:.0f} GB free in {Path.cwd()}"
    yield Finding("disk", text if free >= MIN_FREE_DISK else f"{text}, little for checkpoints", free >= MIN_FREE_DISK)
