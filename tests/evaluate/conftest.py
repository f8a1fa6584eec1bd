"""A run on plain colours: its encoder shows what it sees, its decoder says one colour."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mim_framework.assembly.builder import build_model
from mim_framework.base.section import Section
from mim_framework.checkpoints.checkpoint import save_checkpoint
from mim_framework.contract.components import Encoder, Target
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent, Masked
from mim_framework.contract.specs import EncoderSpec, Specs, TargetSpec
from mim_framework.contract.step import Step
from mim_framework.nn.patches import patchify
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.writing import dump_recipe
from mim_framework.testing import RegistryWith

COLOURS = {"blue": (0, 0, 1), "green": (0, 1, 0), "red": (1, 0, 0)}
RECIPE = """
name: colours
output_dir: {folder}
data: {{source: {{type: folder, root: "{folder}/train", labels: {labels}}}, workers: 0{eval_source}}}
views: {{type: image, img_size: 8, mean: [0, 0, 0], std: [1, 1, 1]}}
masker: {{type: random, mask_ratio: 0.5}}
encoder: patches
target: {target}
decoder: linear
loss: mse
optim: {{lr: 0.1}}
train: {{total_batch_size: 2, steps: 1, device: cpu, precision: float32}}
evaluate: [{{type: knn, k: 1}}]
log: {{num_images: 3}}
"""


class PatchEncoder(Encoder):
    """A token is `scale` times its patch, plus 1; hidden tokens are 0. Untrained, it tells no image from another."""

    name = "patches"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.scale = nn.Parameter(torch.tensor(0.0))
        self.dropout = nn.Dropout(0.5)  # eval mode or the numbers are wrong
        self.spec = EncoderSpec(dim=48, grid=Grid((2, 2)), stride=4, depth=1, num_heads=1, num_prefix_tokens=1)

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        tokens = self.dropout(patchify(view, 4) * self.scale + 1)
        prefix = 100 + tokens.mean(1, keepdim=True)
        return Latent(tokens * ~mask.hidden[..., None], self.spec.grid, prefix=prefix)


class EdgeTarget(Target):
    """Something that is no picture."""

    name = "edges"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.spec = TargetSpec("dense", 48, specs.encoder.grid)

    def forward(self, step: Step, masked: Masked) -> Tensor:
        return patchify(masked.clean("x"), 4).diff(dim=-1, append=torch.zeros(1))


def write_images(folder: Path, shades: range) -> None:
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for shade in shades:
            Image.new("RGB", (8, 8), tuple(part * shade for part in colour)).save(folder / name / f"{shade}.png")


@pytest.fixture
def registry():
    return RegistryWith(PatchEncoder, EdgeTarget)


@pytest.fixture
def make_run(tmp_path, registry):
    """Make the run directory of a "trained" model, whose encoder sees and whose decoder paints every patch white."""

    def make(*, labels: bool = True, target: str = "pixels") -> Path:
        write_images(tmp_path / "train", range(100, 250, 50))
        write_images(tmp_path / "test", range(120, 200, 40))
        test = f'{{type: folder, root: "{tmp_path}/test", labels: true}}'
        eval_source = f", eval_source: {test}" if labels else ""
        recipe_file = tmp_path / "colours.yaml"
        text = RECIPE.format(folder=tmp_path, labels=str(labels).lower(), eval_source=eval_source, target=target)
        recipe_file.write_text(text)
        recipe = load_recipe(recipe_file, [], registry)
        model = build_model(recipe, registry)
        weights = model.objective.state_dict()
        weights["encoder.scale"].fill_(1.0)
        weights["heads.main.decoder.head.weight"].zero_()
        weights["heads.main.decoder.head.bias"].fill_(1.0)
        run_dir = tmp_path / "colours"
        run_dir.mkdir()
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
        save_checkpoint(run_dir / "checkpoints", 7, {"model": weights}, {})
        return run_dir

    make.components = (PatchEncoder, EdgeTarget)
    return make


@pytest.fixture
def as_run():
    """What `Run` is for a picture: of a loaded run, the parts that are read."""
    return lambda loaded: SimpleNamespace(
        recipe=loaded.recipe,
        source=loaded.source,
        model=loaded,
        device=loaded.device,
        engine=loaded.engine(loaded.device),
    )
