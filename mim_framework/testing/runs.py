"""Short runs of a plugin's recipes, and what they leave behind, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim_framework.checkpoints import checkpoint
from mim_framework.contract.components import Encoder, JointEncoder, Masker
from mim_framework.contract.hooks import hookimpl
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Latent, Masked, Views
from mim_framework.contract.specs import EncoderSpec
from mim_framework.data.loader import Batch
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.installed import RecipeInfo
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.training.trainer import Trainer, train

SHORT = (
    "train.epochs=null", "train.steps=3", "train.total_batch_size=8", "train.batch_size=null", "train.device=cpu",
    "train.precision=float32", "train.compile=false", "checkpoint={every_epochs: 0}",
    "log={every_steps: 1, tensorboard: false, images_every_epochs: 0, num_images: 0}", "evaluate=[]",
)  # fmt: skip
PLAIN_SGD = {"type": "momentum", "lr": 0.05, "options": {"momentum": 0.0}}
"""Adam would turn the rounding of a gradient that is zero into a step of full size."""
STAGE_ONE = ("train.steps=22", "train.total_batch_size=16")
"""So long trains a first stage: enough for every code to begin somewhere."""


# --- runs and what they leave ----------------------------------------------------------------------------------------


def small_recipes(plugin: str) -> list[str]:
    """Names of the recipes of a plugin that end in `quickstart`."""
    return [info.name for info in recipes_of(plugin) if info.name.endswith("quickstart")]


def recipes_of(plugin: str) -> list[RecipeInfo]:
    """The recipes that a plugin ships."""
    registry = Registry()
    name = registry.plugin(plugin).name
    return [info for info in registry.recipes() if info.plugin == name]


def run(folder: Path, recipe: str, *overrides: str, registry: Registry | None = None) -> Path:
    """Train a recipe into a folder; returns the run directory."""
    registry = registry or Registry()
    return train(load_recipe(recipe, [*overrides, f"output_dir={folder}"], registry), registry)


def losses_of(run_dir: Path) -> list[float]:
    """The loss of every step; of several phases, one after the other."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [value for line in lines for key, value in line.items() if key == "loss" or key.endswith("/loss")]


def weights_of(run_dir: Path, group: str = "model") -> dict[str, Tensor]:
    """The tensors of the newest checkpoint of a run."""
    found = checkpoint.find_latest(run_dir / "checkpoints")
    assert found is not None, f"{run_dir} has no checkpoint"
    return found.tensors(group)


def optimizers_of(recipe: str, overrides: list[str], plain: dict[str, Any]) -> list[str]:
    """Overrides that replace every optimizer of a recipe by a plain one of constant rate, with its parameters."""
    loaded = load_recipe(recipe, overrides, Registry())
    plain = {**plain, "shape": "constant", "weight_decay": 0}
    if loaded.optimizers is None:
        return [f"optim={plain}"]
    return [
        f"optimizers.{name}={ {**plain, 'parameters': list(section.parameters)} }"
        for name, section in loaded.named_optimizers().items()
    ]


@contextmanager
def trainer_of(folder: Path, recipe: str, *overrides: str) -> Iterator[Trainer]:
    """A trainer of a recipe at its first step, with its loader open."""
    registry = Registry()
    loaded = load_recipe(recipe, [*overrides, f"output_dir={folder}"], registry)
    with Trainer.opened(loaded, registry) as trainer:
        yield trainer


def first_batch(trainer: Trainer) -> Batch:
    return next(iter(trainer.loader))


def losses_of_step(trainer: Trainer, batch: Batch, phase: str, *, model: Trainer | None = None) -> dict[str, Tensor]:
    """The losses of a batch at step 2 of a run, by its own model or that of another trainer of the same recipe."""
    model = model or trainer
    step = replace(trainer.run.step(2, batch, phase), teachers=model.teachers.session())
    torch.manual_seed(0)
    return model.engine.forward(step, batch.views).losses


# --- helpers ---------------------------------------------------------------------------------------------------------


class CrashAtStep:
    """A listener that interrupts the run after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def mim_checkpoint_saved(self, run: Any, path: Path) -> None:
        if checkpoint.step_of(path) == self.step:
            raise KeyboardInterrupt


def components_of(plugin: str) -> list[tuple[str, type[Any]]]:
    """(kind, class) of everything that a plugin registers."""
    registry = Registry()
    info = registry.plugin(plugin)
    registry.load(info.name)
    return [
        (each.kind, registry.find(each.kind, f"{info.name}:{each.name}")) for each in registry.components(info.name)
    ]


def options_of(cls: type[Any]) -> dict[str, Any]:
    return cls.Config.model_fields if hasattr(cls, "Config") else {}


def choices_of(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(kind, choice) of the components of a recipe."""
    yield "source", recipe.data.source
    yield from (("evaluation", choice) for choice in recipe.evaluate)
    for kind in ("views", "masker", "encoder", "objective"):
        yield kind, getattr(recipe, kind)
    for head in recipe.named_heads().values():
        for kind in ("target", "decoder", "loss"):
            yield kind, getattr(head, kind)


def masker_of(trainer: Trainer) -> Masker:
    masker = trainer.objective.masker
    if masker is None:
        pytest.skip(f"objective '{trainer.objective.name}' has no masker")
    return masker


def draw(trainer: Trainer, masker: Masker, batch: Batch, index: int = 0) -> tuple[Masked, Views]:
    """What a masker makes of a batch, and the views it was given."""
    step = trainer.run.step(index, batch, trainer.phases[0].name)
    views = trainer.engine.prepare(step, batch.views)
    with torch.no_grad():
        return masker(step, dict(views)), views


def last_four(batch: Batch) -> Batch:
    views = {name: view[4:] for name, view in batch.views.items()}
    return replace(batch, views=views, positions=batch.positions[4:])


def of_samples(mask: Mask, part: slice, num_samples: int = 8) -> Tensor:
    """Rows of some samples; several masks of a sample stand in blocks of the batch's length."""
    return mask.hidden.unflatten(0, (-1, num_samples))[:, part].flatten(0, 1)


def seen_by(encoder: Encoder, view: str) -> EncoderSpec:
    """The encoder as a view sees it; one of a single view takes any, as a caller hands it one without its name."""
    return encoder.spec.of(view) if isinstance(encoder, JointEncoder) else encoder.spec


def encoded(encoder: Encoder, views: Views, masks: dict[str, Mask]) -> Latent:
    """All that an encoder offers of the masked views: of those that it joins, or of one."""
    if isinstance(encoder, JointEncoder):
        return encoder(views, masks, encoder.spec.offers)
    ((name, mask),) = masks.items()
    return encoder(views[name], mask, encoder.spec.offers)


def assert_latent(encoder: Encoder, latent: Latent, masks: dict[str, Mask]) -> None:
    """An encoder's answer to all that it offers is as its spec says, for every view that it joins or for the one."""
    spec, ask = encoder.spec, encoder.spec.offers
    prefix = 0 if latent.prefix is None else latent.prefix.shape[1]
    assert prefix == spec.num_prefix_tokens
    total = prefix
    if isinstance(encoder, JointEncoder):
        assert latent.stretches.keys() == set(spec.views)
    for name, mask in masks.items():
        seen = seen_by(encoder, name)
        total += assert_tokens(seen, latent.of(name), mask.at(seen.grid))
    assert latent.tokens.shape[1] == total - prefix
    batch_size = len(latent.tokens)
    assert latent.attn.keys() >= ask.attn
    for number, attention in latent.attn.items():
        assert attention.shape == (batch_size, spec.num_heads, total, total), f"attention of block {number}"
    assert latent.qkv.keys() >= ask.qkv
    for number, qkv in latent.qkv.items():
        assert qkv.shape[:4] == (3, batch_size, spec.num_heads, total), f"qkv of block {number}"
    assert latent.aux.keys() >= ask.aux


def assert_tokens(spec: EncoderSpec, latent: Latent, mask: Mask) -> int:
    """Tokens and layers of one view are as the encoder's spec says; `mask` is on its grid. Returns their number."""
    batch_size, num_tokens, dim = latent.tokens.shape
    num_visible = mask.num_keep if spec.visible_only else spec.grid.num_patches
    assert (batch_size, num_tokens, dim) == (len(mask.hidden), num_visible, spec.dim)
    assert latent.grid == spec.grid
    if latent.ids is None:
        assert num_tokens == spec.grid.num_patches, "tokens at some positions only, but no ids that say which"
    elif spec.visible_only:
        assert not mask.hidden.gather(1, latent.ids).any(), "a token stands at a hidden position"
    assert latent.layers.keys() >= spec.offers.layers
    for number, layer in latent.layers.items():
        layer_dim, grid = spec.layers.get(number, (spec.dim, spec.grid))
        length = spec.num_prefix_tokens + (num_visible if grid == spec.grid else grid.num_patches)
        assert layer.shape == (batch_size, length, layer_dim), f"layer {number}"
    return num_tokens


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, and tensors equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
