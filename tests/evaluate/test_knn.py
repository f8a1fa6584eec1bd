"""Neighbours vote as in the paper, features come from the whole image, and the model is left as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mim_framework.assembly.opened import load_run
from mim_framework.base import rng
from mim_framework.base.errors import CheckpointError, DataError
from mim_framework.checkpoints.checkpoint import find_latest, save_checkpoint
from mim_framework.commands.evaluate import evaluate_run
from mim_framework.contract.records import Sample
from mim_framework.contract.world import World
from mim_framework.evaluate import knn
from mim_framework.evaluate.knn import (
    KNNSection,
    check_pool,
    features,
    knn_predict,
    knn_top1,
    online_knn,
    pooled_tokens,
    raw_pixels,
)
from mim_framework.testing import run_ranks

CPU = torch.device("cpu")


def predict(train_x, train_y, test_x, **options):
    options = {"k": 3, "temperature": 0.07, "num_classes": 3, **options}
    return knn_predict(torch.tensor(train_x), torch.tensor(train_y), torch.tensor(test_x), **options).tolist()


def test_one_neighbour_by_hand():
    train_x, train_y = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [2, 0, 1]
    assert predict(train_x, train_y, [[5.0, 1.0], [0.1, 0.2], [-0.01, 0.0]], k=1) == [2, 0, 1]


def test_neighbours_are_chosen_by_direction_and_not_by_length():
    assert predict([[100.0, 100.0], [0.01, 0.0]], [0, 1], [[1.0, 0.1]], k=1) == [1]


def test_a_near_neighbour_outvotes_two_far_ones_at_a_low_temperature_only():
    angles = [0.0, 0.5, -0.5]  # similarities to the test image: 1, 0.878 and 0.878
    train_x = [[math.cos(angle), math.sin(angle)] for angle in angles]
    assert 2 * math.exp((math.cos(0.5) - 1) / 0.1) < 1
    assert 2 * math.exp((math.cos(0.5) - 1) / 1.0) > 1
    assert predict(train_x, [0, 1, 1], [[1.0, 0.0]], temperature=0.1) == [0]
    assert predict(train_x, [0, 1, 1], [[1.0, 0.0]], temperature=1.0) == [1]


def test_more_neighbours_than_images_means_all_of_them():
    assert predict([[1.0, 0.0], [0.0, 1.0]], [0, 2], [[0.0, 3.0]], k=20) == [2]


def test_chunks_do_not_change_the_result(monkeypatch):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 3
    options = {"k": 5, "temperature": 0.07, "num_classes": 3}
    whole = knn_predict(x[:30], y[:30], x[30:], **options)
    monkeypatch.setattr(knn, "_SIMILARITIES_AT_ONCE", 70)  # two test images at a time
    assert torch.equal(knn_predict(x[:30], y[:30], x[30:], **options), whole)


def test_neighbours_are_found_in_full_precision_under_autocast():
    angles = torch.tensor([0.0100, 0.0101])  # one direction in bfloat16
    train_x = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = knn_predict(train_x, torch.tensor([0, 1]), train_x, k=1, temperature=0.07, num_classes=2)
    assert found.tolist() == [0, 1]


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(make_run, registry):
    return load_run(make_run(), registry=registry)


def test_features_are_the_mean_of_all_tokens_or_the_class_token(run):
    run.objective.eval()
    view = torch.full((1, 3, 8, 8), 0.5)
    encoder = run.objective.encoder
    assert torch.equal(pooled_tokens(encoder)(view), torch.full((1, 48), 1.5))
    assert torch.equal(pooled_tokens(encoder, "cls")(view), torch.full((1, 48), 101.5))


def test_features_come_with_the_labels_of_their_images_in_order(run):
    run.objective.eval()
    x, y = features(pooled_tokens(run.objective.encoder), run.views, run.source, batch_size=4, device=CPU)
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert x.shape == (9, 48)
    assert torch.allclose(x[0, :3], torch.tensor([1.0, 1.0, 1 + 100 / 255]))  # the first is a dark blue
    assert not x.requires_grad


def test_of_a_large_source_the_same_random_images_are_taken_each_time(run):
    extract = raw_pixels(run.views)
    whole, labels = features(extract, run.views, run.source, batch_size=4, device=CPU)
    some, some_labels = features(extract, run.views, run.source, batch_size=4, device=CPU, limit=5)
    chosen = sorted(rng.permutation(0, "evaluation", 9)[:5].tolist())
    assert torch.equal(some, whole[chosen])
    assert torch.equal(some_labels, labels[chosen])


def test_images_without_a_label_are_left_out(run, monkeypatch):
    read = run.source.read

    def without_greens(index: int) -> Sample:
        sample = read(index)
        return Sample(sample.data, sample.name) if sample.label == 1 else sample

    monkeypatch.setattr(run.source, "read", without_greens)
    x, y = features(raw_pixels(run.views), run.views, run.source, batch_size=4, device=CPU)
    assert y.tolist() == [0, 0, 0, 2, 2, 2]
    assert len(x) == 6

    monkeypatch.setattr(run.source, "read", lambda index: Sample(read(index).data, "x"))
    with pytest.raises(DataError, match="kNN needs labelled images, source 'folder' has none that can be read"):
        features(raw_pixels(run.views), run.views, run.source, batch_size=4, device=CPU)


def test_raw_pixels_are_those_of_the_image_averaged_down_if_they_are_many(run):
    small = torch.rand(2, 3, 8, 8)
    assert torch.equal(raw_pixels(run.views)(small), small.flatten(1))
    large = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    assert torch.equal(raw_pixels(run.views)(large), torch.full((1, 3 * 32 * 32), 0.5))


def test_a_class_token_that_is_not_there_is_a_clear_error(run):
    section, encoder = KNNSection(pool="cls"), run.objective.encoder
    check_pool(encoder.spec, section)
    encoder.spec = replace(encoder.spec, num_prefix_tokens=0)
    check_pool(encoder.spec, KNNSection(pool="mean"))
    for check in (
        lambda: check_pool(encoder.spec, section),
        lambda: online_knn(encoder, run.views, run.source.evaluation_sources(), section, CPU),
    ):
        with pytest.raises(
            ValueError, match="pool is 'cls', but the encoder has no class token; use evaluate.knn.pool="
        ):
            check()


def test_the_encoder_is_left_in_the_mode_in_which_it_was(run):
    encoder = run.objective.encoder
    encoder.train()
    encoder.dropout.eval()  # a part that was frozen by hand stays so
    top1 = online_knn(encoder, run.views, run.source.evaluation_sources(), KNNSection(k=1), CPU)
    assert top1 == 1.0
    assert (encoder.training, encoder.dropout.training) == (True, False)
    assert torch.is_grad_enabled()


def test_a_class_that_only_the_test_images_have_is_never_right(run):
    train, test = run.source.evaluation_sources()
    without_red = type(train)(train.config)
    without_red.read = lambda index: train.read(index % 6)
    assert knn_top1(raw_pixels(run.views), run.views, (without_red, test), KNNSection(k=1), CPU) == pytest.approx(4 / 6)


@pytest.mark.parametrize("broken", [[], [4], [1, 3, 5, 7]])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_ranks_share_the_reading_and_get_the_features_of_one(run, tmp_path, broken, batch_size):
    """9 images: rank 1 has one fewer, and with batches of 2 one batch fewer; all of its images may be broken."""
    paths = sorted((tmp_path / "train").rglob("*.png"))
    for index in broken:
        paths[index].write_bytes(b"")
    encoder = run.objective.encoder.eval()

    def extracted(world: World):
        passes, read = [], []
        original, extract = run.source.read, pooled_tokens(encoder)
        run.source.read = lambda index: (read.append(index), original(index))[1]
        x, y = features(
            lambda view: (passes.append(1), extract(view))[1],
            run.views, run.source, batch_size=batch_size, device=CPU, world=world,
        )  # fmt: skip
        run.source.read = original
        return x, y, read, len(passes)

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


def test_online_knn_is_the_same_on_two_ranks_as_on_one(run):
    def top1(world: World) -> float:
        sources = run.source.evaluation_sources()
        return online_knn(run.objective.encoder, run.views, sources, KNNSection(k=3, batch_size=2), CPU, world=world)

    alone = top1(World())
    assert run_ranks(lambda rank: top1(World(rank, 2, rank))) == [alone] * 2
    assert alone == 1.0


def test_nothing_is_computed_in_float64_which_not_every_device_has(run, monkeypatch):
    def refused(tensor):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch.Tensor, "double", refused)
    assert knn_top1(raw_pixels(run.views), run.views, run.source.evaluation_sources(), KNNSection(k=1), CPU) == 1.0


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_is_compared_with_raw_pixels_and_its_untrained_encoder(make_run, registry):
    run_dir = make_run()
    found = evaluate_run(run_dir, registry=registry)
    assert found == {"raw_pixels": 1.0, "untrained": pytest.approx(1 / 3), "trained": 1.0}
    checkpoint = run_dir / "checkpoints" / "step_00000007"
    assert evaluate_run(run_dir, checkpoint=checkpoint, registry=registry, section=KNNSection(k=3)) == found


def test_a_run_without_labels_is_told_how_to_have_them(make_run, registry):
    with pytest.raises(DataError, match=r"source 'folder' of .*colours has none\. A folder has them with data.source"):
        evaluate_run(make_run(labels=False), registry=registry)


def test_a_run_whose_model_has_no_encoder_is_refused(make_run, registry):
    run_dir = make_run()
    found = find_latest(run_dir / "checkpoints")
    renamed = {name.replace("encoder.", "student."): tensor for name, tensor in found.tensors("model").items()}
    save_checkpoint(run_dir / "checkpoints", found.step + 1, {"model": renamed}, found.state)
    with pytest.raises(CheckpointError, match=r"step_\d+: no name starting with 'encoder\.'"):
        evaluate_run(run_dir, registry=registry)
