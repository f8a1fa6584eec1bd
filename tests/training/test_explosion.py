"""A loss that explodes and stays finite is seen, and nothing else is; what a run does then, and how it resumes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from faulty import hashes

from mim_framework.base.errors import MimError, TrainingError
from mim_framework.builtins.losses import MSELoss
from mim_framework.checkpoints import checkpoint
from mim_framework.contract.hooks import hookimpl
from mim_framework.data.order import BatchLayout
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.explosion import Level, Rise, Watch
from mim_framework.training.explosions import Explosions, merged
from mim_framework.training.trainer import train

CLEAN = {**tiny.RECIPE, "optim": {"type": "adamw", "lr": 1e-3, "warmup_epochs": 0}}
TEACHER = {"teachers": {"ema": {"copy": ["encoder"], "momentum": 0.99}}}
DUEL = {
    "optim": None,
    "optimizers": {
        "low": {"type": "adamw", "lr": 1e-3, "parameters": ["encoder.*"]},
        "high": {"type": "adamw", "lr": 1e-3, "parameters": ["heads.*"]},
    },
    "phases": [{"name": "down", "optimizers": ["low"]}, {"name": "up", "optimizers": ["high"], "sign": -1}],
}


@pytest.fixture
def watch(tmp_path):
    def made(**changes) -> Watch:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**CLEAN, **changes}))
        return Watch(load_recipe(tmp_path / "recipe.yaml"))

    return made


def first_rise(watch: Watch, losses: Iterable[float], *, name: str = "loss", steps_per_epoch: int = 100) -> Rise | None:
    losses = list(losses)
    for index, loss in enumerate(losses):
        last = index + 1 == len(losses)
        if rise := watch.step(index, {name: loss}, epoch=index / steps_per_epoch, last=last):
            return rise
    return None


def noisy(steps: int, seed: int, level: float = 1.0, noise: float = 0.1) -> list[float]:
    draw = random.Random(seed)
    return [level * (0.3 + 0.7 * math.exp(-index / 500)) * math.exp(draw.gauss(0, noise)) for index in range(steps)]


# --- the detector ----------------------------------------------------------------------------------------------------


def test_a_rise_is_told_with_its_steps_and_levels(watch):
    rise = first_rise(watch(), [1.5] * 100 + [1.2e8] * 20)
    assert rise == Rise("loss", since=100, until=107, before=1.5, now=1.2e8)
    assert str(rise) == "the loss (loss) rose from 1.5 to 1.2e+08 in steps 100 to 107 and stayed finite"


@pytest.mark.fault(row="8")
@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_ten_thousand_clean_noisy_steps_give_no_alarm(watch, noise, figure):
    for seed in range(3):
        assert first_rise(watch(), with_spikes(noisy(10_000, seed, noise=noise), seed)) is None
    figure(f"0 alarms in 3 x 10,000 losses with noise of {noise:.0%} and single spikes of 10 to 10,000 times")


def with_spikes(steps: list[float], seed: int) -> list[float]:
    """Spikes of single steps, which every long run has."""
    draw = random.Random(seed)
    for index in range(50, len(steps), 500):
        steps[index] *= 10 ** draw.uniform(1, 4)
    return steps


@pytest.mark.parametrize(("factor", "steps"), [(1.01, 3000), (1.1, 400), (3.0, 60), (1e8, 30)])
def test_rises_are_seen_however_fast_they_are(watch, factor, steps):
    risen = [loss * min(factor**index, 1e8) for index, loss in enumerate(noisy(steps, 0))]
    rise = first_rise(watch(), noisy(500, 1) + risen)
    assert rise is not None
    assert rise.since >= 500
    assert first_rise(watch(), [1.5, *[1.2e8] * 9]) == Rise("loss", 1, 8, 1.5, 1.2e8)  # from the second step on


OF_A_REAL_RUN = [
    4.3663, 3.8192, 11.052, 3.5415, 418.83, 8.5821, 543.90, 7.9553, 3960.6, 47.137, 390.52, 1384.1, 2658.4, 26.996,
    8681.5, 172.16, 725.69, 5304.1, 427.30, 7772.6, 4179.3, 187.67, 21.880, 443.98, 15460., 2919.5, 214.88, 789.92,
]  # fmt: skip
"""Of `quickstart` by sgd with a rate of 10 and clipped gradients."""


def test_what_has_exploded_may_come_back_for_single_steps(watch):
    assert first_rise(watch(), OF_A_REAL_RUN) == Rise("loss", since=6, until=19, before=4.3663, now=7772.6)
    assert first_rise(watch(), noisy(300, 0) + OF_A_REAL_RUN).since in (300, 302)


@pytest.mark.parametrize("seed", range(3))
def test_a_noisy_explosion_is_told_from_a_burst_of_spikes(watch, seed):
    draw = random.Random(seed)
    exploded = [1e3 * math.exp(draw.gauss(0, 3)) for _ in range(60)]  # to a twentieth and to twenty times
    rise = first_rise(watch(), noisy(500, seed) + exploded + noisy(100, seed))
    assert 500 <= rise.since <= 503
    assert rise.until < 530
    burst = noisy(500, seed)
    for index in draw.sample(range(400, 416), 7):
        burst[index] *= 1e4
    assert first_rise(watch(), burst) is None


def test_the_first_losses_are_the_measure_of_what_creeps_and_not_the_first_alone(watch):
    creeping = [1.003**index for index in range(2000)]  # never far above its window; to 400 times
    assert 1500 < first_rise(watch(), creeping).until < 1600
    assert first_rise(watch(), [0.05, *creeping[:700]]) is None  # to 160 times the first, 8 times the second


def test_a_rise_in_the_last_steps_of_a_run_is_seen(watch):
    assert first_rise(watch(), [*noisy(300, 0), 1e5, 1e6]).since == 300
    assert first_rise(watch(), [*noisy(300, 0), 1e5]) is None  # a single step may be a spike


def test_a_warm_up_gives_no_alarm(watch):
    with_warm_up = watch(optim={"type": "adamw", "lr": 1e-3, "warmup_epochs": 5})
    draw = random.Random(0)
    rising = [0.05 * (1 + index / 10) * math.exp(draw.gauss(0, 0.1)) for index in range(300)]  # to 30 times
    assert first_rise(with_warm_up, [0.05] * 50 + rising) is None
    assert first_rise(watch(), [0.05] * 50 + [1.5] * 20) is not None
    assert first_rise(watch(optim={"type": "adamw", "lr": 1e-3, "warmup_epochs": 5}), [0.05] * 50 + [1.2e8] * 20)


def test_a_copied_teacher_may_raise_the_loss_by_two_orders_of_magnitude(watch):
    draw = random.Random(0)
    falls = [math.exp(draw.gauss(0, 0.1)) * 0.7 * 0.98**index for index in range(200)]
    rises = [math.exp(draw.gauss(0, 0.1)) * min(1.0, 0.012 * 1.02**index) for index in range(2000)]
    assert first_rise(watch(**TEACHER), falls + rises) is None
    assert first_rise(watch(**TEACHER), falls + [1.2e8] * 20) is not None


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_loss_that_changes_sign_or_is_meant_to_rise_gives_no_alarm(watch, seed):
    draw = random.Random(seed)
    slope = [(index - 500) / 500 + draw.gauss(0, 0.01) for index in range(2000)]  # from -1 over 0 to 3
    waves = [math.sin(index / 40) + draw.gauss(0, 0.05) for index in range(1000)]
    for losses in (slope, waves, [-each for each in slope]):
        assert first_rise(watch(), losses) is None
        assert first_rise(watch(**DUEL), losses, name="down/loss") is None
    exploding = [0.1 * 1.5**index for index in range(200)]
    assert first_rise(watch(**DUEL), exploding, name="up/loss") is None  # maximised
    assert first_rise(watch(**DUEL), exploding, name="down/loss") is not None


def test_a_level_that_holds_becomes_the_new_one(watch):
    watched = watch()
    assert first_rise(watched, [1.0] * 300 + [5.0] * 501) is None
    assert watched.rising == 0
    assert first_rise(watched, [5.0] * 300 + [100.0] * 20).before == 5.0


def test_parts_of_a_loss_are_not_watched(watch):
    assert first_rise(watch(), [1.0] * 300 + [1e8] * 20, name="loss/main") is None


def test_a_watch_that_is_resumed_in_a_rise_tells_the_same(watch):
    losses = noisy(400, 3) + [50.0] * 20
    straight, first = watch(), watch()
    rise = first_rise(straight, losses)
    for index, loss in enumerate(losses[:404]):
        assert first.step(index, {"loss": loss}, epoch=index / 100) is None
    assert first.rising == 4
    second = watch()
    second.levels = {name: Level(each) for name, each in json.loads(json.dumps(first.state())).items()}
    told = [second.step(index, {"loss": losses[index]}, epoch=index / 100) for index in range(404, 408)]
    assert told == [None, None, None, rise]
    assert second.state() == straight.state()


# --- what is left out ------------------------------------------------------------------------------------------------


def test_later_steps_read_on_behind_what_is_left_out():
    layout = BatchLayout(4, 2, rank=1, world_size=2, left_out=((3, 5), (6, 10)))
    assert [layout.data_step(step) for step in range(6)] == [0, 1, 2, 5, 10, 11]
    assert [list(layout.positions(step, 0)) for step in (2, 3)] == [[10, 11], [22, 23]]
    assert merged([(6, 8), (3, 5), (8, 10), (3, 4)]) == ((3, 5), (6, 10))


def test_a_record_that_cannot_be_read_is_refused(tmp_path):
    for text in ('[{"action": "rewind"}]', "{", '[{"action": "rewind", "left_out_steps": "no"}]'):
        (tmp_path / "explosions.json").write_text(text)
        with pytest.raises(MimError, match=r"explosions\.json cannot be read .*; it says which images"):
            Explosions(tmp_path)


# --- runs ------------------------------------------------------------------------------------------------------------


class Explosive(MSELoss):
    """A factor of 1e8 wherever one of the samples of `positions` has been seen, as if they had broken the weights."""

    name = "explosive"
    positions: Iterable[int] = ()

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.register_buffer("broken", torch.zeros(()))

    def begin_step(self, step):
        if self.training and step.total > 1 and set(step.positions.tolist()) & set(self.positions):
            self.broken.fill_(1.0)

    def forward(self, pred, target, mask, latent):
        loss = super().forward(pred, target, mask, latent).loss
        return loss * (1 + 1e8 * self.broken)


def recipe_at(folder: Path, *overrides: str):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"recipe_{os.getpid()}.yaml"  # ranks are processes
    file.write_text(yaml.safe_dump({**CLEAN, "loss": "explosive", "train": {**CLEAN["train"], "steps": 24}}))
    return load_recipe(file, [f"output_dir={folder}", *overrides], RegistryWith(Explosive))


def run(folder: Path, *overrides: str, registry: RegistryWith | None = None) -> Path:
    return train(recipe_at(folder, *overrides), registry or RegistryWith(Explosive))


EVERY_4 = ["checkpoint.every_steps=4"]


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def record(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "explosions.json").read_text())


@pytest.mark.fault(row="8")
def test_a_run_stops_with_a_checkpoint_from_before_the_rise(tmp_path, monkeypatch, figure):
    monkeypatch.setattr(Explosive, "positions", range(8 * 6, 8 * 7))  # step 6
    wanted = (
        r"the loss \(loss\) rose from .* to .*e\+08 in steps 6 to 13 and stayed finite; stopped\. The same command "
        r"goes on from step_00000004, from before; .*train\.on_explosion=rewind"
    )
    with pytest.raises(TrainingError, match=wanted):
        run(tmp_path, *EVERY_4, "checkpoint.keep=1")
    assert kept(tmp_path / "tiny") == ["step_00000004", "step_00000012.aside"]
    [entry] = record(tmp_path / "tiny")
    assert (entry["action"], entry["since"], entry["until"]) == ("stop", 6, 13)
    monkeypatch.setattr(Explosive, "positions", range(0))
    straight = run(tmp_path / "straight", *EVERY_4, "checkpoint.keep=1")
    assert hashes(run(tmp_path, *EVERY_4, "checkpoint.keep=1")) == hashes(straight)
    assert record(tmp_path / "tiny") == []
    figure("1.5 to 1e8 at step 6: stopped after 8 steps, goes on from step 4 with the bits of a run without the fault")


def test_a_run_that_is_told_to_warn_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Explosive, "positions", range(8 * 6, 8 * 7))
    run_dir = run(tmp_path, "train.on_explosion=warn")
    assert read_metrics(run_dir)[-1]["step"] == 24
    assert [entry["action"] for entry in record(run_dir)] == ["warn"]
    assert capsys.readouterr().err.count("the run goes on, as train.on_explosion is warn") == 1


REWIND = [*EVERY_4, "train.on_explosion=rewind"]


@pytest.mark.fault(row="8")
def test_a_run_goes_back_and_leaves_the_images_of_the_rise_out(tmp_path, monkeypatch, figure):
    monkeypatch.setattr(Explosive, "positions", range(8 * 6, 8 * 7))
    run_dir = run(tmp_path, *REWIND)
    [entry] = record(run_dir)
    assert entry["checkpoint"] == "step_00000004"
    assert entry["left_out_steps"] == [4, 14]
    assert entry["left_out_positions"] == [32, 112]
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert max(line["loss"] for line in lines) < 10
    assert checkpoint.find_latest(run_dir / "checkpoints").state["left_out"] == [[4, 14]]
    figure("`rewind`: goes back from step 13 to 4, leaves out 80 images, ends with 24 of 24 steps and a loss below 10")


def test_a_run_without_a_checkpoint_goes_back_to_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(Explosive, "positions", range(8 * 6, 8 * 7))
    run_dir = run(tmp_path, "train.on_explosion=rewind")
    assert [entry["left_out_steps"] for entry in record(run_dir)] == [[0, 14]]
    assert len(read_metrics(run_dir)) == 24


def test_a_run_goes_back_so_often_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(Explosive, "positions", [8 * 6, 8 * 20, 8 * 30])
    with pytest.raises(TrainingError, match=r"stopped after going back 2 times \(train\.max_rewinds\)"):
        run(tmp_path, *REWIND, "train.max_rewinds=2")
    assert [entry["action"] for entry in record(tmp_path / "tiny")] == ["rewind", "rewind", "stop"]
    assert [entry["left_out_steps"] for entry in record(tmp_path / "tiny")[:2]] == [[4, 14], [18, 28]]


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [10, 18])
def test_a_run_that_went_back_resumes_bit_for_bit(tmp_path, monkeypatch, stop_at):
    """Stopped in the rise, while it is not yet an explosion, and after the return."""
    monkeypatch.setattr(Explosive, "positions", range(8 * 6, 8 * 7))
    straight = run(tmp_path / "straight", *REWIND)
    registry = RegistryWith(Explosive)

    class Stop:
        @hookimpl
        def mim_metrics_logged(self, step):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    registry.listen(Stop())
    with pytest.raises(SystemExit):
        run(tmp_path / "resumed", *REWIND, registry=registry)
    resumed = run(tmp_path / "resumed", *REWIND)
    assert hashes(resumed) == hashes(straight)
    assert record(resumed) == record(straight)


@pytest.mark.slow
def test_two_ranks_go_back_together(tmp_path, monkeypatch):
    monkeypatch.setattr(Explosive, "positions", range(8 * 6, 8 * 7))
    run_ranks(lambda rank: run(tmp_path / "ranks", *REWIND, "train.steps=18").name)
    alone = run(tmp_path / "alone", *REWIND, "train.steps=18")
    [first], [second] = record(alone), record(tmp_path / "ranks/tiny")
    assert first["left_out_positions"] == second["left_out_positions"] == [32, 112]
    losses = [[line["loss"] for line in read_metrics(each)] for each in (alone, tmp_path / "ranks/tiny")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_a_run_left_out_is_forgotten_with_a_recipe_that_was_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(Explosive, "positions", range(8 * 6, 8 * 7))
    with pytest.raises(TrainingError, match="goes on from the beginning, as no checkpoint from before it was kept"):
        run(tmp_path)
    assert (tmp_path / "tiny/explosions.json").exists()
    monkeypatch.setattr(Explosive, "positions", range(0))
    run_dir = run(tmp_path, "seed=1")
    assert not (run_dir / "explosions.json").exists()
