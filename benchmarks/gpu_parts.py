"""The parts of `gpu.sh`: each measures one thing, by the product's own doors, in a process of its own.

Start at `PARTS`. To add one, write a function that returns its figures and give it a line there. Nothing but the
standard library is imported before a part runs, so that `gpu.py` can report whatever fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FREE_BYTES = 2**30
"""Room for checkpoints and compiled kernels."""
LOSSES_OF = "quickstart"
NUM_LOSSES = 20
TOLERANCE = 1e-4
"""Of a loss on the GPU relative to the CPU's, in float32 without TF32. Orders of summation differ by about 1e-7."""

Figures = dict[str, Any]


class Failed(Exception):
    """A part did not do what it should; the text says what, and `figures` hold what it found."""

    def __init__(self, text: str, figures: Figures | None = None) -> None:
        super().__init__(text)
        self.figures = figures


@dataclass(frozen=True)
class Scale:
    """How large the parts are, and where they run."""

    device: str
    batch_sizes: tuple[int, ...]
    """Images in a batch; the first that fits into the memory is measured."""
    steps: int
    """Steps that are timed."""
    warmup: int
    overrides: tuple[str, ...]
    """Of the recipe whose step is measured."""
    losses: tuple[str, ...] = ()
    """Overrides of the recipe whose losses are compared."""


FULL = Scale("cuda", batch_sizes=(256, 128, 64, 32), steps=20, warmup=8, overrides=("train.precision=auto",))
REHEARSAL = Scale(
    "cpu", batch_sizes=(2,), steps=2, warmup=1, losses=("train.total_batch_size=8",),
    overrides=(
        "train.precision=bfloat16", "views.img_size=32",
        "encoder.embed_dim=16", "encoder.depth=1", "encoder.num_heads=2",
        "decoder.embed_dim=16", "decoder.depth=1", "decoder.num_heads=2",
    ),
)  # fmt: skip


# --- the parts -------------------------------------------------------------------------------------------------------


def check(scale: Scale) -> Figures:
    """The machine, once it has all that the other parts need."""
    import torch

    from mim_framework import Registry

    for folder in (os.getcwd(), tempfile.gettempdir()):
        if (free := shutil.disk_usage(folder).free) < FREE_BYTES:
            raise Failed(f"{folder} has {free / 2**30:.1f} GiB free; {FREE_BYTES / 2**30:.0f} are needed")
    Registry().find("encoder", "mae_vit")
    figures = {
        "torch": torch.__version__,
        "python": sys.version.partition(" ")[0],
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": _commit(),
    }
    if scale.device == "cpu":
        return figures | {"device": "CPU"}
    if torch.version.cuda is None and torch.version.hip is None:
        raise Failed(f"torch {torch.__version__} is built for CPUs only; install a build for this machine's GPU")
    if not torch.cuda.is_available():
        raise Failed(f"torch {torch.__version__} sees no GPU; does nvidia-smi, and is CUDA_VISIBLE_DEVICES right?")
    free, total = torch.cuda.mem_get_info(0)
    return figures | {
        "device": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda or torch.version.hip,
        "memory": total,
        "memory_free": free,
    }


def tests(scale: Scale) -> Figures:
    """The tests that need a GPU."""
    files = [str(path) for folder in ("tests", "plugins") for path in ROOT.glob(f"{folder}/**/test_*.py")]
    files = [path for path in sorted(files) if "mark.gpu" in Path(path).read_text(encoding="utf-8")]
    report = Path(tempfile.mkdtemp()) / "tests.xml"
    # Not the settings of pyproject.toml: they ask for plugins of pytest, and a warning of a driver is no failure here.
    settings = ["-o", "addopts=", "--import-mode=importlib", "-W", "default", "-p", "no:cacheprovider", "-ra"]
    command = [sys.executable, "-m", "pytest", *settings, "-m", "gpu", f"--junit-xml={report}", *files]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not report.exists():
        raise Failed(f"pytest ended with status {status} before it ran a test")
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case.get("name", "") for case in cases if {"failure", "error"} & {child.tag for child in case}]
    figures = {"passed": len(cases) - len(skipped) - len(failed), "skipped": len(skipped), "failed": len(failed)}
    if status or failed:
        raise Failed(f"pytest ended with status {status}; failed: {', '.join(failed) or 'none'}", figures)
    if scale.device != "cpu" and not figures["passed"]:
        raise Failed(f"of {len(cases)} tests none ran", figures)
    return figures


def mae_eager(scale: Scale) -> Figures:
    return _step("mae", scale, "train.compile=false")


def mae_compiled(scale: Scale) -> Figures:
    return _step("mae", scale, "train.compile=true")


def losses(scale: Scale) -> Figures:
    """Of one recipe in float32 on the CPU and on the device, from the same weights, images and masks."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_cpu, on_device = _losses("cpu", scale), _losses(scale.device, scale)
    differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(on_device, on_cpu, strict=True)]
    largest = max(differences, key=lambda difference: (math.isnan(difference), difference))
    figures = {
        "recipe": LOSSES_OF, "cpu": on_cpu, "device": on_device,
        "largest_difference": largest, "tolerance": TOLERANCE,
    }  # fmt: skip
    if len(on_cpu) != NUM_LOSSES:
        raise Failed(f"{len(on_cpu)} losses were written, {NUM_LOSSES} are wanted", figures)
    if not largest <= TOLERANCE:  # also where one is not a number
        raise Failed(f"losses differ by {largest:.1e} of their value, more than {TOLERANCE:.0e}", figures)
    return figures


@dataclass(frozen=True)
class Part:
    run: Callable[[Scale], Figures]
    title: str
    seconds: float
    """After so long it is ended."""

    @property
    def name(self) -> str:
        return self.run.__name__


CHECK = Part(check, "what is needed is there", 30)
PARTS = {
    part.name: part
    for part in (
        Part(tests, "GPU tests", 100),
        Part(mae_eager, "MAE ViT-B/16, eager", 60),
        Part(mae_compiled, "MAE ViT-B/16, compiled", 100),
        Part(losses, "losses, CPU against GPU", 60),
    )
}
"""In the order in which they run."""


# --- what they share -------------------------------------------------------------------------------------------------


def _step(name: str, scale: Scale, *overrides: str) -> Figures:
    """One training step as `mim bench` measures it, with the largest batch that fits."""
    import torch

    from mim_framework import Registry, load_recipe
    from mim_framework.commands.bench import measure_step

    registry = Registry()
    for batch_size in scale.batch_sizes:
        sizes = [f"train.total_batch_size={batch_size}", f"train.batch_size={batch_size}"]
        settings = [f"train.device={scale.device}", *sizes, *scale.overrides, *overrides]
        recipe = load_recipe(name, settings, registry)
        try:
            measured = measure_step(recipe, registry, steps=scale.steps, warmup=scale.warmup)
        except torch.OutOfMemoryError:
            print(f"{batch_size} images do not fit")
        else:
            print(measured)
            derived = {key: getattr(measured, key) for key in ("seconds", "images_per_second", "share_of_peak")}
            return asdict(measured) | derived
        torch.cuda.empty_cache()
    raise Failed(f"not even {scale.batch_sizes[-1]} images fit into the memory")


def _losses(device: str, scale: Scale) -> list[float]:
    from mim_framework import load_recipe, train
    from mim_framework.runtime.metrics import read_metrics

    settings = [
        f"output_dir={tempfile.mkdtemp()}", f"train.device={device}", f"train.steps={NUM_LOSSES}",
        "train.epochs=null", "train.precision=float32", "checkpoint={every_epochs: 0}", "evaluate=[]",
        "log={every_steps: 1, tensorboard: false, images_every_epochs: 0, num_images: 0}",
    ]  # fmt: skip
    run = train(load_recipe(LOSSES_OF, [*settings, *scale.losses]))
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def _commit() -> str | None:
    """Of the checkout, with `+` where it was changed since; None where git cannot tell."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]  # it may belong to somebody else, for root
    try:
        commit, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


# --- a part's process ------------------------------------------------------------------------------------------------


def main() -> int:
    """Run one part, and leave its figures or its error in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[CHECK.name, *PARTS])
    parser.add_argument("result", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    part = {CHECK.name: CHECK, **PARTS}[arguments.part]
    try:
        outcome: Figures = {"figures": part.run(REHEARSAL if arguments.rehearse else FULL)}
    except Failed as failed:
        outcome = {"error": str(failed), "figures": failed.figures}
    except Exception as error:
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {error}"}
    arguments.result.write_text(json.dumps(outcome))
    return 1 if "error" in outcome else 0


if __name__ == "__main__":
    sys.exit(main())
