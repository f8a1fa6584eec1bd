"""metrics.jsonl is right after crashes and resumes, TensorBoard never matters, and speeds follow the clock."""

from __future__ import annotations

import errno
import json
import math
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mim_framework.base.errors import MimError
from mim_framework.runtime.metrics import LogSection, MetricsWriter, Throughput, peak_memory, read_metrics

QUIET = LogSection(tensorboard=False)


def write_steps(run_dir: Path, steps: range, *, resume_step: int = 0, section: LogSection = QUIET) -> None:
    writer = MetricsWriter(run_dir, resume_step=resume_step, section=section)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_a_line_is_one_json_object_with_the_step_first(tmp_path):
    writer = MetricsWriter(tmp_path / "run", resume_step=0, section=QUIET)
    writer.write(20, {"loss": 0.1, "samples": [3, 4]})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 20, "loss": 0.1, "samples": [3, 4]}\n'
    writer.close()
    assert read_metrics(tmp_path / "run") == [{"step": 20, "loss": 0.1, "samples": [3, 4]}]


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0, section=QUIET)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.30000000000000004}
    line = read_metrics(tmp_path)[0]
    assert math.isnan(line["a"])
    assert (line["b"], line["c"], line["d"]) == (math.inf, -math.inf, 0.1 + 0.2)


def test_a_resumed_run_drops_the_lines_of_steps_that_it_makes_again(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 7), resume_step=4)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_equals_an_uninterrupted_one_byte_for_byte(tmp_path):
    write_steps(tmp_path / "whole", range(1, 11))
    write_steps(tmp_path / "resumed", range(1, 9))
    write_steps(tmp_path / "resumed", range(6, 11), resume_step=5)
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_run_that_begins_anew_drops_all_lines(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3', b"\0\0\0\0", b'{"loss": 1.0}\n', b"[1]\n", b"\xff\n"]
)
def test_a_line_torn_by_a_crash_is_left_out_and_cut_off_on_resume(tmp_path, torn):
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert steps_in(tmp_path) == [1, 2]
    write_steps(tmp_path, range(3, 4), resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 3


def test_a_last_line_that_only_lacks_its_end_is_kept_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    write_steps(tmp_path, range(3, 4), resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_a_log_of_many_lines_is_cut_back_in_a_time_that_grows_with_their_number(tmp_path):
    line = '{"step": %d, "epoch": 0.0625, "loss": 1.3906, "lr": 0.001, "grad_norm": 1.25, "images_per_s": 512.0}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(line % step for step in range(1, 30_001)))
    began = time.process_time()
    write_steps(tmp_path, range(29_001, 29_003), resume_step=29_000)
    assert time.process_time() - began < 3  # a fraction of a second; in the square of the number it was several
    assert steps_in(tmp_path) == list(range(1, 29_003))


def test_metrics_that_cannot_be_written_or_read_are_a_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MimError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        MetricsWriter(tmp_path, resume_step=0, section=QUIET)
    with pytest.raises(MimError, match=r"no metrics in .*nowhere: No such file"):
        read_metrics(tmp_path / "nowhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_clear_error(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0, section=QUIET)
    writer.close()
    with Path("/dev/full").open("w") as full:
        writer._file = full
        with pytest.raises(MimError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            writer.write(1, {"loss": 1.0})
        writer.close()


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def tensorboard_scalars(run_dir: Path) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def test_tensorboard_shows_the_same_numbers_also_after_a_resume(tmp_path):
    section = LogSection()
    write_steps(tmp_path, range(1, 8), section=section)
    write_steps(tmp_path, range(5, 7), resume_step=4, section=section)
    assert tensorboard_scalars(tmp_path) == pytest.approx({step: 1 / step for step in range(1, 7)})
    write_steps(tmp_path, range(1, 3), section=section)
    assert tensorboard_scalars(tmp_path) == pytest.approx({1: 1.0, 2: 0.5})


def test_a_picture_is_saved_and_shown(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0, section=LogSection())
    writer.image("reconstructions", Image.new("RGB", (4, 2), (255, 0, 0)), 30)
    writer.close()
    saved = Image.open(tmp_path / "reconstructions" / "step_00000030.png")
    assert (saved.size, saved.getpixel((3, 1))) == ((4, 2), (255, 0, 0))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.width, event.height) for event in events.Images("reconstructions")] == [(30, 4, 2)]


def test_a_picture_that_cannot_be_saved_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "reconstructions").write_text("in the way")
    writer = MetricsWriter(tmp_path, resume_step=0, section=QUIET)
    writer.image("reconstructions", Image.new("RGB", (4, 2)), 30)
    writer.close()
    assert "cannot save the picture" in caplog.text


def test_a_tensorboard_that_cannot_be_opened_is_said_once_and_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    write_steps(tmp_path, range(1, 4), section=LogSection())
    assert steps_in(tmp_path) == [1, 2, 3]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "TensorBoard is off for the rest of this run"
    ]


@pytest.mark.parametrize("call", ["add_scalar", "add_image", "close"])
def test_a_tensorboard_that_fails_later_is_said_once_and_does_not_stop_the_run(tmp_path, caplog, monkeypatch, call):
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(SummaryWriter, call, fail)
    writer = MetricsWriter(tmp_path, resume_step=0, section=LogSection())
    writer.write(1, {"loss": 1.0})
    writer.image("reconstructions", Image.new("RGB", (4, 2)), 1)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert steps_in(tmp_path) == [1, 2]
    assert [record.message for record in caplog.records] == [
        f"TensorBoard is off for the rest of this run: the disk is gone. {tmp_path / 'metrics.jsonl'} goes on"
    ]


def test_a_disk_that_is_full_under_tensorboards_own_thread_is_said_once_without_a_traceback(
    tmp_path, caplog, capfd, monkeypatch
):
    from tensorboard.summary.writer.record_writer import RecordWriter

    before, real = threading.excepthook, RecordWriter.write
    writer = MetricsWriter(tmp_path, resume_step=0, section=LogSection())

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", fail)
    for step in range(1, 200):
        writer.write(step, {"loss": 1.0})
    monkeypatch.setattr(RecordWriter, "write", real)
    writer.close()
    assert steps_in(tmp_path) == list(range(1, 200))
    [record] = caplog.records
    assert "TensorBoard is off for the rest of this run: [Errno 28] No space left on device" in record.message
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is before


def test_other_threads_still_say_what_they_raise_while_tensorboard_is_open(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    writer = MetricsWriter(tmp_path, resume_step=0, section=LogSection())
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    writer.close()
    assert [each.exc_type for each in told] == [ZeroDivisionError]


def test_a_device_in_the_place_of_the_metrics_is_not_read_to_its_end(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    write_steps(tmp_path, range(1, 3))
    if Path("/dev/full").exists():
        (tmp_path / "full").mkdir()
        (tmp_path / "full/metrics.jsonl").symlink_to("/dev/full")
        writer = MetricsWriter(tmp_path / "full", resume_step=0, section=QUIET)
        with pytest.raises(MimError, match="cannot write .*No space left on device"):
            writer.write(1, {"loss": 1.0})
        writer.close()


# --- speed -----------------------------------------------------------------------------------------------------------


def test_throughput_by_hand():
    now = [100.0]
    throughput = Throughput(torch.device("meta"), clock=lambda: now[0])
    assert throughput.recent() == {}
    assert throughput.eta(10) is None

    now[0] = 102.0  # 2 s, half of it waiting
    throughput.step(30, wait_seconds=1.0)
    now[0] = 103.0  # 1 s, no waiting
    throughput.step(30, wait_seconds=1.0)

    expected = {"images_per_s": 20.0, "step_s": 1.5, "wait_share": pytest.approx(1 / 3)}
    assert throughput.recent() == expected
    assert throughput.take() == expected
    assert throughput.take() == {}
    assert throughput.eta(10) == timedelta(seconds=15)

    now[0] = 107.0
    throughput.step(30, wait_seconds=2.0)
    assert throughput.take() == {"images_per_s": 7.5, "step_s": 4.0, "wait_share": 0.25}


def test_the_time_left_follows_the_last_50_steps():
    now = [0.0]
    throughput = Throughput(torch.device("meta"), clock=lambda: now[0])
    for seconds in [100.0] + 50 * [2.0]:  # the first step compiles
        now[0] += seconds
        throughput.step(1, 0.0)
    assert throughput.eta(3600) == timedelta(hours=2)


def test_peak_memory_is_that_of_this_process():
    before = peak_memory(torch.device("cpu"))
    assert before > 50e6  # torch alone is more
    held = torch.ones(50_000_000)
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) > held.nbytes
    assert Throughput(torch.device("cpu")).take() == {"peak_memory_gb": peak_memory(torch.device("cpu")) / 1e9}
