"""Every masker, encoder, target, decoder and loss of the installed plugins against one another.

    python tools/make_combinations.py        # writes docs/combinations.md

Each combination is built small and takes one training step, or is refused when the recipe is checked.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mim_framework.assembly.builder import build_model, build_optimizers
from mim_framework.assembly.preflight import preflight
from mim_framework.base.errors import RecipeError
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

PAGE = Path(__file__).parents[1] / "docs" / "combinations.md"
IMG_SIZE = 32
KINDS = ("masker", "encoder", "target", "decoder", "loss")

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
DVAE = {"vocab_size": 16, "hidden_dim": 8, "blocks_per_group": 1}
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("masker", "random"): {"mask_ratio": 0.5},
    ("masker", "block"): {"mask_ratio": 0.5},
    ("encoder", "mae_vit"): VIT,
    ("encoder", "vit"): VIT,
    ("encoder", "timm"): {"model": "test_vit"},
    ("encoder", "simmim_vit"): VIT,
    ("encoder", "simmim_swin"): SWIN,
    ("encoder", "simmim_swinv2"): SWIN,
    ("encoder", "maskfeat_vit"): VIT,
    ("encoder", "maskfeat_mvit"): {"embed_dim": 8, "depths": [1, 1, 1, 2]},
    ("encoder", "mixmim_swin"): {**SWIN, "window_size": [4, 4]},
    ("encoder", "beit"): VIT,
    ("encoder", "dvae"): DVAE,
    ("encoder", "vqkd"): {**VIT, "num_codes": 16, "code_dim": 8},
    ("target", "features"): {"teacher": "teacher"},
    ("target", "hog"): {"cell_size": 4},
    ("decoder", "mae_decoder"): {"embed_dim": 16, "depth": 1, "num_heads": 2},
    ("decoder", "mixmim_decoder"): {"embed_dim": 16, "depth": 1, "num_heads": 2},
    ("decoder", "dvae_decoder"): {"hidden_dim": 8, "init_dim": 8, "blocks_per_group": 1},
    ("decoder", "vqkd_decoder"): {"embed_dim": 16, "depth": 1, "num_heads": 2},
}
"""Options that make a component small; the others have none worth setting."""


@dataclass(frozen=True)
class Outcome:
    """What became of a combination: names by kind, and why it was refused, or nothing if it trained a step."""

    names: dict[str, str]
    refusal: str = ""

    def refused_slot(self) -> str:
        """The slot at which the build stopped: what is chosen for later ones makes no difference. "" if it trained."""
        found = re.match(r"recipe: (\w+):", self.refusal)
        return found[1] if found and found[1] in KINDS else ""

    def names_both_sides(self) -> bool:
        """Whether the refusal says which two components do not fit."""
        return sum(f"'{name}'" in self.refusal or f" {name}: " in self.refusal for name in self.names.values()) >= 2


def names_of(registry: Registry) -> dict[str, list[str]]:
    """Names of all installed components by kind."""
    return {kind: sorted(registry.classes(kind)) for kind in KINDS}


def recipe_of(names: dict[str, str]) -> Recipe:
    """A small recipe of these components, on made-up images of 32 pixels."""
    slots = {kind: {"type": name, **SMALL.get((kind, name), {})} for kind, name in names.items()}
    stride = 16 if names["encoder"] in ("timm", "maskfeat_mvit") else 8
    views: dict[str, Any] = {"type": "image", "img_size": IMG_SIZE}
    if names["target"] == "features":  # of a teacher with the student's grid
        slots["teachers"] = {"teacher": {"encoder": {"type": "vit", **VIT, "patch_size": stride}, "random": True}}
    if names["target"] == "token_ids":  # of a tokenizer that sees a second view, so large that the grids are the same
        views |= {"type": "beit", "second_size": IMG_SIZE * 8 // stride}
        slots["teachers"] = {"tokenizer": {"encoder": {"type": "dvae", **DVAE}, "random": True}}
    return Recipe.model_validate(
        {
            "name": "combination",
            "data": {"source": "digits"},
            "views": views,
            **slots,
            "optim": {"lr": 1e-3, "shape": "constant"},
            "train": {"total_batch_size": 4, "steps": 1, "device": "cpu", "precision": "float32"},
            "evaluate": [],
        }
    )


def attempt(names: dict[str, str], registry: Registry) -> Outcome:
    """Build a combination and take one step with it.

    Raises:
        AssertionError: if it trains, but not all of it or not to finite numbers.
    """
    try:
        model = build_model(recipe_of(names), registry)
    except RecipeError as error:
        return Outcome(names, str(error))
    device = torch.device("cpu")
    losses = preflight(model, device)  # of which one condition is that every parameter has a gradient
    assert all(map(math.isfinite, losses.values())), names
    [optimizer] = build_optimizers(model.recipe, model.objective, 4).values()
    engine = model.engine(device)
    step = engine.step(seed=model.recipe.seed, positions=torch.arange(4))
    sum(engine.forward(step, model.example(4)).losses.values()).backward()
    optimizer.schedule(step)
    assert bool(optimizer.clip().isfinite()), names
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.objective.parameters()), names
    return Outcome(names)


def attempts(registry: Registry, **fixed: str) -> Iterator[Outcome]:
    """All combinations, or those with the given names of some kinds."""
    choices = {kind: [fixed[kind]] if kind in fixed else names for kind, names in names_of(registry).items()}
    refusals: dict[tuple[str, ...], str] = {}  # of the first components, whatever follows them
    for chosen in itertools.product(*choices.values()):
        names = dict(zip(choices, chosen, strict=True))
        known = next((refusals[chosen[:n]] for n in range(1, len(chosen)) if chosen[:n] in refusals), None)
        outcome = attempt(names, registry) if known is None else Outcome(names, known)
        if known is None and (slot := outcome.refused_slot()):
            refusals[chosen[: max(2, KINDS.index(slot) + 1)]] = outcome.refusal
        yield outcome


def page(outcomes: list[Outcome]) -> str:
    """The tables as Markdown."""
    trained = [outcome.names for outcome in outcomes if not outcome.refusal]
    lines = [
        "# What combines with what",
        "",
        "Made by `python tools/make_combinations.py` from the installed plugins. Every combination of a masker, an",
        "encoder, a target, a decoder and a loss is built small and takes a training step with finite loss and a",
        "gradient on every parameter, or is refused when the recipe is checked, with an error that names both sides.",
        "",
        f"Of {len(outcomes):,} combinations {len(trained):,} train. A dot: some combination with this pair does.",
    ]
    for row, column in (("masker", "encoder"), ("encoder", "decoder"), ("decoder", "target"), ("target", "loss")):
        rows, columns = (sorted({outcome.names[kind] for outcome in outcomes}) for kind in (row, column))
        fit = {(names[row], names[column]) for names in trained}
        lines += ["", f"| {row} \\ {column} | " + " | ".join(f"`{name}`" for name in columns) + " |"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| `{each}` | " + " | ".join("•" if (each, other) in fit else " " for other in columns) + " |"
            for each in rows
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(list(attempts(Registry()))))
