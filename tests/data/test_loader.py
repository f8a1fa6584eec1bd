from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image as pil
from pydantic import ValidationError

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.section import Choice
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.data import prefetch
from mim_framework.data.loader import TOLERATED_BROKEN, DataSection, Loader, evaluation_batches
from mim_framework.data.order import BatchLayout, SampleOrder
from mim_framework.data.reader import Broken
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.views import ImageViews

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # a machine of one core

NUM_SAMPLES = 20


class Numbers(Source):
    """Sample i is a picture whose red channel is i everywhere and whose green one is a ramp, to see crops and flips."""

    name = "numbers"

    def __init__(self, broken: frozenset[int] = frozenset(), num_samples: int = NUM_SAMPLES) -> None:
        self.broken, self.num_samples = broken, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def read(self, index: int) -> Sample:
        if index in self.broken:
            raise BrokenImage(f"{index}.jpg", "truncated", "half of it is missing")
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[..., 0] = index
        pixels[..., 1] = np.arange(256).reshape(16, 16)
        return Sample(pixels, f"{index}.jpg", index % 3)


def make_loader(source: Source | None = None, layout: BatchLayout | None = None, **options) -> Loader:
    section = {key: options.pop(key) for key in ("workers", "max_broken") if key in options}
    defaults = {"seed": 0, "start_step": 0, "total_steps": 6, "device": torch.device("cpu")}
    return Loader(
        DataSection(source=Choice(type="numbers"), **{"workers": 0, **section}),
        source or Numbers(),
        ImageViews(ImageViews.Config(img_size=8)),
        layout=layout or BatchLayout(total_batch_size=8, batch_size=4),
        **{**defaults, **options},
    )


def stream(*loaders: Loader) -> dict[int, torch.Tensor]:
    """Position -> picture, over everything that the loaders yield."""
    return {
        position: view
        for loader in loaders
        for batch in loader
        for position, view in zip(batch.positions.tolist(), batch.views["x"], strict=True)
    }


def assert_same(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[position], b[position]) for position in a)


def samples_of(pictures: dict[int, torch.Tensor]) -> list[int]:
    return [int(pictures[position][0].unique()) for position in sorted(pictures)]


# --- order and layout --------------------------------------------------------------------------------------------


def test_the_positions_of_ranks_and_micro_batches_by_hand():
    layouts = [BatchLayout(total_batch_size=12, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert layouts[0].accum_steps == 3
    assert [list(layouts[0].positions(0, micro)) for micro in range(3)] == [[0, 1], [4, 5], [8, 9]]
    assert [list(layouts[1].positions(1, micro)) for micro in range(3)] == [[14, 15], [18, 19], [22, 23]]


def test_a_total_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="total_batch_size 10 is not a multiple of batch_size 4 x 2 ranks"):
        BatchLayout(total_batch_size=10, batch_size=4, rank=0, world_size=2)


def test_every_epoch_is_its_own_permutation():
    order = SampleOrder(seed=3, num_samples=5)
    drawn = order.indices(range(15))
    for epoch in range(3):
        assert drawn[5 * epoch : 5 * epoch + 5] == rng.permutation(3, f"epoch {epoch}", 5).tolist()
    assert SampleOrder(3, 5).indices([12, 1, 7]) == [drawn[12], drawn[1], drawn[7]]


def test_batches_arrive_in_order_with_the_samples_of_their_positions():
    loader = make_loader()
    batches = list(loader)
    assert [(batch.step, batch.micro) for batch in batches] == [(step, micro) for step in range(6) for micro in (0, 1)]
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(48))
    assert batches[0].positions.dtype == torch.int64
    assert batches[0].views["x"].dtype == torch.uint8
    assert samples_of(stream(loader)) == SampleOrder(0, NUM_SAMPLES).indices(range(48))
    assert loader.wait_seconds > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(workers):
    source = Numbers(broken=frozenset({3, 11}))
    assert_same(stream(make_loader(source, max_broken=1)), stream(make_loader(source, max_broken=1, workers=workers)))


def test_any_layout_gives_the_same_samples_and_crops():
    one = stream(make_loader(layout=BatchLayout(8, 8)))
    assert len({tuple(picture[1].flatten().tolist()) for picture in one.values()}) > 40  # the crops differ
    assert_same(one, stream(make_loader(layout=BatchLayout(8, 2))))
    assert_same(one, stream(*(make_loader(layout=BatchLayout(8, 2, rank, 2)) for rank in (0, 1))))


def test_a_resumed_run_gives_the_tail():
    everything = stream(make_loader())
    tail = stream(make_loader(start_step=4, workers=1))
    assert_same(tail, {position: everything[position] for position in range(32, 48)})


def test_another_seed_gives_another_order_and_other_crops():
    a, b = stream(make_loader()), stream(make_loader(seed=1))
    assert samples_of(a) != samples_of(b)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(total_steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_that_is_left_early_leaves_no_process():
    batches = iter(make_loader(workers=1))
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    batches.close()
    assert multiprocessing.active_children() == []


def test_a_worker_outlives_the_signals_to_the_whole_job():
    batches = iter(make_loader(workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
        os.kill(worker.pid, number)
        time.sleep(0.02)  # pending ones of a kind would count as one
    assert len(list(batches)) == 11


def test_a_worker_takes_a_late_sigterm_for_itself(monkeypatch):
    monkeypatch.setattr(prefetch, "SIGNAL_SECONDS", 0.05)
    batches = iter(make_loader(workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(0.1)
    assert worker.is_alive()
    with suppress(RuntimeError):  # torch's own SIGCHLD handler may raise here
        for _ in range(100):
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGTERM)
            worker.join(0.1)
    worker.join(5)
    assert worker.exitcode == -signal.SIGTERM


def test_a_signal_while_the_workers_start_is_for_the_training_process():
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with prefetch._signals_held_back():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # other tests may have left other threads
            child = multiprocessing.get_context("fork").Process(target=lambda: os.kill(os.getpid(), signal.SIGTERM))
            child.start()
            child.join()
            assert told == []
        assert told == [signal.SIGTERM]
        assert child.exitcode == 0
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_workers_of_a_remote_source_start_without_a_fork(tmp_path):
    for i in range(8):
        pil.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    source = FolderSource(FolderSource.Config(root=str(tmp_path)))
    source.remote = True  # as it is with a store behind a network, whose clients hang after a fork
    pictures = stream(make_loader(source, workers=1, total_steps=1))
    assert samples_of(pictures) == SampleOrder(0, 8).indices(range(8))


# --- broken images -----------------------------------------------------------------------------------------------


def test_broken_images_are_replaced_counted_and_listed(tmp_path):
    told: list[Broken] = []
    loader = make_loader(Numbers(broken=frozenset({3, 11})), run_dir=tmp_path, on_broken=told.append)
    batches = list(loader)
    order = SampleOrder(0, NUM_SAMPLES).indices(range(48))
    bad = [position for position in range(48) if order[position] in (3, 11)]
    assert sorted({sample.position for sample in told}) == bad
    assert told[0] == Broken(bad[0], order[bad[0]], f"{order[bad[0]]}.jpg", "truncated", "half of it is missing")
    assert [sample for batch in batches for sample in batch.broken] == told
    assert loader.broken_counts == {"truncated": len(told)}
    listed = [json.loads(line) for line in (tmp_path / "broken_images.rank0.jsonl").read_text().splitlines()]
    assert [Broken(**entry) for entry in listed] == told

    seen = samples_of(stream(make_loader(Numbers(broken=frozenset({3, 11})))))
    assert len(seen) == 48
    assert not {3, 11} & set(seen)
    intact = samples_of(stream(make_loader()))
    assert [s for p, s in enumerate(seen) if p not in bad] == [s for p, s in enumerate(intact) if p not in bad]


def test_replacements_do_not_depend_on_the_layout():
    source = Numbers(broken=frozenset(range(0, NUM_SAMPLES, 2)))  # half: replacements are often broken themselves
    one = stream(make_loader(source, BatchLayout(8, 8), max_broken=1))
    two = stream(*(make_loader(source, BatchLayout(8, 2, rank, 2), max_broken=1) for rank in (0, 1)))
    assert_same(one, two)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_the_run(tmp_path, workers):
    loader = make_loader(Numbers(broken=frozenset({0, 1, 2})), total_steps=100, workers=workers, run_dir=tmp_path)
    with pytest.raises(DataError) as info:
        list(loader)
    assert multiprocessing.active_children() == []
    total = loader.broken_counts.total()
    assert TOLERATED_BROKEN < total <= TOLERATED_BROKEN + 3
    assert str(info.value).startswith(f"{total} of ")
    for part in (
        f"{total} truncated",
        "more than data.max_broken=0.01 allows",
        ".jpg (half of it is missing)",
        "broken_images.rank0.jsonl",
    ):
        assert part in str(info.value)


def test_a_share_below_the_budget_goes_on():
    loader = make_loader(Numbers(broken=frozenset({0})), total_steps=60, max_broken=0.2)
    assert sum(1 for _ in loader) == 120
    assert loader.broken_counts.total() > TOLERATED_BROKEN


def test_nothing_but_broken_images_stops_at_once():
    loader = make_loader(Numbers(broken=frozenset(range(NUM_SAMPLES))), max_broken=1)
    with pytest.raises(DataError, match=r"17 of 17 images .*, 17 of them in a row; remove them\."):
        next(iter(loader))


def test_files_of_a_folder_go_through_the_same_path(tmp_path):
    for i in range(6):
        pil.new("L", (20, 10), i).save(tmp_path / f"{i}.png")
    (tmp_path / "web.jpg").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.jpg").touch()
    file = io.BytesIO()
    pil.effect_noise((64, 64), 50).save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-100])
    loader = make_loader(FolderSource(FolderSource.Config(root=str(tmp_path))), max_broken=1)
    assert set(samples_of(stream(loader))) <= set(range(6))
    assert set(loader.broken_counts) == {"not_an_image", "empty", "truncated"}


# --- many at once ------------------------------------------------------------------------------------------------


class Together(Numbers):
    """Reads many samples in one request, and writes down which."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.requests: list[list[int]] = []

    def read_many(self, indices):
        self.requests.append(list(indices))
        return super().read_many(indices)


def test_read_many_returns_a_broken_sample_in_its_place():
    first, second = Numbers(broken=frozenset({3})).read_many([3, 1])
    assert isinstance(first, BrokenImage)
    assert (first.name, first.cause) == ("3.jpg", "truncated")
    assert second.name == "1.jpg"


def test_a_source_is_asked_for_whole_micro_batches_and_for_single_replacements():
    together = Together(broken=frozenset({3, 11}))
    loader = make_loader(together, max_broken=1)
    batches = stream(loader)
    order = SampleOrder(0, NUM_SAMPLES).indices(range(48))
    assert together.requests == [order[i : i + 4] for i in range(0, 48, 4)]
    one_by_one = make_loader(Numbers(broken=frozenset({3, 11})), max_broken=1)
    assert_same(batches, stream(one_by_one))
    assert loader.broken_counts == one_by_one.broken_counts


def test_evaluation_reads_together_too():
    together = Together(broken=frozenset({1}), num_samples=6)
    views = ImageViews(ImageViews.Config(img_size=8))
    labels = [labels.tolist() for _, labels in evaluation_batches(together, views, 4)]
    assert labels == [[0, 2, 0], [1, 2]]
    assert together.requests == [[0, 1, 2, 3], [4, 5]]


def test_a_source_that_loses_samples_is_named():
    class Forgetful(Numbers):
        def read_many(self, indices):
            return super().read_many(indices)[1:]

    with pytest.raises(DataError, match="data.source 'numbers': read_many gave 3 samples for 4 indices"):
        next(iter(make_loader(Forgetful())))


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_batches_are_in_order_and_skip_broken_images(workers):
    told: list[Broken] = []
    source = Numbers(broken=frozenset({4, 8, 9}), num_samples=10)
    views = ImageViews(ImageViews.Config(img_size=8))
    batches = list(evaluation_batches(source, views, 4, workers=workers, on_broken=told.append))
    assert [batch["x"][:, 0, 0, 0].tolist() for batch, _ in batches] == [[0, 1, 2, 3], [5, 6, 7]]
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 0], [2, 0, 1]]
    assert [sample.index for sample in told] == [4, 8, 9]
    assert torch.equal(batches[1][0]["x"][0], views.evaluation_view(source.read(5)))


def test_evaluation_can_take_some_samples_and_ones_without_label(tmp_path):
    pil.new("L", (8, 8), 7).save(tmp_path / "a.png")
    pil.new("L", (8, 8), 9).save(tmp_path / "b.png")
    source = FolderSource(FolderSource.Config(root=str(tmp_path)))
    views = ImageViews(ImageViews.Config(img_size=8))
    ((batch, labels),) = evaluation_batches(source, views, 4, indices=[1])
    assert batch["x"].unique().tolist() == [9]
    assert labels.tolist() == [-1]


# --- section -----------------------------------------------------------------------------------------------------


def test_auto_workers_follow_the_cores_of_the_rank(monkeypatch):
    section = DataSection(source="numbers")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(96), raising=False)
    assert section.num_workers == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert section.num_workers == 11
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2), raising=False)
    assert section.num_workers == 1
    assert DataSection(source="numbers", workers=0).num_workers == 0


def test_options_out_of_range_are_refused():
    with pytest.raises(ValidationError, match="workers"):
        DataSection(source="numbers", workers=-1)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        DataSection(source="numbers", max_broken=2)
