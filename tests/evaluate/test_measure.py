"""An evaluation reads the end of an encoder, or other layers that it need not know of, in one pass over the images."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import RECIPE

from mim_framework.base.section import Section
from mim_framework.builtins.vit import MaskTokenViT
from mim_framework.contract.components import Source
from mim_framework.contract.evaluation import Evaluation
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import EncoderSpec, Specs
from mim_framework.data.views import ImageViews
from mim_framework.evaluate.base import EncoderSubject, PixelSubject
from mim_framework.evaluate.measure import Layers, check, measure
from mim_framework.evaluate.splits import Splits
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.training.trainer import train


class Noise(Source):
    """Eight images in two classes."""

    name = "noise"
    classes = ("dark", "bright")

    def __len__(self) -> int:
        return 8

    def read(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.rand(8, 8, 3, generator=generator) * 127 + 127 * (index // 4)
        return Sample(pixels.byte().numpy(), str(index), index // 4)


class Sums(Evaluation):
    """The sum of all features of a kind, to be compared by hand."""

    name = "sums"

    class Config(Section):
        pool: str = "mean"
        ask: tuple[int, ...] = ()

    def __call__(self, subject):
        x = subject.features("train", pool=self.config.pool, layers=self.config.ask).x
        return {"sum": x.sum().item(), "width": float(x.shape[-1])}


class SumsOfItsLayers(Sums):
    """With an option of its own for layers."""

    class Config(Section):
        layers: tuple[int, ...] = ()

    def __call__(self, subject):
        x = subject.features("train", layers=self.config.layers).x
        return {"sum": x.sum().item(), "width": float(x.shape[-1])}


class OfTheEncoder(Evaluation):
    """Reads no features."""

    name = "weights"
    of_pixels = False


@pytest.fixture
def subject() -> EncoderSubject:
    views = ImageViews(ImageViews.Config(img_size=8))
    config = MaskTokenViT.Config(patch_size=4, embed_dim=16, depth=3, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = MaskTokenViT(config, Specs(views=views.specs))
    return EncoderSubject(
        encoder, views, Splits.of_pair(Noise(Section()), Noise(Section())), device=torch.device("cpu")
    )


@pytest.fixture
def passes(subject) -> list[int]:
    seen: list[int] = []
    subject.encoder.register_forward_hook(lambda module, arguments, latent: seen.append(len(arguments[0])))
    return seen


def sum_of(subject, layers, pool="mean") -> float:
    return subject.features("train", pool=pool, layers=layers).x.sum().item()


@pytest.mark.parametrize("cls", [Sums, SumsOfItsLayers])
def test_each_layer_by_itself_is_a_curve_over_depth_from_one_pass(subject, passes, cls):
    measured = measure(cls(cls.Config()), subject, "each")
    assert passes == [8]
    assert list(measured.numbers) == [f"layer{layer}_{name}" for layer in range(3) for name in ("sum", "width")]
    assert [measured.numbers[f"layer{layer}_sum"] for layer in range(3)] == [sum_of(subject, [n]) for n in range(3)]
    assert measured.asked == (("mean", (0,)), ("mean", (1,)), ("mean", (2,)))
    assert passes == [8]


@pytest.mark.parametrize("cls", [Sums, SumsOfItsLayers])
def test_several_layers_stand_side_by_side(subject, passes, cls):
    measured = measure(cls(cls.Config()), subject, (0, -1))
    assert measured.numbers == {"sum": pytest.approx(sum_of(subject, [0, 2])), "width": 32.0}
    assert (measured.asked, passes) == ((("mean", (0, -1)),), [8])


@pytest.mark.parametrize("cls", [Sums, SumsOfItsLayers])
def test_the_end_of_the_encoder_is_the_default_and_raw_pixels_have_no_layers(subject, cls):
    evaluation = cls(cls.Config())
    assert measure(evaluation, subject).numbers["sum"] == sum_of(subject, [])
    assert measure(evaluation, subject).asked == (("mean", ()),)
    of_pixels = measure(evaluation, PixelSubject(subject), "each")
    assert list(of_pixels.numbers) == ["sum", "width"]
    assert of_pixels.asked == ()


def test_patch_tokens_are_extracted_layer_by_layer_and_not_held(subject, passes):
    measured = measure(Sums(Sums.Config(pool="tokens")), subject, "each")
    assert passes == [8, 8, 8]
    assert not [key for key in subject._features if key[2] == "tokens"]
    assert measured.numbers["layer2_sum"] == pytest.approx(sum_of(subject, [2], pool="tokens"))


def test_an_evaluation_that_asks_for_layers_itself_cannot_be_given_others(subject):
    with pytest.raises(ValueError, match=r"asks for layers \[1\] itself; leave 'layers' out"):
        measure(Sums(Sums.Config(ask=(1,))), subject, "each")


@pytest.mark.parametrize(
    ("cls", "layers", "text"),
    [
        (Sums, (7,), r"layers \[7\] are none of the encoder's 3 blocks, which begin at 0"),
        (SumsOfItsLayers, (7,), r"layers \[7\] are none of the encoder's 3 blocks, which begin at 0"),
        (OfTheEncoder, "each", "it reads the encoder and no features of layers; leave 'layers' out"),
    ],
)
def test_layers_that_cannot_be_read_are_told_before_any_image_is(subject, cls, layers: Layers, text):
    with pytest.raises(ValueError, match=text):
        check(cls(cls.Config()), subject.spec, layers)
    check(cls(cls.Config()), subject.spec)


def test_an_encoder_that_hands_out_no_layers_has_no_curve():
    spec = EncoderSpec(dim=4, grid=Grid((2, 2)), stride=4, depth=1, num_heads=1)
    with pytest.raises(ValueError, match="layers is 'each', but the encoder hands out none of them"):
        check(Sums(Sums.Config()), spec, "each")


def test_a_run_logs_the_curve_over_depth(tmp_path):
    knn = {"type": "knn", "every_epochs": 0, "layers": "each", "max_train": 40, "max_test": 20}
    encoder = {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    recipe = {**RECIPE, "output_dir": str(tmp_path), "encoder": encoder, "decoder": "linear", "evaluate": [knn]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    run_dir = train(load_recipe(tmp_path / "r.yaml", [], Registry()), Registry())
    [line] = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" not in line]
    numbers = {f"knn_layer{layer}_{name}" for layer in (0, 1) for name in ("top1", "top5")}
    assert {key for key in line if key.startswith("knn")} == numbers
