"""Runs that are killed, stopped, damaged or disturbed: what is kept, what is said, and that they go on bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
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


@pytest.mark.fault(row="23")
@pytest.mark.parametrize("recipe", METHODS)
def test_resumed_with_accumulation_on_other_workers(recipe: str, tmp_path: Path, figure) -> None:
    options = [*SHORT, "train.steps=8", "checkpoint.every_steps=3", "train.batch_size=8", f"output_dir={tmp_path}"]
    assert mim("run", recipe, *options, "name=whole").code == 0
    assert mim("run", recipe, *options, "name=k", "data.workers=1", fault=at_step(5, faulty.kill)).code < 0
    assert mim("run", recipe, *options, "name=k", "data.workers=0").code == 0
    assert hashes(tmp_path / "k") == hashes(tmp_path / "whole")
    figure(f"{recipe}: weights, optimizer and state are equal to the bit")


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


@pytest.mark.fault(row="kill -9 of export")
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
    began = time.monotonic()
    while time.monotonic() - began < 70:
        time.sleep(5)
        if time.monotonic() - began > 30:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            process_facts.append((pages * 4096 / 2**20, len(os.listdir(f"/proc/{process.pid}/fd"))))
    process.terminate()
    process.communicate(timeout=60)
    (first, files), (last, files_then) = process_facts[0], process_facts[-1]
    done = log(tmp_path / "soak")[-1]["step"]
    figure(f"{done:,} steps in 70 s: memory {first:.0f} -> {last:.0f} MiB, descriptors {files} -> {files_then}")
    assert process.returncode == 143
    assert last - first < 60
    assert files_then - files <= 3
