"""Runs that are killed, stopped, damaged or disturbed: what is kept, what is said, and that they go on bit for bit."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import faulty
import pytest
import tiny
import torch
import yaml
from faulty import SHORT, at_step, hashes, log, mim, steps
from safetensors.torch import load_file

from mim_framework.checkpoints.checkpoint import list_checkpoints

METHODS = [
    "quickstart",
    "maskfeat_quickstart",
    "mixmim_quickstart",
    "simmim_quickstart",
    "mff_quickstart",
    "beit_dvae_quickstart",
    "beit_v2_vqkd_quickstart",
]


@pytest.fixture
def run(tmp_path: Path):
    """`run("name", "key=value", fault=...)`: 12 steps of the tiny recipe, saved every 4, into tmp_path/name."""
    recipe = tmp_path / "tiny.yaml"
    text = tiny.RECIPE | {
        "train": {**tiny.RECIPE["train"], "steps": 12},
        "checkpoint": {"every_epochs": 0, "every_steps": 4},
    }
    recipe.write_text(yaml.safe_dump(text))

    def start(name: str, *more: object, fault: faulty.Fault | None = None) -> faulty.Ended:
        return mim("run", recipe, f"name={name}", f"output_dir={tmp_path}", *more, fault=fault)

    return start


@pytest.fixture
def whole(run, tmp_path: Path) -> dict[str, str]:
    """What the undisturbed run ends with."""
    assert run("whole").code == 0
    return hashes(tmp_path / "whole")


@pytest.mark.fault(row="1")
def test_killed_at_random_steps(tmp_path: Path, figure) -> None:
    def train(recipe: str, name: str, fault: faulty.Fault | None = None) -> faulty.Ended:
        options = [*SHORT, "train.steps=10", "checkpoint.every_steps=4", f"output_dir={tmp_path}", f"name={name}"]
        return mim("run", recipe, *options, fault=fault)

    for recipe in METHODS:
        assert train(recipe, recipe).code == 0
    exact = 0
    for seed in range(20):
        recipe = METHODS[seed % len(METHODS)]
        for step in sorted(random.Random(seed).sample(range(10), 2)):
            assert train(recipe, f"killed{seed}", at_step(step, faulty.kill)).code == -signal.SIGKILL
        assert train(recipe, f"killed{seed}").code == 0
        exact += hashes(tmp_path / f"killed{seed}") == hashes(tmp_path / recipe)
    figure(f"{exact}/20 end with the bits of the undisturbed run, {len(METHODS)} methods")
    assert exact == 20


@pytest.mark.fault(row="2")
def test_killed_while_saving(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    exact, number = 0, 0
    while True:
        name = f"save{number}"
        code = run(name, fault=faulty.at_file(number + 1, faulty.kill, "step_00000008")).code
        if code == 0:
            break
        number += 1
        assert code == -signal.SIGKILL
        assert run(name).code == 0
        leftovers = list((tmp_path / name / "checkpoints").glob(".*"))
        exact += hashes(tmp_path / name) == whole and not leftovers
    figure(f"{exact}/{number} points of a save recovered, the same bits, nothing left over")
    assert exact == number > 5


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return bytes([*data[:40], data[40] ^ 4, *data[41:]])


HARMS = {
    "cut": cut,
    "empty": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "one bit": flipped,
    "longer": lambda data: data + b"\0",
}


@pytest.mark.fault(row="3")
def test_damaged_checkpoints(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    assert run("source", fault=at_step(9, faulty.kill)).code == -signal.SIGKILL
    told = total = 0
    for file in ("manifest.json", "state.json", "model.safetensors", "optimizer.main.safetensors"):
        for harm in HARMS.values():
            shutil.rmtree(tmp_path / "victim", ignore_errors=True)
            shutil.copytree(tmp_path / "source", tmp_path / "victim")
            path = tmp_path / "victim" / "checkpoints" / "step_00000008" / file
            path.write_bytes(harm(path.read_bytes()))
            written = tmp_path / "victim" / "recipe.yaml"
            written.write_text(written.read_text().replace("name: source", "name: victim"))
            ended = run("victim")
            total += 1
            told += ended.code == 0 and file in ended.said and hashes(tmp_path / "victim") == whole
    figure(f"{told}/{total} noticed and named, the step before taken, the same bits in the end")
    assert told == total
    for path in (tmp_path / "source").glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    assert run("source").in_a_sentence


@pytest.mark.fault(row="4")
def test_a_save_that_exceeds_the_room(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    size = sum(file.stat().st_size for file in list_checkpoints(tmp_path / "whole" / "checkpoints")[-1].iterdir())

    def little() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, size // 4))

    ended = run("full", fault=little)
    assert ended.in_a_sentence
    assert "cannot write checkpoint" in ended.said
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []
    assert run("full").code == 0
    assert hashes(tmp_path / "full") == whole
    figure("1 sentence, 0 files left, the same bits after making room")


def in_a_mount_of_its_own(script: str) -> subprocess.CompletedProcess[str]:
    """A script in a name space of mounts, which ends with it."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    return subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, text=True)


@pytest.mark.fault(row="4")
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_a_file_system_that_is_full(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    size = sum(file.stat().st_size for file in list_checkpoints(tmp_path / "whole" / "checkpoints")[-1].iterdir())
    small = tmp_path / "small"
    small.mkdir()
    command = shlex.join([sys.executable, "-m", "mim_framework", "run", str(tmp_path / "tiny.yaml"), "name=full"])
    done = in_a_mount_of_its_own(
        f"mount -t tmpfs -o size={int(1.7 * size)} tmpfs {small}\n"
        f"{command} output_dir={small} && exit 9\n"
        f"ls -A {small}/full/checkpoints > {tmp_path}/left\n"
        f"mount -o remount,size={20 * size} {small}\n"
        f"{command} output_dir={small}\n"
        f"cp -r {small}/full {tmp_path}/full\n"
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "left").read_text().split() == ["step_00000004"]
    assert hashes(tmp_path / "full") == whole
    figure("tmpfs with room for 1 checkpoint: 1 sentence, the step before is whole, the same bits after making room")


@pytest.mark.fault(row="f")
def test_a_run_directory_that_is_read_only(run, tmp_path: Path, figure) -> None:
    assert run("ro", fault=at_step(9, faulty.kill)).code < 0
    fault = faulty.read_only(tmp_path / "ro")
    ended = run("ro", fault=fault)
    assert ended.in_a_sentence, ended.said
    assert "Read-only file system" in ended.said
    assert mim("eval", "knn", tmp_path / "ro", fault=fault).code == 0
    vit = tmp_path / "vit.safetensors"
    assert mim("export", tmp_path / "ro", "--to", "timm", "--output", vit, fault=fault).code == 0
    assert vit.stat().st_size > 0
    figure("run: 1 sentence; `eval knn` and an export to elsewhere work, 2/2")


@pytest.mark.fault(row="i")
def test_nothing_is_deleted_before_the_new_step_stands(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    ended = run("kept", "checkpoint.keep=1", fault=faulty.at_file(1, full, ".step_00000008"))
    assert ended.in_a_sentence
    assert steps(tmp_path / "kept") == [4]
    figure("the step before is there: 1/1")


@pytest.mark.fault(row="5")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_signals(run, tmp_path: Path, name: str, code: int, workers: int, figure) -> None:
    fault = at_step(5, lambda: os.kill(os.getpid(), getattr(signal, name)))
    ended = run("signalled", f"data.workers={workers}", fault=fault)
    assert (ended.code, steps(tmp_path / "signalled")) == (code, [4, 5])
    assert "Traceback" not in ended.said
    figure(f"{name}, {workers} workers: exit {code}, saved before the step that it gave up")


@pytest.mark.fault(row="6")
def test_a_second_ctrl_c(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    def twice() -> None:
        for _ in range(2):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    def hang() -> None:
        threading.Thread(target=twice, daemon=True).start()
        time.sleep(60)

    ended = run("twice", fault=at_step(6, hang))
    assert ended.code == 130, ended.said
    assert "Traceback" not in ended.said
    assert ended.seconds < 40
    assert steps(tmp_path / "twice") == [4]
    assert run("twice").code == 0
    assert hashes(tmp_path / "twice") == whole
    figure("in a step that hangs for 60 s: exit 130 at once, 0 tracebacks, the same bits after a restart")


@pytest.mark.fault(row="9")
def test_a_batch_that_does_not_fit(run, tmp_path: Path, figure) -> None:
    def little() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))

    ended = run("oom", "train.total_batch_size=131072", "views.img_size=32", fault=little)
    assert ended.in_a_sentence, ended.said
    assert "use train.batch_size=65536" in ended.said
    figure("131,072 images in 512 MB of address space: 1 sentence with the peak and train.batch_size=65536")


@pytest.mark.fault(row="7")
def test_steps_in_a_row_that_are_not_finite(run, tmp_path: Path, figure) -> None:
    ended = run("row", fault=faulty.poisoned(range(5, 21)))
    assert ended.in_a_sentence, ended.said
    assert "6 steps in a row, up to step 11" in ended.said
    recorded = [json.loads(line) for line in (tmp_path / "row" / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in recorded] == list(range(5, 11))
    assert run("row").code == 0
    assert [line["step"] for line in log(tmp_path / "row")] == list(range(1, 13))
    figure("16 in a row: stops after the 6th, 6/6 recorded, goes on to the end after the cure")


@pytest.mark.fault(row="7")
@pytest.mark.parametrize(
    "recipe", ["quickstart", "maskfeat_quickstart", "beit_dvae_quickstart", "beit_v2_vqkd_quickstart"]
)
def test_steps_that_are_not_finite(recipe: str, tmp_path: Path, figure) -> None:
    options = [
        *SHORT,
        "train.steps=7",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        f"output_dir={tmp_path}",
        "name=nan",
    ]
    assert mim("run", recipe, *options, fault=faulty.poisoned([3, 5])).code == 0
    lines = [json.loads(line) for line in (tmp_path / "nan" / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["positions"]) for line in lines] == [
        (n, list(range(16 * n, 16 * n + 16))) for n in (3, 5)
    ]
    models = [folder / "model.safetensors" for folder in list_checkpoints(tmp_path / "nan" / "checkpoints")]
    assert models[2].read_bytes() == models[3].read_bytes() != models[4].read_bytes()
    figure(f"{recipe}: 2/2 steps recorded with their 16 samples, 0 bits of the model changed")


CLIPPED = "shape: constant, warmup_epochs: 0, clip_grad_norm: 1.0"


@pytest.mark.fault(row="8")
def test_a_rate_that_is_too_high_for_a_run_that_goes_on(tmp_path: Path, figure) -> None:
    """Gradients are clipped: the weights leave where they were for good, and the loss stays a number."""
    options = [*SHORT, "checkpoint.every_steps=10", f"output_dir={tmp_path}"]
    gentle = f"optim={{type: momentum, lr: 0.5, {CLIPPED}}}"
    assert mim("run", "quickstart", *options, "train.steps=60", gentle, "name=rate").code == 0
    first = log(tmp_path / "rate")[-1]["loss"]
    words = ["--allow-change", "optim.lr", "--allow-change", "train.steps"]
    high = f"optim={{type: momentum, lr: 100, {CLIPPED}}}"
    ended = mim("run", "quickstart", *options, "train.steps=400", high, "name=rate", *words)
    assert ended.in_a_sentence, ended.said
    assert "and stayed finite; stopped. The same command goes on from step_00000060, from before" in ended.said
    [told] = json.loads((tmp_path / "rate" / "explosions.json").read_text())
    assert told["since"] in (60, 61, 62)
    assert told["now"] > 1e4
    assert steps(tmp_path / "rate")[-1] == 60
    assert mim("run", "quickstart", *options, "train.steps=80", gentle, "name=rate", *words).code == 0
    assert mim("run", "quickstart", *options, "train.steps=80", gentle, "name=whole").code == 0
    assert hashes(tmp_path / "rate")["model.safetensors"] == hashes(tmp_path / "whole")["model.safetensors"]
    late = told["until"] - told["since"] + 1
    figure(
        f"a real run, {first:.1f} to {told['now']:.0e}: stopped after {late} steps, with the checkpoint of step 60 "
        "and, at the old rate, the bits of a run that never knew another"
    )


@pytest.mark.fault(row="8")
def test_a_rate_that_is_too_high_from_the_start(tmp_path: Path, figure) -> None:
    """The loss comes back for single steps, and rises from time to time to a thousand times the first and more."""
    options = [*SHORT, "train.steps=300", "checkpoint.every_steps=2", f"output_dir={tmp_path}"]
    ended = mim("run", "quickstart", *options, "name=high", f"optim={{type: sgd, lr: 10, {CLIPPED}}}")
    assert ended.in_a_sentence, ended.said
    losses = [line["loss"] for line in log(tmp_path / "high")]
    [told] = json.loads((tmp_path / "high" / "explosions.json").read_text())
    assert max(losses[: told["since"]]) < 100 * losses[0] < max(losses)
    assert len(losses) < 60
    kept = steps(tmp_path / "high")[-1]
    assert kept < told["since"]
    lowest = min(losses[told["since"] :])
    figure(
        f"a real run, {losses[0]:.1f} to {max(losses):.0e} and for single steps back to {lowest:.0f}: rises from step "
        f"{told['since']}, stopped at step {told['until']} with the checkpoint of step {kept}"
    )


@pytest.mark.fault(row="8")
def test_a_long_warm_up_gives_no_alarm(tmp_path: Path, figure) -> None:
    options = [*SHORT, "train.steps=300", "optim.warmup_epochs=2", f"output_dir={tmp_path}", "name=clean"]
    ended = mim("run", "quickstart", *options)
    assert ended.code == 0, ended.said
    assert not (tmp_path / "clean" / "explosions.json").exists()
    losses = [line["loss"] for line in log(tmp_path / "clean")]
    assert losses[-1] < 0.5 * losses[0]
    figure(f"0 alarms in {len(losses)} steps of MAE, of which 178 warm up: {losses[0]:.2f} to {losses[-1]:.2f}")


@pytest.mark.fault(row="23")
@pytest.mark.parametrize("recipe", METHODS)
def test_resumed_with_accumulation_on_other_workers(recipe: str, tmp_path: Path, figure) -> None:
    options = [*SHORT, "train.steps=8", "checkpoint.every_steps=3", "train.batch_size=8", f"output_dir={tmp_path}"]
    options += ["log.every_steps=2"]  # lines that lie between two saves
    assert mim("run", recipe, *options, "name=whole").code == 0
    assert mim("run", recipe, *options, "name=k", "data.workers=1", fault=at_step(5, faulty.kill)).code < 0
    assert mim("run", recipe, *options, "name=k", "data.workers=0").code == 0
    assert hashes(tmp_path / "k") == hashes(tmp_path / "whole")
    assert log(tmp_path / "k") == log(tmp_path / "whole")
    figure(f"{recipe}: weights, optimizer, state and log are equal to the bit")


@pytest.mark.fault(row="23")
def test_resumed_in_bfloat16_and_with_stored_tokens(tmp_path: Path, figure) -> None:
    options = [*SHORT, f"output_dir={tmp_path}"]
    assert mim("run", "beit_dvae_quickstart", *options, "train.steps=22", "name=dvae").code == 0
    tokens = [f"tokenizer={tmp_path}/dvae", "data.views_per_image=1"]
    assert mim("tokenize", "beit_quickstart", *tokens, "--output", tmp_path / "ids").code == 0
    cases = {
        "bfloat16": ["quickstart", "train.precision=bfloat16"],
        "stored tokens": ["beit_quickstart", *tokens, f"data.tokens={tmp_path}/ids"],
    }
    for name, case in cases.items():
        command = ["run", *case, *options, "train.steps=8", "checkpoint.every_steps=3"]
        assert mim(*command, f"name={name[0]}whole").code == 0
        assert mim(*command, f"name={name[0]}", fault=at_step(5, faulty.kill)).code < 0
        assert mim(*command, f"name={name[0]}").code == 0
        assert hashes(tmp_path / name[0]) == hashes(tmp_path / f"{name[0]}whole")
        assert log(tmp_path / name[0]) == log(tmp_path / f"{name[0]}whole")
        figure(f"{name}: weights, optimizer, state and log are equal to the bit")


@pytest.mark.fault(row="22")
def test_any_number_of_data_workers(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    for workers in (1, 2, 8):
        assert run(f"w{workers}", f"data.workers={workers}").code == 0
        assert hashes(tmp_path / f"w{workers}") == whole
        assert log(tmp_path / f"w{workers}") == log(tmp_path / "whole")
    figure("1, 2 and 8 workers: weights and log as with none, 3/3")


@pytest.mark.fault(row="24")
def test_a_clock_that_goes_back(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    def back() -> None:
        real = time.time
        time.time = lambda: real() - 400 * 86400

    assert run("clock", fault=at_step(6, back)).code == 0
    assert hashes(tmp_path / "clock") == whole
    figure("400 days back: the same bits")


@pytest.mark.fault(row="25")
def test_seeds(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    found = []
    for seed in (0, 1, 2):
        assert run(f"seed{seed}", f"seed={seed}").code == 0
        found.append(hashes(tmp_path / f"seed{seed}")["model.safetensors"])
    assert found[0] == whole["model.safetensors"]
    assert len(set(found)) == 3
    figure("1 seed twice: the same bits; 3 seeds: 3 models")


@pytest.mark.fault(row="27")
def test_a_changed_recipe(run, tmp_path: Path, figure) -> None:
    assert run("changed", fault=at_step(5, faulty.kill)).code < 0
    harmful = [
        "seed=1",
        "train.total_batch_size=4",
        "encoder.embed_dim=32",
        "encoder.depth=2",
        "masker.mask_ratio=0.5",
        "optim.weight_decay=0.3",
        "target.norm_pix_loss=true",
        "encoder.num_heads=4",
    ]
    refused = 0
    for change in harmful:
        ended = run("changed", change)
        refused += ended.in_a_sentence and "->" in ended.said
    assert run("changed", "description=x", "data.workers=1", "train.batch_size=4").code == 0
    figure(f"{refused}/{len(harmful)} harmful changes refused with what changed, 3/3 harmless ones taken")
    assert refused == len(harmful)


@pytest.mark.fault(row="29")
def test_tensorboard_without_room(run, tmp_path: Path, figure) -> None:
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "tensorboard").write_text("a file in the place of the folder")
    ended = run("board", "log.tensorboard=true")
    assert ended.code == 0
    assert "TensorBoard is off" in ended.said
    assert len(log(tmp_path / "board")) == 12
    figure("training goes on, 12/12 lines of metrics.jsonl")


@pytest.mark.fault(row="30")
def test_every_rename_stays_in_its_folder(run, tmp_path: Path, figure) -> None:
    """What a network file system needs: a file is renamed in its folder, where that is one operation."""
    seen = tmp_path / "renames.txt"

    def watch() -> None:
        import sys

        def note(event: str, arguments: tuple) -> None:
            if event == "os.rename" and str(tmp_path) in str(arguments[0]):
                with seen.open("a") as file:
                    file.write(f"{Path(arguments[0]).parent == Path(arguments[1]).parent}\n")

        sys.addaudithook(note)

    assert run("nfs", fault=watch).code == 0
    renames = seen.read_text().split()
    assert set(renames) == {"True"}
    figure(f"{len(renames)}/{len(renames)} renames within a folder; no real NFS was there")


@pytest.mark.fault(row="30")
def test_a_file_system_without_locks(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    def unlockable() -> None:
        import fcntl

        def refused(*arguments: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.lockf = fcntl.flock = refused

    ended = run("unlocked", fault=unlockable)
    assert ended.code == 0
    assert "this file system has no file locks: do not start a second run in" in ended.said
    assert hashes(tmp_path / "unlocked") == whole
    figure("no locks: 1 warning, the same bits")


@pytest.mark.fault(row="30")
def test_folders_that_cannot_be_emptied(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    """What somebody has open keeps a name on NFS, and its folder with it."""

    def kept() -> None:
        def watch(event: str, arguments: tuple) -> None:
            if event == "os.rmdir" and ".step_" in str(arguments[0]):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

        sys.addaudithook(watch)

    ended = run("busy", "checkpoint.keep=1", "checkpoint.every_steps=2", fault=kept)
    assert ended.code == 0, ended.said
    assert steps(tmp_path / "busy") == [12]
    assert "cannot delete the old checkpoint" in ended.said
    assert hashes(tmp_path / "busy")["model.safetensors"] == whole["model.safetensors"]
    figure("old checkpoints that are open elsewhere: told, 6 of 6 saves made, the same weights")


@pytest.mark.fault(row="a")
def test_two_runs_in_one_directory(run, tmp_path: Path, figure) -> None:
    first = faulty.started("run", tmp_path / "tiny.yaml", "name=twice", f"output_dir={tmp_path}", "train.steps=100000")
    try:
        faulty.wait_for((tmp_path / "twice" / "metrics.jsonl").exists)
        ended = run("twice", "train.steps=100000")
        assert ended.in_a_sentence
        assert f"pid {first.pid}" in ended.said
    finally:
        first.terminate()
        said, _ = first.communicate(timeout=60)
    assert first.returncode == 143, said
    figure("one trains, the other is refused with the process that has it")


@pytest.mark.fault(row="b")
def test_killed_with_its_data_workers(run, tmp_path: Path, figure) -> None:
    options = [
        "run",
        tmp_path / "tiny.yaml",
        "name=b",
        f"output_dir={tmp_path}",
        "train.steps=100000",
        "data.workers=2",
    ]
    first = faulty.started(*options)
    faulty.wait_for(lambda: steps(tmp_path / "b") if (tmp_path / "b" / "checkpoints").exists() else False)
    workers = [int(pid) for pid in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
    first.kill()
    first.communicate()
    ended = run("b", "train.steps=100000", "data.workers=2", fault=at_step(steps(tmp_path / "b")[-1], faulty.kill))
    assert ended.code == -signal.SIGKILL, ended.said  # it had begun: the lock was free
    faulty.wait_for(lambda: not any(_alive(pid) for pid in workers), 30)
    figure(f"the directory is free at once, 0 of {len(workers)} workers left")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.fault(row="d")
def test_one_rank_is_killed(run, tmp_path: Path, figure) -> None:
    options = [tmp_path / "tiny.yaml", "name=d", f"output_dir={tmp_path}", "train.steps=100000", "--nproc-per-node", 2]
    launcher = faulty.started("run", *options)
    faulty.wait_for(lambda: steps(tmp_path / "d") if (tmp_path / "d" / "checkpoints").exists() else False)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"mim_framework" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(ranks[-1], signal.SIGKILL)
    said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "killed by SIGKILL" in said
    assert steps(tmp_path / "d")
    figure("ends with the rank and its signal, checkpoints kept")


@pytest.mark.fault(row="g")
def test_a_torn_line_of_the_log(run, tmp_path: Path, figure) -> None:
    assert run("torn", fault=at_step(9, faulty.kill)).code < 0
    file = tmp_path / "torn" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert run("torn").code == 0
    assert [line["step"] for line in log(tmp_path / "torn")] == list(range(1, 13))
    figure("each of 12 steps once")


@pytest.mark.fault(row="h")
def test_a_log_of_a_million_lines(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    assert run("long", fault=at_step(9, faulty.kill)).code < 0
    file = tmp_path / "long" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    with file.open("w") as out:
        out.writelines(lines[index % 8] for index in range(1_000_000))
        out.writelines(lines[8:])
    size = file.stat().st_size / 1e6
    seconds = tmp_path / "seconds"

    def measured() -> None:
        began = time.process_time()
        at_step(8, lambda: seconds.write_text(str(time.process_time() - began)))()

    ended = run("long", fault=measured)
    assert ended.code == 0, ended.said
    assert hashes(tmp_path / "long") == whole
    took = float(seconds.read_text())
    figure(f"1,000,000 lines ({size:.0f} MB): training goes on after {took:.0f} s of processor time, the same bits")
    assert took < 60


@pytest.mark.fault(row="n")
def test_a_component_that_raises(run, whole: dict[str, str], tmp_path: Path, figure) -> None:
    def broken() -> None:
        raise RuntimeError("a component broke")

    assert run("raises", fault=at_step(10, broken)).code == 1
    assert steps(tmp_path / "raises") == [4, 8]
    assert run("raises").code == 0
    assert hashes(tmp_path / "raises") == whole
    figure("2/2 steps kept, the same bits after the cure")


@pytest.mark.fault(row="k")
def test_tokenize_is_killed(tmp_path: Path, figure) -> None:
    options = [*SHORT, f"output_dir={tmp_path}"]
    assert mim("run", "beit_dvae_quickstart", *options, "train.steps=22", "name=dvae").code == 0
    tokens = ["tokenize", "beit_quickstart", f"tokenizer={tmp_path}/dvae", "data.views_per_image=1", "--output"]
    assert mim(*tokens, tmp_path / "whole").code == 0
    for number in (1, 2, 3):
        mim(*tokens, tmp_path / "killed", fault=_kill_at_put(number))
    assert mim(*tokens, tmp_path / "killed").code == 0
    assert (tmp_path / "killed" / "ids.npy").read_bytes() == (tmp_path / "whole" / "ids.npy").read_bytes()
    figure("killed 3 times, the same ids in the end")


def _kill_at_put(number: int) -> faulty.Fault:
    def install() -> None:
        from mim_framework.data.companions import TokenWriter

        put, count = TokenWriter.put, 0

        def faulty_put(self, *arguments, **options) -> None:
            nonlocal count
            count += 1
            put(self, *arguments, **options)
            if count == number:
                faulty.kill()

        TokenWriter.put = faulty_put

    return install


def _kill_at_byte(number: int) -> faulty.Fault:
    """The system kills the process in the middle of a file, where it writes the byte of that number."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

    return install


@pytest.mark.fault(row="j")
@pytest.mark.parametrize(("to", "suffix"), [("timm", ".safetensors"), ("official", ".pth")])
def test_export_is_killed(run, tmp_path: Path, to: str, suffix: str, figure) -> None:
    """At every operation on a file, and in the middle of writing: into an empty folder and over an older export."""
    assert run("one").code == 0
    assert run("two", "seed=1").code == 0
    outputs = {name: tmp_path / "whole" / f"{name}{suffix}" for name in ("one", "two")}
    for name, output in outputs.items():
        assert mim("export", tmp_path / name, "--to", to, "--output", output).code == 0
    old, new = (weights_of(path) for path in outputs.values())
    size = outputs["two"].stat().st_size
    command = ["export", tmp_path / "two", "--to", to, "--output"]

    in_the_middle = [_kill_at_byte(byte) for byte in (size // 8, size // 2, size - 1)]
    at_operations = (faulty.at_file(number, faulty.kill, "/out") for number in itertools.count(1))
    ends = {-signal.SIGXFSZ: 0, -signal.SIGKILL: 0}
    for number, fault in enumerate(itertools.chain(in_the_middle, in_the_middle, at_operations)):
        folder = tmp_path / f"{number}" / "out"
        file = folder / f"weights{suffix}"
        before = None
        if number >= len(in_the_middle):
            folder.mkdir(parents=True)
            shutil.copyfile(outputs["one"], file)
            before = old
        ended = mim(*command, file, fault=fault)
        if ended.code == 0:
            break
        ends[ended.code] += 1
        assert (weights_of(file) if file.exists() else None) in (before, new)
        assert mim(*command, file).code == 0
        assert weights_of(file) == new
        assert [path.name for path in folder.iterdir()] == [file.name]
    figure(
        f"{to}: {ends[-signal.SIGKILL]} kills at operations on files, {ends[-signal.SIGXFSZ]} while writing: "
        "the old file, none or the whole new one; the next export leaves nothing over"
    )
    assert ends[-signal.SIGXFSZ] == 6
    assert ends[-signal.SIGKILL] >= 6


def weights_of(path: Path) -> str:
    """A hash of the tensors of an exported file, which must be whole."""
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]
    together = hashlib.sha256()
    for name in sorted(found):
        together.update(name.encode() + found[name].contiguous().numpy().tobytes())
    return together.hexdigest()


@pytest.mark.fault(row="q")
def test_no_network(tmp_path: Path, run, figure) -> None:
    def cut_off() -> None:
        import socket

        def refused(*arguments, **options) -> None:
            raise OSError("no network")

        socket.socket.connect = refused
        socket.getaddrinfo = refused

    assert run("offline", fault=cut_off).code == 0
    figure("a run asks for no connection")


@pytest.mark.fault(row="26")
def test_a_minute_with_everything_on(tmp_path: Path, run, figure) -> None:
    run("first", "train.steps=1")  # writes tiny.yaml's folder
    shared = {path.name for path in Path("/dev/shm").glob("torch_*")}
    options = [
        "log.tensorboard=true",
        "log.num_images=2",
        "log.images_every_epochs=1",
        "data.workers=1",
        "evaluate=[{type: knn, every_epochs: 2}]",
        "train.steps=1000000",
        "checkpoint.every_steps=50",
    ]
    process = faulty.started("run", tmp_path / "tiny.yaml", "name=soak", f"output_dir={tmp_path}", *options)
    process_facts = []
    faulty.wait_for(lambda: (tmp_path / "soak" / "checkpoints").exists() and steps(tmp_path / "soak")[-1:] > [500])
    began = time.monotonic()
    while time.monotonic() - began < 45:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
        process_facts.append((pages * 4096 / 2**20, descriptors))
        time.sleep(5)
    process.terminate()
    process.communicate(timeout=60)
    (first, files), (last, files_then) = process_facts[0], process_facts[-1]
    done = log(tmp_path / "soak")[-1]["step"]
    left = len({path.name for path in Path("/dev/shm").glob(f"torch_{process.pid}_*")} - shared)
    saves, kept = done // 50, len(steps(tmp_path / "soak"))
    figure(
        f"{done:,} steps and {saves} saves, in 45 s after the first 500: memory {first:.0f} -> {last:.0f} MiB, "
        f"descriptors {files} -> {files_then}; {kept} checkpoints kept, {left} files left in /dev/shm"
    )
    assert left == 0
    assert kept <= 3
    assert process.returncode == 143
    assert last - first < 60
    assert files_then - files <= 3
