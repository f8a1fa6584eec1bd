"""Features come from the whole image, once for all who ask, from any number of ranks, and leave the model as it was."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from mim_framework.assembly.opened import load_run
from mim_framework.assembly.splits import evaluation_splits
from mim_framework.base import rng
from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.builtins.vit import MaskTokenViT
from mim_framework.contract.components import Encoder
from mim_framework.contract.evaluation import Evaluation
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Latent, Sample
from mim_framework.contract.specs import Specs, ViewSpec
from mim_framework.contract.world import World
from mim_framework.evaluate.base import EncoderSubject, PixelSubject, raw_pixels, tokens_of
from mim_framework.evaluate.knn import KNN
from mim_framework.evaluate.splits import Splits
from mim_framework.registry.registry import Registry
from mim_framework.testing import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def run(make_run, registry):
    return load_run(make_run(), registry=registry)


@pytest.fixture
def passes(run):
    """The sizes of the batches that the encoder has seen."""
    seen = []
    run.objective.encoder.register_forward_hook(lambda module, arguments, latent: seen.append(len(arguments[0])))
    return seen


def splits_of(run) -> Splits:
    return evaluation_splits(run.recipe, Registry(), run.source)


def subject_of(run, **options) -> EncoderSubject:
    """The encoder of a run, judged by its own images, 9 to learn from and 6 to be tested on."""
    splits = splits_of(run)
    return EncoderSubject(run.objective.encoder, run.views, splits, device=CPU, **{"batch_size": 4, **options})


# --- what a feature is -----------------------------------------------------------------------------------------------


def test_a_feature_is_the_mean_of_all_tokens_or_the_class_token_or_every_token(run):
    run.objective.eval()
    view = torch.full((1, 3, 8, 8), 0.5)
    encoder = run.objective.encoder
    assert torch.equal(tokens_of(encoder, "mean", [None])({"x": view})[0], torch.full((1, 48), 1.5))
    assert torch.equal(tokens_of(encoder, "cls", [None])({"x": view})[0], torch.full((1, 48), 101.5))
    assert torch.equal(tokens_of(encoder, "tokens", [None])({"x": view})[0], torch.full((1, 4, 48), 1.5))


def test_tokens_that_an_encoder_hands_out_in_another_order_are_put_on_the_grid(run):
    class Backwards(Encoder):
        spec = run.objective.encoder.spec

        def forward(self, view, mask, ask):
            return Latent(torch.tensor([[[3.0], [2.0], [1.0], [0.0]]]), self.spec.grid, torch.tensor([[3, 2, 1, 0]]))

    [x] = tokens_of(Backwards(Section(), Specs()), "tokens", [None])({"x": torch.zeros(1, 3, 8, 8)})
    assert x.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_features_come_with_the_labels_of_their_images_in_order(run):
    features = subject_of(run).features("train")
    assert features.y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert features.x.shape == (9, 48)
    assert torch.allclose(features.x[0, :3], torch.tensor([1.0, 1.0, 1 + 100 / 255]))  # the first is a dark blue
    assert not features.x.requires_grad


def test_layers_stand_side_by_side_and_the_last_one_is_the_end_of_the_encoder(run):
    views = {"x": ViewSpec("x", size=(8, 8))}
    config = MaskTokenViT.Config(patch_size=4, embed_dim=16, depth=3, num_heads=2)
    run.objective.encoder = MaskTokenViT(config, Specs(views=views))
    subject = subject_of(run)
    both = subject.features("test", layers=[0, -1]).x
    assert torch.equal(both[:, 16:], subject.features("test").x)
    assert torch.equal(both[:, :16], subject.features("test", layers=[0]).x)
    assert not torch.allclose(both[:, :16], both[:, 16:])
    assert torch.equal(
        subject.features("test", pool="tokens", layers=[0, 2]).x.mean(1), subject.features("test", layers=[0, 2]).x
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": [0, 5]}, r"layers \[5\] are none of the encoder's 1 blocks, which begin at 0"),
        ({"layers": [-1]}, r"the encoder does not hand out layers \[0\]; it has layers \[\]"),
    ],
)
def test_layers_that_the_encoder_does_not_have_are_a_clear_error(run, options, text):
    with pytest.raises(ValueError, match=text):
        subject_of(run).features("train", **options)


def test_raw_pixels_are_those_of_the_image_averaged_down_if_they_are_many(run):
    small = torch.rand(2, 3, 8, 8)
    assert torch.equal(raw_pixels(run.views)({"x": small})[0], small.flatten(1))
    large = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    assert torch.equal(raw_pixels(run.views)({"x": large})[0], torch.full((1, 3 * 32 * 32), 0.5))


def test_pixels_stand_in_for_the_features_of_an_encoder(run, passes):
    pixels = PixelSubject(subject_of(run))
    assert torch.equal(pixels.features("train", layers=[0]).x, pixels.raw_pixels("train").x)
    assert pixels.features("train", pool="tokens").x.shape == (9, 1, 3 * 8 * 8)
    assert passes == []


# --- which images ----------------------------------------------------------------------------------------------------


def test_of_a_large_source_the_same_random_images_are_taken_each_time(run):
    subject = subject_of(run)
    whole, some = subject.raw_pixels("train"), subject.raw_pixels("train", limit=5)
    chosen = sorted(rng.permutation(0, "evaluation", 9)[:5].tolist())
    assert torch.equal(some.x, whole.x[chosen])
    assert torch.equal(some.y, whole.y[chosen])


def test_images_without_a_label_are_left_out_unless_they_are_wanted(run, monkeypatch, caplog):
    splits = splits_of(run)
    train = splits.sources["train"]
    read = train.read

    def without_greens(index: int) -> Sample:
        sample = read(index)
        return Sample(sample.data, sample.name) if sample.label == 1 else sample

    monkeypatch.setattr(train, "read", without_greens)
    subject = EncoderSubject(run.objective.encoder, run.views, splits, device=CPU)
    assert subject.raw_pixels("train").y.tolist() == [0, 0, 0, 2, 2, 2]
    assert len(subject.raw_pixels("train").x) == 6
    assert caplog.messages == ["evaluation on split 'train': of 9 images, 3 have no label; they are left out"]
    assert subject.raw_pixels("train", labelled=False).y.tolist() == [0, 0, 0, -1, -1, -1, 2, 2, 2]

    monkeypatch.setattr(train, "read", lambda index: Sample(read(index).data, "x"))
    subject = EncoderSubject(run.objective.encoder, run.views, splits, device=CPU)
    with pytest.raises(DataError, match="no image of source 'folder', split 'train', has a label and can be read"):
        subject.features("train")


def test_a_source_without_labels_is_a_single_split(make_run, registry):
    run = load_run(make_run(labels=False), registry=registry)
    subject = subject_of(run)
    assert subject.features("train", labelled=False).y.tolist() == [-1] * 9
    with pytest.raises(DataError, match="source 'folder' has no images of the split 'test'"):
        subject.features("test")


def test_what_an_evaluation_lacks_is_told_with_the_cure(make_run, registry):
    class WithoutLabels(Evaluation):
        needs = frozenset()

    splits = Splits.of(load_run(make_run(labels=False), registry=registry).source)
    assert splits.lacks(WithoutLabels(Section())) == ""
    assert splits.lacks(KNN(KNN.Config())) == (
        "it needs labelled images to learn from, source 'folder' has none. In a recipe, data.source.labels=true and "
        "data.eval_source={type: folder, root: FOLDER, labels: true} give them; `mim eval` takes them by --train "
        "SOURCE --test SOURCE too"
    )


# --- once, and without a trace ---------------------------------------------------------------------------------------


def test_images_pass_the_encoder_once_for_all_who_ask(run, passes):
    subject = subject_of(run)
    first = subject.features("train")
    assert passes == [4, 4, 1]
    assert torch.equal(subject.features("train", limit=1000).x, first.x)
    KNN(KNN.Config(k=1))(subject)
    KNN(KNN.Config(k=3))(subject)
    assert passes == [4, 4, 1, 4, 2]  # the six test images
    assert subject.features("train", pool="cls").x[0, 0] > 100  # came with the mean of the patch tokens
    assert passes == [4, 4, 1, 4, 2]
    subject.features("train", pool="tokens")
    assert passes == [4, 4, 1, 4, 2, 4, 4, 1]
    assert list(subject.asked) == [("mean", ()), ("cls", ()), ("tokens", ())]


def test_the_encoder_is_left_in_the_mode_in_which_it_was(run):
    encoder = run.objective.encoder
    encoder.train()
    encoder.dropout.eval()  # a part that was frozen by hand stays so
    subject = subject_of(run)
    assert KNN(KNN.Config(k=1))(subject) == {"top1": 1.0}
    with subject.frozen():
        assert (encoder.training, torch.is_grad_enabled()) == (False, False)
    assert (encoder.training, encoder.dropout.training) == (True, False)
    assert torch.is_grad_enabled()


def test_the_precision_of_the_run_holds_for_the_passes_and_not_for_what_is_made_of_them(run):
    inside = []

    @contextmanager
    def precision():
        inside.append(True)
        yield
        inside.pop()

    seen = []
    run.objective.encoder.register_forward_hook(lambda *_: seen.append(bool(inside)))
    subject = subject_of(run, precision=precision)
    subject.features("train")
    assert seen == [True] * 3
    assert inside == []


# --- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [[], [4], [1, 3, 5, 7]])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_ranks_share_the_reading_and_get_the_features_of_one(run, tmp_path, broken, batch_size):
    """9 images: rank 1 has one fewer, and with batches of 2 one batch fewer; all of its images may be broken."""
    paths = sorted((tmp_path / "train").rglob("*.png"))
    for index in broken:
        paths[index].write_bytes(b"")
    encoder = run.objective.encoder

    def extracted(world: World):
        passes, read = [], []
        splits = splits_of(run)
        original = splits.sources["train"].read
        splits.sources["train"].read = lambda index: (read.append(index), original(index))[1]
        hook = encoder.register_forward_hook(lambda *_: passes.append(1))
        subject = EncoderSubject(encoder, run.views, splits, device=CPU, world=world, batch_size=batch_size)
        features = subject.features("train")
        splits.sources["train"].read = original
        hook.remove()
        return features.x, features.y, read, len(passes)

    x, y, read, _ = extracted(World())
    assert read == list(range(9))
    ranks = run_ranks(lambda rank: extracted(World(rank, 2, rank)))
    assert [each[2] for each in ranks] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    assert ranks[0][3] == ranks[1][3]  # or a sharded encoder would wait for ever
    for x_of_rank, y_of_rank, *_ in ranks:
        if not broken:
            assert torch.equal(x_of_rank, x)
            assert torch.equal(y_of_rank, y)
        assert torch.equal(x_of_rank.sum(1).sort().values, x.sum(1).sort().values)
        assert torch.equal(y_of_rank.sort().values, y.sort().values)


def test_an_evaluation_is_the_same_on_two_ranks_as_on_one(run):
    def top1(world: World) -> float:
        return KNN(KNN.Config(k=3))(subject_of(run, world=world, batch_size=2))["top1"]

    alone = top1(World())
    assert run_ranks(lambda rank: top1(World(rank, 2, rank))) == [alone] * 2
    assert alone == 1.0


def test_nothing_is_hidden_from_an_encoder_that_is_judged(run):
    masks = []
    run.objective.encoder.register_forward_hook(lambda module, arguments, latent: masks.append(arguments[1]))
    subject_of(run, batch_size=9).features("train")
    [mask] = masks
    assert torch.equal(mask.hidden, Mask.none(9, run.objective.encoder.spec.grid, CPU).hidden)
