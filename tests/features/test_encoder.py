"""`mim_framework.load`: images of any kind in, features out, as the evaluations see them."""

from __future__ import annotations

import io
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import mim_framework
from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.evaluate.base import EncoderSubject
from mim_framework.registry.registry import Registry


@pytest.fixture
def images(tmp_path):
    """Three pictures of other sizes than the view's, in two class folders, as files."""
    rng = np.random.default_rng(0)
    for name, size in {"a/0": (40, 50), "a/1": (32, 32), "b/2": (60, 33)}.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    return sorted((tmp_path / "images").rglob("*.png"))


@pytest.fixture
def encoder(make_run):
    return mim_framework.load(make_run()[0])


def test_it_says_what_it_is(encoder):
    assert (encoder.dim, encoder.grid.shape, encoder.img_size) == (48, (4, 4), (32, 32))
    assert (encoder.origin.method, encoder.origin.step, encoder.device.type) == ("mae", 9, "cpu")
    assert re.fullmatch(r"FrozenEncoder\('.*/run', dim=48, grid=4x4, img_size=32x32\)", repr(encoder))
    assert isinstance(encoder, mim_framework.FrozenEncoder)


def test_images_of_every_kind_have_the_same_features(encoder, images):
    features = encoder(images)
    assert (features.shape, features.dtype, features.requires_grad) == ((3, 48), torch.float32, False)
    opened = [Image.open(path) for path in images]
    kinds = [
        [str(path) for path in images],
        opened,
        [np.asarray(image) for image in opened],
        [path.read_bytes() for path in images],
        torch.stack([encoder.transform(path) for path in images]),
        torch.stack([encoder.transform(path) for path in images]).double(),
        tuple(images),
    ]
    for kind in kinds:
        assert torch.allclose(encoder(kind), features, atol=1e-5)
    assert torch.allclose(encoder(images, batch_size=2), features, atol=1e-5)
    for one in (images[1], opened[1], np.asarray(opened[1]), encoder.transform(images[1])):
        assert torch.allclose(encoder(one), features[1:2], atol=1e-5)


@pytest.mark.parametrize("layers", [(), (0,), (1, -1)])
def test_features_are_those_that_evaluations_read(encoder, images, layers):
    source = Registry().find("source", "folder")
    splits = SimpleNamespace(sources={"train": source(source.Config(root=str(images[0].parents[1]), labels=True))})
    subject = EncoderSubject(encoder.module, encoder.transform.views, splits, device=encoder.device)
    for pool in ("mean", "cls", "tokens"):
        wanted = subject.features("train", pool=pool, layers=layers, labelled=False).x
        assert torch.allclose(encoder(images, pool=pool, layers=layers), wanted, atol=1e-5)
    assert torch.equal(encoder.tokens(images, layers=layers), encoder(images, pool="tokens", layers=layers))
    assert encoder.tokens(images, layers=layers).shape == (3, 16, 48 * max(1, len(layers)))


def test_the_transform_serves_data_sets_of_others(encoder, images):
    data = ImageFolder(str(images[0].parents[1]), transform=encoder.transform)
    batches = [encoder(batch) for batch, _ in DataLoader(data, batch_size=2)]
    assert torch.allclose(torch.cat(batches), encoder(images), atol=1e-5)
    again = pickle.loads(pickle.dumps(encoder.transform))
    assert torch.equal(again(images[0]), encoder.transform(images[0]))


def test_the_transform_normalises_as_the_run_did(encoder):
    grey = np.full((50, 40, 3), 51, dtype=np.uint8)  # 0.2
    found = encoder.transform(grey)
    assert found.shape == (3, 32, 32)
    assert found[:, 0, 0].tolist() == pytest.approx(
        [(0.2 - 0.5) / 0.2, (0.2 - 0.4) / 0.3, (0.2 - 0.3) / 0.25], abs=1e-5
    )


def test_gradients_flow_if_they_are_asked_for(encoder, images):
    batch = torch.stack([encoder.transform(path) for path in images]).requires_grad_()
    assert not encoder(batch).requires_grad
    encoder(batch, grad=True).square().sum().backward()
    assert batch.grad.abs().sum() > 0
    assert encoder.module.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_features_come_in_the_dtype_that_is_wanted(make_run, images, dtype):
    folder, _ = make_run()
    exact = mim_framework.load(folder)(images)
    found = mim_framework.load(folder, dtype=dtype)(images)
    assert str(found.dtype).endswith(str(dtype).removeprefix("torch."))
    assert torch.allclose(found.float(), exact, atol=0.05 * exact.abs().max())


def test_wrong_use_is_one_clear_sentence(encoder, images, make_run, tmp_path):
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:200])
    stream = io.BytesIO()
    cases = [
        (
            (torch.zeros(2, 3, 16, 16),),
            ValueError,
            r"got a tensor float32 \(2, 3, 16, 16\); .* floats \(B, 3, 32, 32\)",
        ),
        ((torch.zeros(2, 3, 32, 32, dtype=torch.uint8),), ValueError, r"got a tensor uint8 .* encoder\.transform"),
        (([],), ValueError, "no images are given"),
        ((str(tmp_path / "gone.png"),), DataError, r"gone\.png cannot be read: No such file"),
        ((tmp_path / "broken.png",), BrokenImage, r"broken\.png: truncated"),
        ((b"",), BrokenImage, "the image given as bytes: empty"),
        ((stream,), BrokenImage, "the image given as BytesIO: unsupported: got a BytesIO; a sample is bytes"),
    ]
    for arguments, error, text in cases:
        with pytest.raises(error, match=text):
            encoder(*arguments)
    for options, text in (
        ({"layers": [3]}, r"layers \[3\] are none of the encoder's 3 blocks, which begin at 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"pool": "max"}, "pool is 'max', which is none of mean, cls, tokens"),
    ):
        with pytest.raises(ValueError, match=text):
            encoder(images, **options)
    with pytest.raises(ValueError, match="dtype 'int8' is none of float32, float16, bfloat16"):
        mim_framework.load(tmp_path / "run", dtype="int8")


def test_an_encoder_without_a_class_token_says_so(images):
    encoder = mim_framework.load("timm:test_resnet,random,img_size=64")
    assert encoder(images).shape == (3, encoder.dim)
    with pytest.raises(ValueError, match="the encoder has no class token; use pool=mean"):
        encoder(images, pool="cls")
