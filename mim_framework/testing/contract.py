"""What every plugin promises, as tests that its own test suite inherits:

    class TestContract(PluginContract):
        plugin = "spiral"

`ComponentContract` reads and validates, in a second. `RecipeContract` trains the plugin's small recipes for a few steps
in every way a user can: several ranks, sharded, in bfloat16, compiled, resumed. `PluginContract` is both.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from mim_framework.assembly.trained import trained_encoder
from mim_framework.base.errors import CheckpointError
from mim_framework.checkpoints.checkpoint import load_weights
from mim_framework.contract.components import JointEncoder
from mim_framework.contract.mask import Mask
from mim_framework.convert import export_run, import_checkpoint, read_checkpoint
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import assign
from mim_framework.testing.ranks import run_ranks
from mim_framework.testing.runs import (
    PLAIN_SGD,
    SHORT,
    STAGE_ONE,
    CrashAtStep,
    assert_latent,
    choices_of,
    components_of,
    draw,
    encoded,
    first_batch,
    last_four,
    losses_of,
    losses_of_step,
    masker_of,
    of_samples,
    optimizers_of,
    options_of,
    recipes_of,
    run,
    same,
    seen_by,
    small_recipes,
    state_of,
    trainer_of,
    weights_of,
)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of names of a batch norm's buffers."""


class ComponentContract:
    """What can be told of a plugin's components and recipes without building them."""

    plugin: ClassVar[str]
    """Name of the entry point, or of the distribution."""

    def test_the_plugin_can_be_loaded(self):
        registry = Registry()
        info = registry.plugin(self.plugin)
        assert info.error == ""
        registry.load(info.name)

    def test_what_is_listed_without_an_import_is_what_is_registered(self):
        registry = Registry()
        info = registry.plugin(self.plugin)
        listed = {(each.kind, each.name) for each in info.components}
        registry.load(info.name)
        registered = {(each.kind, each.name) for each in registry.components(info.name)}
        assert info.unread or listed == registered

    def test_every_component_and_option_is_explained(self):
        for kind, cls in components_of(self.plugin):
            assert cls.__doc__, f"{kind} '{cls.name}' has no docstring"
            for option, field in options_of(cls).items():
                assert field.description, f"option '{option}' of {kind} '{cls.name}' has no text under it"

    def test_a_misspelt_option_is_refused(self):
        for kind, cls in components_of(self.plugin):
            if hasattr(cls, "Config"):
                with pytest.raises(ValueError, match="no_such_option"):
                    cls.Config(no_such_option=1)
                assert cls.Config.model_json_schema()["additionalProperties"] is False, f"{kind} '{cls.name}'"

    def test_recipes_survive_being_written_and_read(self, tmp_path: Path):
        registry = Registry()
        for info in recipes_of(self.plugin):
            recipe = load_recipe(info.path, [], registry)
            (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
            assert load_recipe(tmp_path / "again.yaml", [], registry) == recipe, info.name

    def test_options_survive_being_written_and_read(self):
        registry = Registry()
        for kind, cls in components_of(self.plugin):
            if all(not field.is_required() for field in options_of(cls).values()) and hasattr(cls, "Config"):
                config = cls.Config()
                assert cls.Config.model_validate(config.model_dump(mode="json")) == config, f"{kind} '{cls.name}'"
        for info in recipes_of(self.plugin):
            for slot, choice in choices_of(load_recipe(info.path, [], registry)):
                cls, config = registry.resolve(slot, choice)
                assert cls.Config.model_validate(config.model_dump(mode="json")) == config, f"{info.name}: {slot}"


class RecipeContract:
    """What holds for every small recipe of a plugin, by training it for a few steps."""

    plugin: ClassVar[str]
    """Name of the entry point, or of the distribution."""
    recipes: ClassVar[tuple[str, ...]] = ()
    """The small recipes; by default those of the plugin whose names end in `quickstart`."""
    overrides: ClassVar[tuple[str, ...]] = ()
    """Changes of these recipes for the tests, such as "encoder.depth=1"."""
    compiles: ClassVar[bool] = True
    """False if no component names its `repeated_blocks`, so that there is nothing to compile."""
    accumulates: ClassVar[bool] = True
    """False if a loss compares the images of a micro-batch, so that it is another one with accumulation."""
    own_statistics: ClassVar[bool] = False
    """True if a batch norm has the statistics of a rank's micro-batch: one rank then accumulates as many micro-batches
    as two ranks have, and running statistics, updated once for each micro-batch of a rank, are not compared."""
    learned_share: ClassVar[float] = 0.1
    """By so much of its first size must the loss of one batch fall in `learning_steps` steps."""
    learning_steps: ClassVar[int] = 30
    learning_rate: ClassVar[float] = 1e-3
    """Of AdamW in these steps."""
    rank_tolerance: ClassVar[tuple[float, float]] = (1e-5, 2e-6)
    """Of two ranks against one: losses, relative; weights after three steps of plain SGD, absolute."""
    bfloat16_tolerance: ClassVar[float] = 2e-2
    """Of losses in bfloat16, relative."""
    compile_tolerance: ClassVar[float] = 1e-5
    """Of losses of compiled blocks, relative."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "recipe" in metafunc.fixturenames:
            metafunc.parametrize("recipe", self.recipes or small_recipes(self.plugin), scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Of all runs of a recipe that several tests look at."""
        return tmp_path_factory.mktemp(recipe)

    @pytest.fixture(scope="class")
    @classmethod
    def changes(cls, recipe: str, folder: Path) -> list[str]:
        """What is changed in a recipe for all tests: its length, and the tokenizer if it is a second stage."""
        changes = [*SHORT, *cls.overrides]
        if named := load_recipe(recipe, changes, Registry()).tokenizer:
            changes.append(f"tokenizer={run(folder / 'tokenizer', Path(named).name, *SHORT, *STAGE_ONE)}")
        return changes

    @pytest.fixture(scope="class")
    @classmethod
    def sgd(cls, recipe: str, changes: list[str]) -> list[str]:
        return [*changes, *optimizers_of(recipe, changes, PLAIN_SGD)]

    @pytest.fixture(scope="class")
    @classmethod
    def straight(cls, recipe: str, changes: list[str], folder: Path) -> Path:
        """Three steps without interruption."""
        return run(folder / "straight", recipe, *changes)

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls, recipe: str, sgd: list[str], folder: Path) -> Path:
        """Three steps of plain SGD on one rank."""
        return run(folder / "alone", recipe, *sgd, *(["train.batch_size=4"] if cls.own_statistics else []))

    # --- one step ----------------------------------------------------------------------------------------------------

    def test_masks_keep_their_promises_and_belong_to_their_samples(
        self, recipe: str, changes: list[str], tmp_path: Path
    ):
        with trainer_of(tmp_path, recipe, *changes) as trainer:
            batch, masker = first_batch(trainer), masker_of(trainer)
            spec = masker.spec
            trainer.objective.eval()
            before = torch.get_rng_state()
            whole, views = draw(trainer, masker, batch)
            assert torch.equal(torch.get_rng_state(), before), "the masker draws from torch's global generator"
            assert set(whole.masks) >= set(spec.views)
            half, _ = draw(trainer, masker, last_four(batch))
            for name in spec.views:
                mask = whole.masks[name]
                mask.validate()
                assert mask.grid == spec.grid_of(name)
                assert (mask.equal, mask.shared) >= (spec.equal, spec.shared)
                assert (mask.partner is not None) == spec.mixes
                assert torch.equal(half.masks[name].hidden, of_samples(mask, slice(4, None)))
                if name not in spec.rewrites:
                    assert whole.views[name] is views[name], f"view '{name}' is rewritten, MaskerSpec.rewrites says no"
                else:
                    assert whole.clean(name) is views[name], f"view '{name}' is rewritten, its original not kept"
            again, _ = draw(trainer, masker, batch)
            assert all(torch.equal(again.masks[name].hidden, mask.hidden) for name, mask in whole.masks.items())

    def test_masks_hide_as_many_as_the_masker_says(self, recipe: str, changes: list[str], tmp_path: Path):
        with trainer_of(tmp_path, recipe, *changes) as trainer:
            masker, batch = masker_of(trainer), first_batch(trainer)
            counts, spec = [], masker.spec
            alike = [name for name in spec.views if spec.grid_of(name) == spec.grid]  # `num_hidden` is of the first
            for index in range(16):
                moved = replace(batch, positions=batch.positions + 8 * index)
                masks = draw(trainer, masker, moved, index)[0].masks
                counts += [masks[name].hidden.sum(1).float().mean() for name in alike]
            expected, positions = spec.num_hidden, spec.grid.num_patches
            assert abs(float(torch.stack(counts).mean()) - expected) <= max(1.0, 0.1 * positions)

    def test_tokens_hold_no_prefix_and_an_encoder_gives_what_it_offers(
        self, recipe: str, changes: list[str], tmp_path: Path
    ):
        with trainer_of(tmp_path, recipe, *changes) as trainer, torch.no_grad():
            masker, batch, encoder = masker_of(trainer), first_batch(trainer), trainer.objective.encoder
            trainer.objective.eval()
            masked, _ = draw(trainer, masker, batch)
            views = encoder.spec.views if isinstance(encoder, JointEncoder) else masker.spec.views[:1]
            masks = {name: masked.masks[name] for name in views}
            assert_latent(encoder, encoded(encoder, masked.views, masks), masks)
            if "none" in encoder.spec.accepts:
                nothing = {
                    name: Mask.none(len(mask.hidden), seen_by(encoder, name).grid) for name, mask in masks.items()
                }
                assert_latent(encoder, encoded(encoder, masked.views, nothing), nothing)

    def test_every_phase_reaches_all_that_it_trains(self, recipe: str, changes: list[str], tmp_path: Path):
        with trainer_of(tmp_path, recipe, *changes) as trainer:
            batch, named = first_batch(trainer), list(trainer.objective.named_parameters())
            optimized = assign(trainer.run.recipe.named_optimizers(), named)
            for phase in trainer.phases:
                sum(losses_of_step(trainer, batch, phase.name).values()).backward()
                trained = [name for each in phase.optimizers for name, _ in optimized[each]]
                got = {name for name, parameter in named if parameter.grad is not None}
                assert [name for name in trained if name not in got] == [], f"phase '{phase.name}'"
                trainer.objective.zero_grad(set_to_none=True)

    def test_one_batch_is_learned(self, recipe: str, changes: list[str], tmp_path: Path):
        """By the phases that minimise; those of the opposite sign would undo it."""
        adam = {"type": "adamw", "lr": self.learning_rate}
        steps = [f"train.steps={self.learning_steps}", *optimizers_of(recipe, changes, adam)]
        with trainer_of(tmp_path, recipe, *changes, *steps) as trainer:
            batch = first_batch(trainer)
            trainer.calibrate(0, [batch])
            trainer.phases = tuple(phase for phase in trainer.phases if phase.sign > 0)
            losses = [trainer.train_step(index, [batch]).losses["loss"] for index in range(self.learning_steps)]
        assert losses[-1] <= losses[0] - self.learned_share * abs(losses[0])

    def test_what_is_frozen_stays_to_the_bit(self, recipe: str, changes: list[str], tmp_path: Path):
        with trainer_of(tmp_path, recipe, *changes) as trainer:
            batch, sections = first_batch(trainer), trainer.run.recipe.named_teachers()
            frozen = [trainer.teachers[name] for name, section in sections.items() if not section.copy_of]
            before = [state_of(teacher) for teacher in frozen]
            fixed = {name: p.clone() for name, p in trainer.objective.named_parameters() if not p.requires_grad}
            trainer.calibrate(0, [batch])
            for index in range(3):
                trainer.train_step(index, [batch])
            assert not any(module.training for teacher in frozen for module in teacher.modules())
            assert all(same(state_of(teacher), state) for teacher, state in zip(frozen, before, strict=True))
            now = dict(trainer.objective.named_parameters())
            assert [name for name, value in fixed.items() if not torch.equal(now[name], value)] == []

    def test_a_state_dict_holds_all_that_decides_a_loss(self, recipe: str, changes: list[str], tmp_path: Path):
        with (
            trainer_of(tmp_path / "a", recipe, *changes) as trainer,
            trainer_of(tmp_path / "b", recipe, *changes, "seed=77", "name=other") as other,
        ):
            batch = first_batch(trainer)
            for index in range(2):
                trainer.train_step(index, [batch])
            other.objective.load_state_dict(trainer.objective.state_dict())
            other.teachers.load_state_dict(trainer.teachers.state_dict())
            phase = trainer.phases[0].name
            theirs = losses_of_step(trainer, batch, phase, model=other)
            assert same(theirs, losses_of_step(trainer, batch, phase))

    # --- runs --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("mode", ["ddp", "fsdp"])
    def test_two_ranks_learn_what_one_learns(self, recipe: str, sgd: list[str], alone: Path, mode: str, tmp_path: Path):
        batch_size = 2 if self.accumulates and not self.own_statistics else 4  # of 8 in all
        options = [*sgd, f"train.distributed={mode}", f"train.batch_size={batch_size}"]
        run_ranks(lambda rank: run(tmp_path, recipe, *options))
        together = tmp_path / alone.name
        relative, absolute = self.rank_tolerance
        assert losses_of(together) == pytest.approx(losses_of(alone), rel=relative)
        weights = weights_of(together)
        for name, tensor in weights_of(alone).items():
            if self.own_statistics and name.endswith(STATISTICS):
                continue
            assert torch.allclose(weights[name], tensor, rtol=0, atol=absolute), name

    def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
        self, recipe: str, changes: list[str], straight: Path, tmp_path: Path
    ):
        registry = Registry()
        registry.listen(CrashAtStep(2))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, recipe, *changes, "checkpoint.every_steps=1", registry=registry)
        resumed = run(tmp_path, recipe, *changes)
        assert losses_of(resumed) == losses_of(straight)
        for group in ("model", "teachers"):
            assert same(weights_of(resumed, group), weights_of(straight, group))

    def test_bfloat16_stays_near_float32(self, recipe: str, changes: list[str], straight: Path, tmp_path: Path):
        half = losses_of(run(tmp_path, recipe, *changes, "train.precision=bfloat16"))
        assert half == pytest.approx(losses_of(straight), rel=self.bfloat16_tolerance)
        assert half != losses_of(straight)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, when it looks
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiled_blocks_give_the_losses_of_eager_ones(
        self, recipe: str, changes: list[str], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Blocks are captured and differentiated as a whole; machine code takes a minute and is torch's own affair."""
        compiled = []

        def compile_without_code_generation(block: nn.Module) -> None:
            compiled.append(block)
            block._compiled_call_impl = torch.compile(block._call_impl, backend="aot_eager", fullgraph=True)

        monkeypatch.setattr(nn.Module, "compile", compile_without_code_generation)
        torch.compiler.reset()
        with_graphs = run(tmp_path, recipe, *changes, "train.compile=true")
        assert bool(compiled) == self.compiles
        assert losses_of(with_graphs) == pytest.approx(losses_of(straight), rel=self.compile_tolerance)

    def test_exported_weights_come_back(self, straight: Path, recipe: str, tmp_path: Path):
        """In every layout of the plugin that can hold the model; an import gives the slots of the run too."""
        registry, state = Registry(), weights_of(straight)
        info = registry.plugin(self.plugin)
        registry.load(info.name)
        for each in registry.components(info.name):
            if each.kind != "checkpoint_format":
                continue
            layout = registry.find(each.kind, each.name)()
            try:
                file = export_run(straight, each.name.rpartition("_")[2], tmp_path / f"{each.name}.pth")
            except CheckpointError:
                continue
            written = read_checkpoint(file).state
            assert written
            if layout.recognises(written):
                found = layout.import_state(written)
                assert [name for name, tensor in found.items() if not torch.equal(tensor, state[name])] == []
                assert [name for name in state if name.startswith("encoder.") and name not in found] == []
            try:
                import_checkpoint(file, tmp_path / each.name, registry)
            except CheckpointError as error:
                if "written only" not in str(error):
                    raise
                continue
            imported = load_weights(tmp_path / each.name)
            assert [name for name, tensor in imported.items() if not torch.equal(tensor, state[name])] == []
            described = trained_encoder(tmp_path / each.name, registry)
            assert described == trained_encoder(straight, registry)


class PluginContract(ComponentContract, RecipeContract):
    """The whole contract. Under half a minute for a small method on two cores."""
