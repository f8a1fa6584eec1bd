"""`mim embed`: the features that calls give, in a file with names, labels and where they come from."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import mim_framework
from mim_framework.base.errors import DataError, MimError, RecipeError
from mim_framework.commands.cli import main
from mim_framework.commands.embed import blocks_of, run_embed
from mim_framework.features import embedding, stored
from mim_framework.registry.registry import Registry

NAMES = ["cats/0.png", "cats/1.png", "dogs/2.png", "dogs/4.png", "dogs/5.png"]
LABELS = [0, 0, 1, 1, 1]


@pytest.fixture
def images(tmp_path) -> Path:
    """Six files in two class folders, of which dogs/3.png is cut short."""
    rng = np.random.default_rng(0)
    for name in [*NAMES, "dogs/3.png"]:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "dogs" / "3.png").write_bytes(path.read_bytes()[:300])
    return tmp_path / "images"


def written(file: Path) -> dict:
    """What a file of features holds, whatever its format."""
    if file.suffix == ".npz":
        with np.load(file) as found:  # refuses pickles
            return {**found, "names": found["names"].tolist(), "facts": json.loads(str(found["mim_framework"]))}
    if file.suffix == ".safetensors":
        with safe_open(file, "np") as found:
            facts = json.loads(found.metadata()["mim_framework"])
        tensors = load_file(file)
        return {**tensors, "names": json.loads(bytes(tensors["names"])), "facts": facts}
    table = pyarrow.parquet.read_table(file)
    facts = json.loads(pyarrow.parquet.read_metadata(file).metadata[b"mim_framework"])
    features = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return {
        "features": features.reshape(table.num_rows, *facts["shape"]),
        "labels": np.array([-1 if label is None else label for label in table["label"].to_pylist()]),
        "names": table["name"].to_pylist(),
        "facts": facts,
    }


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
@pytest.mark.parametrize(("pool", "layers", "dtype"), [("mean", "", "float32"), ("tokens", "0,-1", "float16")])
def test_a_file_holds_what_calls_give(make_run, images, tmp_path, suffix, pool, layers, dtype):
    folder, _ = make_run()
    output = tmp_path / "new" / f"features.{suffix}"
    done = run_embed(
        str(folder), str(images), ["labels=true"], output, Registry(), pool=pool, layers=layers, dtype=dtype,
        batch_size=2, workers=0,
    )  # fmt: skip
    found = written(output)
    encoder = mim_framework.load(folder)
    wanted = encoder([images / name for name in NAMES], pool=pool, layers=blocks_of(layers, 3)).numpy()
    assert found["features"].dtype == dtype
    assert found["features"].shape == wanted.shape
    assert np.allclose(found["features"], wanted, atol=1e-5 if dtype == "float32" else 5e-3)
    assert (found["names"], found["labels"].tolist()) == (NAMES, LABELS)
    facts = found["facts"]
    assert facts["weights_sha256"] == encoder.weights_sha256
    assert {key: facts[key] for key in ("method", "run", "step", "images_seen", "pool", "dtype", "classes")} == {
        "method": "mae", "run": "small", "step": 9, "images_seen": 54, "pool": pool, "dtype": dtype,
        "classes": ["cats", "dogs"],
    }  # fmt: skip
    assert facts["broken"] == [{"index": 3, "name": "dogs/3.png", "cause": "truncated"}]
    assert facts["layers"] == ([0, 2] if layers else [])
    assert done.shape == tuple(facts["shape"]) == wanted.shape[1:]
    text = "\n".join(done.lines())
    assert "left out, as they cannot be used: 1 images (1 truncated): dogs/3.png" in text
    assert [each.name for each in output.parent.iterdir()] == [output.name]


def test_a_parquet_file_is_written_as_rows_come(make_run, images, tmp_path, monkeypatch):
    folder, _ = make_run()
    monkeypatch.setattr(stored, "GROUP_BYTES", 2 * 48 * 4)
    run_embed(str(folder), str(images), [], tmp_path / "f.parquet", Registry(), batch_size=1, workers=0)
    assert pyarrow.parquet.read_metadata(tmp_path / "f.parquet").num_row_groups == 3
    found = written(tmp_path / "f.parquet")
    assert (found["names"], found["labels"].tolist()) == (NAMES, [-1] * 5)


def test_the_command_embeds_the_images_of_the_run_or_those_of_any_source(make_run, images, tmp_path):
    folder, _ = make_run(data={"source": {"type": "folder", "root": str(images)}, "workers": 0})
    (images / "notes.txt").write_text("")
    output = tmp_path / "own.npz"
    result = CliRunner().invoke(main, ["embed", str(folder), "labels=true", "--workers=0", f"--output={output}"])
    assert result.exit_code == 0, result.output
    assert "5 images x 48 float32, " in result.stdout
    assert f"written: {output}" in result.stdout
    assert "no images, and left out: 1 .txt" in result.stderr
    assert written(output)["labels"].tolist() == LABELS
    digits = tmp_path / "digits.npz"
    command = ["embed", "timm:test_resnet,random,img_size=32", "digits", "split=test", "--batch-size=256"]
    result = CliRunner().invoke(main, [*command, "--workers=0", f"--output={digits}"])
    assert result.exit_code == 0, result.output
    found = written(digits)
    assert found["features"].shape == (359, mim_framework.load(command[1]).dim)
    assert set(found["labels"].tolist()) == set(range(10))
    assert found["facts"]["kind"] == "random"


def test_workers_change_nothing(make_run, images, tmp_path):
    folder, _ = make_run()
    for workers in (0, 2):
        output = tmp_path / f"{workers}.npz"
        run_embed(str(folder), str(images), [], output, Registry(), batch_size=2, workers=workers)
    found = [written(tmp_path / f"{workers}.npz") for workers in (0, 2)]
    assert np.array_equal(found[0]["features"], found[1]["features"])
    assert found[0]["names"] == found[1]["names"]


def test_a_file_of_before_is_replaced_whole_or_kept(make_run, images, tmp_path):
    folder, _ = make_run()
    for suffix in ("npz", "safetensors", "parquet"):
        output = tmp_path / f"features.{suffix}"
        run_embed(str(folder), str(images), [], output, Registry(), workers=0)
        before = output.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
        try:
            with pytest.raises(MimError, match=f"cannot write .*features.{suffix}"):
                run_embed(str(folder), str(images), [], output, Registry(), pool="tokens", workers=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert output.read_bytes() == before
    assert {each.name for each in tmp_path.glob("*features*")} == {
        "features.npz", "features.parquet", "features.safetensors"
    }  # fmt: skip


def test_features_that_do_not_fit_are_named(make_run, images, tmp_path):
    encoder = mim_framework.load(make_run()[0])
    source = Registry().find("source", "folder")
    options = {"source": source(source.Config(root=str(images))), "output": tmp_path / "f.npz"}
    with torch.no_grad():
        encoder.module.norm.weight.fill_(1e6)
    with pytest.raises(DataError, match=r"cats/0\.png: its features reach .* too large for float16; use"):
        embedding.embed(encoder, **options, dtype="float16")
    with torch.no_grad():
        encoder.module.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"cats/0\.png: its features are no finite numbers"):
        embedding.embed(encoder, **options)
    assert not (tmp_path / "f.npz").exists()


def test_wrong_use_is_one_clear_sentence(make_run, images, tmp_path, monkeypatch):
    folder, _ = make_run()

    def refused(error, text, subject=str(folder), place=str(images), changes=(), output="f.npz", **options):
        with pytest.raises(error, match=text):
            run_embed(subject, place, changes, tmp_path / output, Registry(), workers=0, **options)

    refused(MimError, r"f\.csv: a file of features ends in \.parquet, \.npz, \.safetensors", output="f.csv")
    refused(RecipeError, r"layers \[3\] are none of the encoder's 3 blocks", layers="3")
    refused(RecipeError, "--layers last: give numbers of blocks such as 5,11 or -1, or each", layers="last")
    refused(RecipeError, "source 'folder': .*lables: unknown key, did you mean 'labels'", changes=["lables=true"])
    refused(RecipeError, "test_vit,random has no images of its own; name a folder", "timm:test_vit,random", None)
    refused(DataError, "gone", place=str(tmp_path / "gone"))
    for each in images.rglob("*.png"):
        each.write_bytes(b"")
    text = r"none of 6 images can be used \(6 empty\)\. First: cats/0\.png \(the file has no bytes\)"
    refused(DataError, text)
    monkeypatch.setattr(stored, "find_spec", lambda name: None)
    text = r"pyarrow is not installed; pip install 'mim-framework\[parquet\]', or write a \.npz or"
    refused(MimError, text, output="f.parquet")
    assert [each.name for each in tmp_path.glob("*f.*")] == []
    result = CliRunner().invoke(main, ["embed", str(folder), "a", "b", "--output=f.npz"])
    assert "name one folder or source, got a, b" in result.output


def test_each_means_all_blocks():
    assert blocks_of("each", 3) == [0, 1, 2]
    assert blocks_of("", 3) == []
    assert blocks_of("-1,0", 3) == [-1, 0]
