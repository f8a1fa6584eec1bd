"""Plugins that misbehave, other numbers of ranks, secrets and names that steer a terminal."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from faulty import SHORT, hashes, log, mim
from PIL import Image

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


@pytest.mark.fault(row="21")
def test_another_number_of_ranks(tmp_path: Path, figure) -> None:
    options = [
        *SHORT,
        "train.total_batch_size=12",
        "train.steps=6",
        "checkpoint.every_steps=3",
        f"output_dir={tmp_path}",
    ]
    losses = {}
    for world, mode in ((1, "ddp"), (2, "ddp"), (3, "ddp"), (2, "fsdp")):
        name = f"r{world}{mode}"
        changes = [f"name={name}", f"train.distributed={mode}"]
        process = faulty.started("run", "quickstart", *options, *changes, "--nproc-per-node", world)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        losses[name] = [line["loss"] for line in log(tmp_path / name)]
    first = losses["r1ddp"]
    gap = max(abs(a - b) for each in losses.values() for a, b in zip(first, each, strict=True))
    figure(f"2 and 3 ranks and FSDP on 2: losses of 6 steps differ by at most {gap:.1e}")
    assert gap < 1e-4


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
