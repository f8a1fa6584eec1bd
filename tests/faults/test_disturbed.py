"""Plugins that misbehave, other numbers of ranks, secrets and names that steer a terminal."""

from __future__ import annotations

import json
import random
import signal
import zlib
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from faulty import SHORT, hashes, log, mim
from PIL import Image

from mim_framework.checkpoints.checkpoint import list_checkpoints, load
from mim_framework.registry.registry import Registry

PLUGINS = {
    "raises": "raise RuntimeError('boom')",
    "exits": "import sys\nsys.exit(3)",
    "misses": "import no_such_library_at_all",
    "syntax": "def (",
    "prints": "print('NOISE')",
}
MASKER = """
from mim_framework import Masker, Section
class Same(Masker):
    \"\"\"One of two.\"\"\"
    name = "same_name"
    class Config(Section):
        pass
def mim_maskers():
    return [Same]
"""


@pytest.mark.fault(row="15")
@pytest.mark.filterwarnings("ignore")
def test_broken_plugins_stand_beside_a_run(install_plugin, tmp_path: Path, figure) -> None:
    for name, source in PLUGINS.items():
        install_plugin(name, source)
    failures = Registry().load_all()
    named = [name for name in PLUGINS if name in failures]
    assert set(named) >= {"raises", "exits", "misses", "syntax"}
    ended = mim("run", "quickstart", *SHORT, "train.steps=2", f"output_dir={tmp_path}", "name=beside")
    assert ended.code == 0, ended.said
    figure(f"{len(named)} of 4 broken plugins named, the run of another one ends as without them")


@pytest.mark.fault(row="16")
def test_two_plugins_with_a_component_of_one_name(install_plugin, figure) -> None:
    from mim_framework.base.errors import PluginError

    source = MASKER.replace("def mim_maskers", "from mim_framework import hookimpl\n@hookimpl\ndef mim_maskers")
    install_plugin("first", source)
    install_plugin("second", source)
    with pytest.raises(PluginError, match="same_name") as told:
        Registry().find("masker", "same_name")
    assert "first" in str(told.value)
    assert "second" in str(told.value)
    assert Registry().find("masker", "first:same_name") is not Registry().find("masker", "second:same_name")
    figure("refused with both names; each can be had by its package")


@pytest.mark.fault(row="17")
def test_a_plugin_that_moves_the_generators(install_plugin, figure) -> None:
    install_plugin("moves", "import torch\ntorch.manual_seed(1)")
    before = torch.random.get_rng_state()
    with pytest.warns(RuntimeWarning, match="moves"):
        Registry().load_all()
    assert torch.equal(before, torch.random.get_rng_state())
    figure("named, and the generators put back")


def on_ranks(world: int, *arguments: object) -> None:
    process = faulty.started("run", *arguments, "--nproc-per-node", world)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def weights_differ(run_dir: Path, other: Path) -> float:
    """The largest difference between two weights of one name."""
    found = [load(list_checkpoints(each / "checkpoints")[-1]).tensors("model") for each in (run_dir, other)]
    return max((found[0][name] - found[1][name]).abs().max().item() for name in found[0])


@pytest.mark.fault(row="21")
def test_another_number_of_ranks(tmp_path: Path, figure) -> None:
    options = [*SHORT, "train.total_batch_size=12", "train.steps=6", f"output_dir={tmp_path}"]
    assert mim("run", "quickstart", *options, "name=one").code == 0
    losses = [[line["loss"] for line in log(tmp_path / "one")]]
    ranks = {"ddp_on_2": (2, "ddp"), "ddp_on_3": (3, "ddp"), "fsdp_on_2": (2, "fsdp")}
    for name, (world, mode) in ranks.items():
        on_ranks(world, "quickstart", *options, f"name={name}", f"train.distributed={mode}")
        losses.append([line["loss"] for line in log(tmp_path / name)])
    gap = max(abs(a - b) for each in losses for a, b in zip(losses[0], each, strict=True))
    figure(f"2 and 3 ranks and FSDP on 2: losses of 6 steps differ by at most {gap:.1e}")
    gaps = [f"{weights_differ(tmp_path / 'one', tmp_path / name):.1e} ({name.replace('_', ' ')})" for name in ranks]
    figure(f"quickstart, 6 steps of AdamW: weights differ from one process by {', '.join(gaps)}", row="28")
    assert gap < 1e-4


@pytest.mark.fault(row="21")
def test_another_number_of_ranks_at_every_start(tmp_path: Path, figure) -> None:
    options = ["quickstart", *SHORT, "train.total_batch_size=12", f"output_dir={tmp_path}", "optim.shape=constant"]
    assert mim("run", *options, "name=one", "train.steps=8").code == 0
    assert mim("run", *options, "name=turns", "train.steps=2").code == 0
    for world, last in ((2, 4), (4, 6), (3, 8)):
        on_ranks(world, *options, "name=turns", "--allow-change", "train.steps", f"train.steps={last}")
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("one", "turns")]
    assert len(losses[0]) == len(losses[1]) == 8
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    figure(f"1, 2, 4 and 3 ranks in turn: losses of 8 steps differ by at most {gap:.1e}")
    assert gap < 1e-4


@pytest.mark.fault(row="28")
def test_one_process_ddp_and_fsdp_give_the_same_weights(tmp_path: Path, figure) -> None:
    options = [*SHORT, "train.steps=8", f"output_dir={tmp_path}"]
    assert mim("run", "maskfeat_quickstart", *options, "name=one").code == 0
    for mode in ("ddp", "fsdp"):
        on_ranks(2, "maskfeat_quickstart", *options, f"name={mode}", f"train.distributed={mode}")
    gaps = [weights_differ(tmp_path / "one", tmp_path / mode) for mode in ("ddp", "fsdp")]
    figure(
        f"maskfeat_quickstart, 8 steps: weights differ from one process by {gaps[0]:.1e} (DDP), {gaps[1]:.1e} (FSDP)"
    )
    assert max(gaps) < 1e-5


def pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def vault() -> None:
    """A file system for `vault://user:password@host/FOLDER`, which is a local folder."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Vault(LocalFileSystem):
        protocol = "vault"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("vault://").split("/", 1)[1] if "://" in path else path

    fsspec.register_implementation("vault", Vault, clobber=True)


@pytest.mark.fault(row="o")
def test_a_password_in_an_address(tmp_path: Path, figure) -> None:
    images = pictures(tmp_path / "images", [f"{n}.png" for n in range(16)])
    (images / "broken.png").write_bytes(b"")
    url = f"vault://user:S3CRETpass@host{images}"
    source = "data.source=" + json.dumps({"type": "folder", "root": url})
    options = ["run", "quickstart", *SHORT, "checkpoint.every_steps=2", "train.steps=4", "data.workers=0",
               "data.max_broken=0.5", f"output_dir={tmp_path}", "name=secret", source]  # fmt: skip

    def killed() -> None:
        vault()
        faulty.at_step(3, faulty.kill)()

    first = mim(*options, fault=killed)
    assert first.code == -signal.SIGKILL, first.said
    again = mim(*options, fault=vault)  # the same command holds the password
    assert again.code == 0, again.said
    files = [path for path in (tmp_path / "secret").rglob("*") if path.is_file()]
    assert [path.name for path in files if b"S3CRET" in path.read_bytes()] == []
    assert "vault://***@host/" in (tmp_path / "secret" / "recipe.yaml").read_text()
    assert "S3CRET" not in first.said + again.said
    figure(f"it stands in 0 of {len(files)} files of the run and in 0 lines of its output; the resume works")


def too_large(data: bytes) -> bytes:
    """A PNG whose header claims 100,000 x 100,000 pixels."""
    header = data[12:16] + (100_000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


HARMS = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "not_an_image": lambda data: b"<html><body>404</body></html>" * 20,
    "too_large": too_large,
    "unreadable": None,
}


@pytest.mark.fault(row="11")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
def test_broken_images(share: float, tmp_path: Path, figure) -> None:
    images = pictures(tmp_path / "images", [f"{n:03d}.png" for n in range(200)])
    chosen = random.Random(1).sample(sorted(images.iterdir()), round(200 * share))
    broken = {path.name: list(HARMS)[n % len(HARMS)] for n, path in enumerate(chosen)}
    for name, cause in broken.items():
        if harm := HARMS[cause]:
            (images / name).write_bytes(harm((images / name).read_bytes()))
        else:
            (images / name).unlink()
            (images / name).symlink_to("nowhere.png")
    source = "data.source=" + json.dumps({"type": "folder", "root": str(images)})
    options = [*SHORT, "train.steps=25", f"output_dir={tmp_path}", "data.max_broken=0.5", source]
    found = []
    for workers in (0, 1, 2):
        ended = mim("run", "quickstart", *options, f"name=w{workers}", f"data.workers={workers}")
        assert ended.code == 0, ended.said
        file = tmp_path / f"w{workers}" / "broken_images.rank0.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if broken else []
        assert {line["name"]: line["cause"] for line in lines} == broken
        counted = sum(value for key, value in log(file.parent)[-1].items() if key.startswith("broken/"))
        assert counted == len(lines)
        found.append((hashes(file.parent), log(file.parent), lines))
    assert found[0] == found[1] == found[2]
    figure(f"{share:.0%} of 200: {len(broken)} of {len(broken)} named with their cause, 0, 1 and 2 workers alike")


@pytest.mark.fault(row="r")
def test_control_characters_in_names(tmp_path: Path, figure) -> None:
    images = pictures(tmp_path / "images", ["good.png"])
    for number in range(30):
        (images / f"\x1b]0;owned\x07{number}.png").write_bytes(b"")
    source = "data.source=" + json.dumps({"type": "folder", "root": str(images)})
    ended = mim("run", "quickstart", *SHORT, "train.steps=2", f"output_dir={tmp_path}", "name=names", source)
    assert ended.in_a_sentence
    assert "\x1b" not in ended.said
    assert "\\x1b]0;owned\\x07" in ended.said
    figure("written out as \\x1b: 0 escape characters on the terminal")


@pytest.mark.fault(row="25")
def test_the_same_command_twice_gives_the_same_bits(tmp_path: Path, figure) -> None:
    for name in ("one", "two"):
        assert mim("run", "quickstart", *SHORT, "train.steps=4", f"output_dir={tmp_path}", f"name={name}").code == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    figure("one process twice: the same bits")
