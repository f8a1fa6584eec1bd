"""Every shipped encoder on views that are no squares, of one channel and of four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from methods.harness import RECIPE

from mim_framework.base.errors import RecipeError
from mim_framework.base.section import Section
from mim_framework.contract.components import Source
from mim_framework.contract.records import Sample
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
SMALL_DECODER = {"embed_dim": 16, "depth": 1, "num_heads": 2}
DVAE = {"vocab_size": 16, "hidden_dim": 8, "blocks_per_group": 1}
PIXELS = {"masker": {"type": "random", "mask_ratio": 0.5}, "target": "pixels", "decoder": "linear", "loss": "mse"}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {**PIXELS, "encoder": VIT},
    "mae_vit": {**PIXELS, "encoder": VIT, "decoder": {"type": "mae_decoder", **SMALL_DECODER}},
    "simmim_vit": {**PIXELS, "encoder": VIT},
    "simmim_swin": {**PIXELS, "encoder": SWIN},
    "simmim_swinv2": {**PIXELS, "encoder": SWIN},
    "maskfeat_vit": {**PIXELS, "encoder": VIT, "target": {"type": "hog", "cell_size": 4}},
    "maskfeat_mvit": {**PIXELS, "encoder": {"embed_dim": 8, "depths": [1, 1, 1, 2]}, "target": "hog"},
    "mixmim_swin": {
        "encoder": {**SWIN, "window_size": [4, 4]}, "masker": "mixmim", "target": "pixels", "loss": "mse",
        "decoder": {"type": "mixmim_decoder", **SMALL_DECODER},
    },
    "beit": {**PIXELS, "encoder": VIT},
    "timm": {
        "encoder": {"model": "test_vit"}, "masker": "none", "decoder": "linear", "loss": "mse",
        "target": {"type": "features", "teacher": "teacher"},
        "teachers": {"teacher": {"copy": ["encoder"], "momentum": 0.9}},
    },
    "dvae": {
        "encoder": DVAE, "masker": "none", "target": "dvae_pixels", "loss": "dvae_elbo",
        "decoder": {"type": "dvae_decoder", "hidden_dim": 8, "init_dim": 8, "blocks_per_group": 1},
    },
    "vqkd": {
        "encoder": {**VIT, "num_codes": 16, "code_dim": 8}, "masker": "none", "loss": "cosine",
        "target": {"type": "features", "teacher": "teacher"},
        "teachers": {"teacher": {"encoder": {"type": "vit", **VIT}, "random": True}},
        "decoder": {"type": "vqkd_decoder", **SMALL_DECODER},
    },
}  # fmt: skip
"""Small options and the other slots, by the name of an encoder."""
SQUARE_ONLY = {"maskfeat_mvit": "needs square images of a multiple of 16 pixels, got 32x64"}
"""Encoders whose positions are those of timm's square tables, and what they say of other views."""


class Bands(Source):
    """Waves, other ones in every band and image."""

    name = "bands"

    class Config(Section):
        count: int
        """Bands of an image."""

    config: Config

    def __len__(self) -> int:
        return 8

    def read(self, index: int) -> Sample:
        rows, columns = np.mgrid[:40, :80]
        waves = [127 + 120 * np.sin(rows / (2 + i) + columns / (3 + index)) for i in range(self.config.count)]
        return Sample(np.stack(waves, -1).astype(np.uint8), f"waves {index}")


def test_every_shipped_encoder_is_tried():
    assert sorted(ENCODERS) == sorted(Registry().classes("encoder"))


def trained(folder: Path, name: str, chans: int, img_size: list[int]) -> list[float]:
    """The losses of two steps of an encoder on views of so many channels."""
    slots = {**ENCODERS[name], "encoder": {"type": name, **ENCODERS[name]["encoder"]}}
    views = {"type": "image", "img_size": img_size, "mean": [0.5] * chans, "std": [0.25] * chans}
    source = {"source": {"type": "bands", "count": chans}, "workers": 0}
    changes = {"data": source, "views": views, "train": {**RECIPE["train"], "steps": 2}, "evaluate": [], **slots}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({**RECIPE, **changes}))
    registry = RegistryWith(Bands)
    run_dir = train(load_recipe(file, [f"output_dir={folder}"], registry), registry)
    return [line["loss"] for line in read_metrics(run_dir) if "loss" in line]


@pytest.mark.parametrize("chans", [1, 4])
@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - SQUARE_ONLY.keys()))
def test_an_encoder_trains_on_a_view_of_32_by_64_pixels(tmp_path, name, chans):
    losses = trained(tmp_path, name, chans, [32, 64])
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", sorted(SQUARE_ONLY))
def test_an_encoder_of_squares_says_so_and_takes_any_number_of_channels(tmp_path, name):
    with pytest.raises(RecipeError, match=SQUARE_ONLY[name]):
        trained(tmp_path, name, 4, [32, 64])
    assert np.isfinite(trained(tmp_path, name, 4, [32, 32])).all()
