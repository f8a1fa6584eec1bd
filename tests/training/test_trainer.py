"""Training: the same run on any number of ranks, exact resume, non-finite losses, signals, phases, teachers."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from mim_plugin_mae import MAEEncoder
from torch import nn

from mim_framework.base.errors import MimError, RecipeError, TrainingError
from mim_framework.builtins.losses import MSELoss
from mim_framework.builtins.maskers import RandomMasker
from mim_framework.checkpoints import checkpoint
from mim_framework.contract.components import Objective
from mim_framework.contract.hooks import hookimpl
from mim_framework.contract.records import Ask
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith, run_ranks
from mim_framework.training.trainer import Trainer, train

RECIPE = tiny.RECIPE | {
    "views": {**tiny.RECIPE["views"], "scale": [0.6, 1.0]},
    "train": {**tiny.RECIPE["train"], "steps": 6},
}
EMA = "teachers={ema: {copy: [encoder], momentum: {shape: cosine, from: 0.9, to: 1.0}}}"


class RecordingMasker(RandomMasker):
    """Keeps what it was given and what it hid, by sample position."""

    name = "recording"
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, step, views):
        masked = super().forward(step, views)
        if self.training and step.total > 1:  # not the preflight
            for row, position in enumerate(step.positions.tolist()):
                self.seen[position] = (views["x"][row], masked.masks["x"].hidden[row])
        return masked


class PoisonedLoss(MSELoss):
    """Not finite at the steps of `steps`; counted by calls in training."""

    name = "poisoned"
    steps: set[int] = set()
    calls = -1  # the preflight is a call

    def forward(self, pred, target, mask, latent):
        loss = super().forward(pred, target, mask, latent).loss
        type(self).calls += 1
        return loss * float("nan") if self.calls - 1 in self.steps else loss


def recipe_at(folder: Path, *overrides: str, registry: RegistryWith | None = None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"recipe_{os.getpid()}.yaml"  # ranks are processes
    file.write_text(yaml.safe_dump({**RECIPE, **changes}))
    registry = registry or RegistryWith(RecordingMasker, PoisonedLoss)
    return load_recipe(file, [f"output_dir={folder}", *overrides], registry)


def run(folder: Path, *overrides: str, fresh: bool = False, registry: RegistryWith | None = None, **changes) -> Path:
    registry = registry or RegistryWith(RecordingMasker, PoisonedLoss)
    return train(recipe_at(folder, *overrides, registry=registry, **changes), registry, fresh=fresh)


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.find_latest(run_dir / "checkpoints")
    groups = [path.stem for path in found.path.glob("*.safetensors")]
    return {f"{group}/{name}": tensor for group in groups for name, tensor in found.tensors(group).items()}


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = final_tensors(a), final_tensors(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert learned(a) == learned(b)


def learned(run_dir: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    kept = ("step", "epoch", "lr", "loss", "loss/main", "grad_norm")
    return [{key: line[key] for key in kept if key in line} for line in read_metrics(run_dir / "metrics.jsonl")]


# --- components that begin from data, have losses of their own, or draw --------------------------------------------


class CentringEncoder(MAEEncoder):
    """Subtracts the mean of the first total batch, asks for small tokens, draws its centre."""

    name = "centring"
    told: list[list[list[int]]] = []

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.register_buffer("centre", torch.zeros(3, 1, 1))

    def calibrate(self, batches):
        self.told.append([step.positions.tolist() for step, _ in batches])
        total = torch.stack([views["x"].mean((0, 2, 3)) for _, views in batches]).mean(0)
        self.centre.copy_(batches[0][0].world.mean(total)[:, None, None])

    def forward(self, view, mask, ask=Ask()):
        latent = super().forward(view - self.centre, mask, ask)
        return replace(latent, losses={"small": 0.1 * latent.tokens.square().mean()})

    def pictures(self):
        return {"centre": self.centre.expand(3, 4, 4)}


def centred(folder: Path, *overrides: str, **changes) -> Path:
    encoder = {**RECIPE["encoder"], "type": "centring"}
    return run(folder, *overrides, registry=RegistryWith(CentringEncoder), encoder=encoder, **changes)


def test_components_are_calibrated_once_with_the_whole_first_step(tmp_path):
    CentringEncoder.told.clear()
    directory = centred(tmp_path, "train.batch_size=2", "train.steps=2", "checkpoint.every_steps=1")
    assert CentringEncoder.told == [[[0, 1], [2, 3], [4, 5], [6, 7]]]
    centre = final_tensors(directory)["model/encoder.centre"]
    assert bool(centre.abs().max() > 0)
    (directory / "checkpoints" / "step_00000002").rename(tmp_path / "aside")
    centred(tmp_path, "train.batch_size=2", "train.steps=2", "checkpoint.every_steps=1")
    assert len(CentringEncoder.told) == 1  # a resumed run has begun before


@pytest.mark.slow
def test_calibration_and_losses_of_encoders_agree_between_one_rank_and_two(tmp_path):
    alone = centred(tmp_path / "alone", "train.steps=2")
    run_ranks(lambda rank: centred(tmp_path / "ranks", "train.steps=2", "train.batch_size=2"))
    together = tmp_path / "ranks" / "tiny"
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-5)
    names = {name for line in read_metrics(alone / "metrics.jsonl") for name in line}
    assert {"loss/main", "loss/small"} <= names
    centres = [final_tensors(each)["model/encoder.centre"] for each in (alone, together)]
    assert torch.allclose(*centres, atol=1e-6)


def test_components_draw_pictures_beside_the_reconstructions(tmp_path):
    directory = centred(tmp_path, "log.num_images=1", "log.images_every_epochs=1", "train.steps=1")
    assert (directory / "encoder.centre" / "step_00000001.png").is_file()


# --- ranks -----------------------------------------------------------------------------------------------------------

RULES = [
    "optim.layer_decay=0.5",
    'optim.multipliers=[{parameters: ["*.bias"], lr: 2.0}, {parameters: ["heads.*"], weight_decay: 0.5}]',
    "optim.clip_grad_norm_per_parameter=0.01",
    "encoder.depth=2",
]


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_accumulation_and_ranks_give_the_same_losses_samples_crops_and_masks(tmp_path, mode):
    def run_recorded(name: str, *overrides: str):
        RecordingMasker.seen = {}
        run_dir = run(tmp_path / name, "masker.type=recording", "train.steps=4", *overrides)
        return losses_of(run_dir), RecordingMasker.seen

    whole, seen = run_recorded("whole")
    accumulated, seen_accumulated = run_recorded("accumulated", "train.batch_size=2")
    results = {"accumulated": (accumulated, seen_accumulated)}
    ranks = run_ranks(lambda rank: run_recorded(mode, f"train.distributed={mode}", "train.batch_size=2"))
    assert not ranks[0][1].keys() & ranks[1][1].keys()
    results[mode] = (losses_of(tmp_path / mode / "tiny"), ranks[0][1] | ranks[1][1])
    assert len(whole) == 4
    assert seen.keys() == set(range(32))
    for name, (losses, others) in results.items():
        assert losses == pytest.approx(whole, rel=1e-6), name
        assert others.keys() == seen.keys(), name
        for position, (image, hidden) in seen.items():
            assert torch.equal(image, others[position][0]), (name, position)
            assert torch.equal(hidden, others[position][1]), (name, position)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_rules_of_single_parameters_hold_on_two_ranks(tmp_path, mode):
    plain = ["train.steps=5", "encoder.depth=2", "optim.type=momentum", "optim.lr=0.1"]  # Adam hides a gradient's scale
    options = [*plain, *RULES]
    whole = losses_of(run(tmp_path / "whole", *options))
    run_ranks(lambda rank: run(tmp_path / mode, *options, f"train.distributed={mode}"))
    assert losses_of(tmp_path / mode / "tiny") == pytest.approx(whole, rel=1e-6)
    assert whole != pytest.approx(losses_of(run(tmp_path / "plain", *plain)), rel=1e-3)


def test_a_total_batch_that_does_not_divide_is_refused_with_one_that_does(tmp_path):
    with pytest.raises(RecipeError, match=r"8 images do not divide into train.batch_size 3 x 1 ranks; use 9"):
        run(tmp_path, "train.batch_size=3")


# --- resume ----------------------------------------------------------------------------------------------------------


def stopped_after(folder: Path, step: int, *overrides: str) -> Path:
    """A run of which only the first steps were made: its process was told to stop."""
    registry = RegistryWith()

    class Stop:
        @hookimpl
        def mim_metrics_logged(self, run, step, metrics):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    stop_at = step
    registry.listen(Stop())
    with pytest.raises(SystemExit) as stopped:
        run(folder, *overrides, registry=registry)
    assert stopped.value.code == 128 + signal.SIGTERM
    return folder / "tiny"


@pytest.mark.parametrize(
    "options", [[EMA], ["log.every_steps=4"], ["encoder.drop_path_rate=0.5", "encoder.depth=2"], RULES]
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, options):
    straight = run(tmp_path / "straight", *options)
    if "log.every_steps=4" in options:  # stop inside a window of the log
        half = crashed_after(tmp_path / "resumed", 3, *options)
    else:
        half = stopped_after(tmp_path / "resumed", 3, *options)
    assert 3 <= checkpoint.find_latest(half / "checkpoints").step < 6
    resumed = run(tmp_path / "resumed", *options)
    assert_same_bits(straight, resumed)


def crashed_after(folder: Path, step: int, *overrides: str) -> Path:
    """Stop by a checkpoint of that step and a crash after it."""
    registry = RegistryWith()

    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            if path.name.endswith(f"{step:08d}"):
                raise KeyboardInterrupt

    registry.listen(Crash())
    with pytest.raises(KeyboardInterrupt):
        run(folder, "checkpoint.every_steps=1", *overrides, registry=registry)
    return folder / "tiny"


@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.slow) for trial in (1, 2))])
def test_a_run_killed_at_a_random_moment_resumes_bit_for_bit(tmp_path, trial):
    options = ["train.steps=12", "checkpoint.every_steps=2", EMA]
    straight = run(tmp_path / "straight", *options)
    kill_at = random.Random(trial).randrange(3, 12)
    child = os.fork()
    if child == 0:
        registry = RegistryWith()

        class Kill:
            @hookimpl
            def mim_metrics_logged(self, run, step, metrics):
                if step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        registry.listen(Kill())
        try:
            run(tmp_path / "killed", *options, registry=registry)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert_same_bits(straight, run(tmp_path / "killed", *options))


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_begun_on_two_ranks_goes_on_with_one(tmp_path, mode):
    RecordingMasker.seen = {}
    straight = run(tmp_path / "straight", "masker.type=recording", EMA)
    seen = dict(RecordingMasker.seen)

    options = ["masker.type=recording", EMA, f"train.distributed={mode}", "checkpoint.every_steps=3"]

    def rank_main(rank: int):
        registry = RegistryWith(RecordingMasker)
        recipe = recipe_at(tmp_path / "moved", *options, registry=registry)
        with Trainer.opened(recipe, registry) as trainer:
            save = trainer.checkpoints.save

            def save_and_stop(done, numbers, **more):
                save(done, numbers, **more)
                trainer.stop.agreed = True

            trainer.checkpoints.save = save_and_stop
            with pytest.raises(SystemExit):
                trainer.fit()

    run_ranks(rank_main)
    assert [path.name for path in (tmp_path / "moved/tiny/checkpoints").iterdir()] == ["step_00000003"]
    RecordingMasker.seen = {}
    resumed = run(tmp_path / "moved", *options)
    assert RecordingMasker.seen.keys() == set(range(24, 48))
    for position, (image, hidden) in RecordingMasker.seen.items():
        assert torch.equal(image, seen[position][0])
        assert torch.equal(hidden, seen[position][1])
    assert losses_of(resumed) == pytest.approx(losses_of(straight), rel=1e-6)
    first, second = final_tensors(straight), final_tensors(resumed)
    for name, tensor in first.items():
        if not name.endswith("qkv.bias"):  # the gradient of the keys' bias is rounding noise, which Adam magnifies
            assert torch.allclose(tensor.float(), second[name].float(), atol=1e-5), name


def test_fresh_refuses_a_directory_that_holds_a_run(tmp_path):
    run(tmp_path, "train.steps=1")
    with pytest.raises(RecipeError, match="holds a run already, and --fresh refuses"):
        run(tmp_path, "train.steps=1", fresh=True)


def test_a_changed_recipe_is_not_resumed_but_harmless_keys_may_change(tmp_path):
    run(tmp_path, "train.steps=1")
    with pytest.raises(RecipeError, match=r"optim.lr: 0.001 -> 0.01"):
        run(tmp_path, "train.steps=1", "optim.lr=0.01")
    run(tmp_path, "train.steps=1", "train.batch_size=4", "log.every_steps=2")


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_a_nonfinite_loss_skips_the_update_and_is_recorded_with_its_samples(tmp_path):
    PoisonedLoss.steps, PoisonedLoss.calls = {2}, -1
    run_dir = run(tmp_path / "a", "loss=poisoned", "checkpoint.every_steps=1", "checkpoint.keep=9", EMA)
    before, after = (checkpoint.load(run_dir / "checkpoints" / f"step_{step:08d}") for step in (2, 3))
    for group in ("model", "teachers", "optimizer.main"):
        old, new = before.tensors(group), after.tensors(group)
        assert all(torch.equal(old[name], new[name]) for name in old), group
    [line] = [json.loads(text) for text in (run_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert line == {"step": 2, "phase": "main", "cause": "loss", "losses": ["main"], "positions": list(range(16, 24))}
    assert all(torch.isfinite(tensor).all() for tensor in final_tensors(run_dir).values())


def test_teachers_wait_for_a_step_all_of_whose_phases_were_finite(tmp_path):
    PoisonedLoss.steps, PoisonedLoss.calls = {4}, -2  # the preflight goes through both phases; the first of step 2
    phases = [{"name": name, "optimizers": ["all"]} for name in ("first", "second")]
    optimizers = {"all": {"type": "adamw", "lr": 1e-3, "parameters": ["*"]}}
    options = ["loss=poisoned", "checkpoint.every_steps=1", "checkpoint.keep=9", EMA]
    run_dir = run(tmp_path, *options, optim=None, optimizers=optimizers, phases=phases)
    [line] = [json.loads(text) for text in (run_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert (line["step"], line["phase"]) == (2, "first")
    at = {step: checkpoint.load(run_dir / "checkpoints" / f"step_{step:08d}").tensors("teachers") for step in (2, 3, 4)}
    assert all(torch.equal(at[2][name], tensor) for name, tensor in at[3].items())
    assert not all(torch.equal(at[3][name], tensor) for name, tensor in at[4].items())


def test_nonfinite_losses_in_a_row_stop_the_run(tmp_path):
    PoisonedLoss.steps, PoisonedLoss.calls = set(range(2, 99)), -1
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, up to step 5.*nonfinite.jsonl"):
        run(tmp_path, "loss=poisoned", "train.max_nonfinite_steps=2", "train.steps=20")


def test_an_output_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MimError, match="output_dir .*file: cannot write"):
        run(tmp_path / "in", f"output_dir={tmp_path / 'file'}")


# --- hooks, phases ---------------------------------------------------------------------------------------------------


def test_run_hooks_tell_what_has_happened_in_order(tmp_path):
    registry, told = RegistryWith(), []

    class Listener:
        @hookimpl
        def mim_run_started(self, run):
            told.append(("started", run.total_steps))

        @hookimpl
        def mim_metrics_logged(self, step, metrics):
            told.append(("logged", step))

        @hookimpl
        def mim_checkpoint_saved(self, path):
            told.append(("saved", path.name))

        @hookimpl
        def mim_run_finished(self, error):
            told.append(("finished", error))

    registry.listen(Listener())
    run(tmp_path, "train.steps=2", registry=registry)
    assert told == [("started", 2), ("logged", 1), ("logged", 2), ("saved", "step_00000002"), ("finished", None)]


class Duel(Objective):
    """Two numbers that pull at one loss: `low` minimises it, `high` maximises it. Phases of opposite sign."""

    name = "duel"
    phases_seen: list[str] = []

    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.low, self.high = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, step, views):
        if step.total > 1:
            self.phases_seen.append(step.phase)
        return {"main": self.low + self.high}


PLAIN_SGD = {"type": "momentum", "shape": "constant", "weight_decay": 0}
DUEL = {
    "objective": "duel",
    "optim": None,
    "optimizers": {
        "low": {**PLAIN_SGD, "lr": 1.0, "parameters": ["low"], "options": {"momentum": 0.0}},
        "high": {**PLAIN_SGD, "lr": 0.5, "parameters": ["high"], "options": {"momentum": 0.0}},
    },
    "phases": [{"name": "down", "optimizers": ["low"]}, {"name": "up", "optimizers": ["high"], "sign": -1}],
}


def test_phases_step_their_own_optimizers_with_their_own_sign(tmp_path):
    Duel.phases_seen = []
    run_dir = run(tmp_path, "train.steps=3", registry=RegistryWith(Duel), **DUEL)
    model = checkpoint.find_latest(run_dir / "checkpoints").tensors("model")
    assert (model["low"].item(), model["high"].item()) == (-3.0, 1.5)
    assert Duel.phases_seen == ["down", "up"] * 3
    line = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert (line["lr/low"], line["lr/high"], line["down/loss"], line["up/loss"]) == (1.0, 0.5, -1.0, -2.0)


# --- evaluation on the way, precision, compilation -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_evaluation_and_pictures_are_the_same_on_two_ranks(tmp_path, mode):
    options = ["train.steps=2", "evaluate.knn={max_train: 200, max_test: 50}", "log.num_images=2"]

    def watched(run_dir: Path) -> tuple[float, int]:
        [top1] = [line["knn_top1"] for line in read_metrics(run_dir / "metrics.jsonl") if "knn_top1" in line]
        return top1, (run_dir / "reconstructions" / "step_00000002.png").stat().st_size

    alone = watched(run(tmp_path / "alone", *options))
    run_ranks(lambda rank: run(tmp_path / mode, *options, f"train.distributed={mode}"))
    together = watched(tmp_path / mode / "tiny")
    assert together[0] == pytest.approx(alone[0], abs=0.03)
    assert 0.2 < alone[0] <= 1.0
    assert together[1] == pytest.approx(alone[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own, when it looks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_give_the_losses_of_eager_ones(tmp_path):
    eager = run(tmp_path / "eager", "train.steps=3")
    compiled = run(tmp_path / "compiled", "train.steps=3", "train.compile=true")
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=1e-5)


def test_bfloat16_autocast_stays_near_float32_and_keeps_the_weights_in_float32(tmp_path):
    full = run(tmp_path / "full", "train.steps=3")
    half = run(tmp_path / "half", "train.steps=3", "train.precision=bfloat16")
    assert losses_of(half) == pytest.approx(losses_of(full), rel=1e-2)
    assert losses_of(half) != losses_of(full)
    assert {tensor.dtype for tensor in final_tensors(half).values()} == {torch.float32}
