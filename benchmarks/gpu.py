"""Runs the parts of `gpu_parts.py`, and writes what they found as `gpu.json` and as the table of README.md, `gpu.md`.

Every part has its own process and time limit: one that fails is reported, and the others go on. Start at `main`.
`gpu.sh` finds a Python for it, and `tools/as_installed.py`. It imports the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from as_installed import describe, packages
from gpu_parts import CHECK, PARTS, ROOT, Part

TOTAL_SECONDS = 355.0
"""All parts together; what does not fit any more is not begun."""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make a run wait for other ranks."""

Report = dict[str, Any]


def main() -> int:
    now = datetime.now(UTC)
    parser = argparse.ArgumentParser(prog="gpu.sh", description="All that is measured on a GPU, in under 6 minutes.")
    parser.add_argument("--output", type=Path, help="folder for gpu.json, gpu.md and gpu.log")
    parser.add_argument("--rehearse", action="store_true", help="the same with tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    output = (arguments.output or ROOT / "benchmarks/results" / f"{now:%Y-%m-%dT%H-%M-%SZ}").absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no part is left behind
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = (output / "gpu.log").open("w")
    except OSError as error:
        parser.exit(1, f"gpu.sh: cannot write to {output}: {error.strerror}; choose another folder with --output\n")
    wanted = [CHECK, *(part for part in PARTS.values() if not arguments.only or part.name in arguments.only)]
    report: Report = {"date": f"{now:%Y-%m-%d}", "rehearsal": arguments.rehearse, "seconds": 0.0, "parts": {}}
    slack = 4 if arguments.rehearse else 1  # a rehearsal may share its processor with others
    start = time.monotonic()
    with log, tempfile.TemporaryDirectory(prefix="mim_gpu_", ignore_cleanup_errors=True) as scratch:
        environment = environment_of(Path(scratch), arguments.rehearse)
        options = ["--rehearse"] if arguments.rehearse else []
        for part in wanted:
            result = Path(scratch) / f"{part.name}.json"
            command = [sys.executable, str(ROOT / "benchmarks/gpu_parts.py"), part.name, str(result), *options]
            log.write(f"\n===== {part.name}: {part.title}\n")
            log.flush()
            limit = min(slack * part.seconds, slack * TOTAL_SECONDS - (time.monotonic() - start))
            outcome = run_part(command, result, limit, environment, output, log)
            report["parts"][part.name] = outcome
            report["seconds"] = round(time.monotonic() - start, 1)
            print(
                f"{part.name:14} {outcome['status']} in {outcome['seconds']} s  {outcome.get('error', '')}", flush=True
            )
            write(report, output)  # after every part: nothing that was measured gets lost
            if part is CHECK and outcome["status"] == "failed":
                break
    print(f"\n{table(report)}\n{output}")
    return 1 if failures(report) else 0


def environment_of(scratch: Path, rehearse: bool) -> dict[str, str]:
    """That of a part: the packages of this checkout, installed or not, and caches that are gone afterwards."""
    site = scratch / "site"
    describe(ROOT, site)
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER} | {
        "PYTHONPATH": os.pathsep.join([*map(str, packages(ROOT)), str(site), *before]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "HF_HUB_OFFLINE": "1",
    }
    if rehearse:  # compiling takes a minute, however small the model
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return environment


def run_part(
    command: list[str], result: Path, limit: float, environment: dict[str, str], cwd: Path, log: Any
) -> dict[str, Any]:
    """Status, seconds, figures and error of a part. Its processes are ended with it."""
    if limit < 1:
        return {"status": "failed", "seconds": 0.0, "error": "no time was left"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    outcome: dict[str, Any] = {}
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        outcome = {"error": f"not done after {limit:.0f} s"}
    finally:
        with suppress(ProcessLookupError, PermissionError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    if not outcome:
        ended = {"error": f"ended with status {process.returncode}; gpu.log says more"}
        outcome = json.loads(result.read_text()) if result.exists() else ended
    status = "failed" if "error" in outcome else "passed"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), **outcome}


# --- what is written -------------------------------------------------------------------------------------------------


def write(report: Report, output: Path) -> None:
    (output / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "gpu.md").write_text(table(report))


def failures(report: Report) -> dict[str, str]:
    """Errors by part."""
    return {name: outcome["error"] for name, outcome in report["parts"].items() if outcome["status"] == "failed"}


def table(report: Report) -> str:
    """The report in Markdown."""
    found = {name: outcome.get("figures") or {} for name, outcome in report["parts"].items()}
    lines = [machine(report, found.get(CHECK.name, {})), ""]
    if report["rehearsal"]:
        lines = ["A rehearsal with tiny sizes on a CPU, nothing compiled: **these figures say nothing**.", "", *lines]
    steps = [row(PARTS[name], figures) for name, figures in found.items() if "images_per_second" in figures]
    if steps:
        head = "| step | precision | images | images/s | ms a step | first step | of the matmul peak | peak memory |"
        lines += [head, "|---|---|---|---|---|---|---|---|", *steps, ""]
    if losses := found.get("losses"):
        where = "the CPU twice" if report["rehearsal"] else "CPU against GPU"
        lines.append(
            f"- {len(losses['cpu'])} losses of {losses['recipe']} in float32, {where}: they differ by at most "
            f"{losses['largest_difference']:.1e} of their value; {losses['tolerance']:.0e} is allowed."
        )
    if tests := found.get("tests"):
        lines.append(f"- GPU tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped.")
    lines += [f"- **{name} failed**: {' '.join(error.split())}" for name, error in failures(report).items()]
    return "\n".join(lines).rstrip() + "\n"


def machine(report: Report, figures: dict[str, Any]) -> str:
    if not figures:
        return f"Machine: not known; {report['date']}."
    memory = f", {figures['memory'] / 2**30:.0f} GiB" if "memory" in figures else ""
    cuda = f" with CUDA {figures['cuda']}" if "cuda" in figures else ""
    return (
        f"Machine: {figures['device']}{memory}, {figures['cpus']} CPUs; torch {figures['torch']}{cuda}, "
        f"Python {figures['python']}; {report['date']}, commit {figures['commit'] or 'not known'}. "
        f"All parts together took {report['seconds']:.0f} s."
    )


def row(part: Part, step: dict[str, Any]) -> str:
    memory = "not known" if step["peak_memory"] is None else f"{step['peak_memory'] / 2**30:.2f} GiB"
    time_of_step = f"{1000 * step['seconds']:.1f} ({1000 * step['fastest']:.1f} to {1000 * step['slowest']:.1f})"
    cells = [
        part.title, step["precision"], str(step["batch_size"]), f"{step['images_per_second']:,.1f}", time_of_step,
        f"{step['first']:.1f} s", f"{step['share_of_peak']:.1%}", memory,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
