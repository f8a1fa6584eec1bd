"""Cached features are those of the very weights, views and images, or they are extracted anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mim_framework.assembly.opened import load_run
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base.errors import DataError
from mim_framework.evaluate.base import EncoderSubject
from mim_framework.evaluate.cache import FeatureCache, about_source, weights_hash
from mim_framework.registry.registry import Registry

CPU = torch.device("cpu")


@pytest.fixture
def run(make_run, registry):
    return load_run(make_run(), registry=registry)


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def passes(run) -> list[int]:
    """Images that the encoder has seen, pass by pass."""
    seen: list[int] = []
    run.objective.encoder.register_forward_hook(lambda module, arguments, latent: seen.append(len(arguments[0])))
    return seen


def subject_of(run, cache: FeatureCache | None) -> EncoderSubject:
    splits = evaluation_splits(run.recipe, Registry(), run.source)
    return EncoderSubject(run.objective.encoder, run.views, splits, device=CPU, cache=cache)


def assert_features_are_right(run, cache: FeatureCache) -> None:
    for pool in ("mean", "cls", "tokens"):
        wanted, found = (subject_of(run, each).features("train", pool=pool) for each in (None, cache))
        assert torch.equal(found.x, wanted.x)
        assert torch.equal(found.y, wanted.y)


def test_features_are_read_and_not_extracted_the_second_time(run, cache, passes):
    assert_features_are_right(run, cache)
    assert cache.size()[0] == 3
    passes.clear()
    subject = subject_of(run, cache)
    subject.features("train", pool="cls")
    subject.features("train", pool="tokens")
    assert passes == []
    pixels = subject.raw_pixels("train")
    assert torch.equal(subject_of(run, cache).raw_pixels("train").x, pixels.x)
    assert cache.size()[0] == 4


def test_other_weights_images_or_limits_have_other_features(run, cache, passes, tmp_path):
    assert_features_are_right(run, cache)
    with torch.no_grad():
        run.objective.encoder.scale.mul_(2)
    assert_features_are_right(run, cache)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "train" / "red" / "more.png")
    run = load_run(tmp_path / "colours", registry=run_registry(run))
    assert len(subject_of(run, cache).features("train").x) == 10
    assert len(subject_of(run, cache).features("train", limit=4).x) == 4
    assert len(subject_of(run, cache).features("test").x) == 6


def run_registry(run):
    from mim_framework.testing import RegistryWith

    return RegistryWith(type(run.objective.encoder))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other"])
def test_a_damaged_file_is_told_and_its_features_are_extracted_anew(run, cache, passes, damage, caplog):
    assert_features_are_right(run, cache)
    for path in cache.folder.iterdir():
        content = bytearray(path.read_bytes())
        if damage == "bit":
            content[-1] ^= 1
        path.write_bytes({"cut": content[:-40], "bit": content, "empty": b""}.get(damage, content))
        if damage == "other":  # whole, but not what its name says
            save_file(load_file(path), path, {"about": "{}", "sha256": "0"})
    passes.clear()
    assert_features_are_right(run, cache)
    assert len([text for text in caplog.messages if "is damaged" in text]) == 3
    assert len(passes) == 5  # three without a cache, and two for it
    caplog.clear()
    assert_features_are_right(run, cache)
    assert caplog.messages == []


def test_a_folder_that_cannot_be_written_is_a_clear_error(run, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"--cache .*cache: cannot write \w+\.safetensors: "):
        subject_of(run, FeatureCache(tmp_path / "cache")).features("train")


def test_the_hash_of_weights_follows_from_names_values_and_types():
    def of(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_hash(module)

    one = torch.ones(2)
    every = [of(a=one), of(b=one), of(a=one * 2), of(a=one.double()), of(a=one[:, None]), of(a=one, b=one), of()]
    assert len(set(every)) == len(every)
    assert of(a=one, b=one * 2) == of(b=one * 2, a=one)


def test_a_source_is_known_by_its_options_classes_and_files(run, tmp_path: Path):
    about = about_source(run.source)
    assert (about["source"], about["classes"], about["num_images"]) == ("folder", ["blue", "green", "red"], 9)
    assert about["options"] == {"root": f"{tmp_path}/train", "labels": True, "list": None, "pages": "first"}
    assert {"names", "sizes"} <= about.keys()
