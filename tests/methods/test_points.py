"""No images at all: sets of points (Point-MAE)."""

from __future__ import annotations

import torch
from methods.harness import (
    lines_of,
    plugin,
    run,
)
from torch import nn

from mim_framework.base import rng
from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder, Loss, Source, Target, ViewBuilder
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask, Latent, Pred, Sample
from mim_framework.contract.specs import EncoderSpec, TargetSpec, ViewSpec
from mim_framework.nn.masking import gather_tokens
from mim_framework.runtime.metrics import read_metrics


@plugin
class Surfaces(Source):
    """Point sets (64, 3) on spheres and cylinders of several proportions."""

    name = "surfaces"
    classes = ("sphere", "cylinder")

    class Config(Section):
        first: int = 0
        """Number of the first surface."""

    def __len__(self):
        return 64

    def read(self, index):
        index += self.config.first
        u, v = rng.uniform(0, f"surface {index}", torch.arange(64), 2).T
        angle, height, label = 2 * torch.pi * u, 2 * v - 1, index % 2
        radius = torch.ones_like(v) if label else (1 - height**2).sqrt()
        stretch = 0.5 + index % 7 / 7
        points = torch.stack([radius * angle.cos(), radius * angle.sin(), stretch * height], dim=-1)
        return Sample(points, f"surface {index}", label)

    def evaluation_sources(self):
        return self, Surfaces(self.Config(first=64))


@plugin
class PointGroups(ViewBuilder):
    """A randomly turned point set, on the device cut into groups around centres that are far apart."""

    name = "point_groups"
    num_random = 1

    class Config(Section):
        num_groups: int = 8
        """Groups of a point set."""
        group_size: int = 8
        """Points of a group."""

    def __init__(self, config):
        super().__init__(config)
        self.specs = {"x": ViewSpec.of_kind("points", "x", config.num_groups, 1 + config.group_size, 3)}

    def __call__(self, sample, rand):
        angle = 2 * torch.pi * rand[0]
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        return {"x": torch.cat([sample.data[:, :2] @ turn, sample.data[:, 2:]], dim=1)}

    def prepare(self, step, batch):
        """points (B, N, 3) -> (B, G, 1 + K, 3): each centre, then its nearest points relative to it."""
        points = batch["x"]
        rows, chosen = torch.arange(len(points), device=points.device), [torch.zeros_like(points[:, 0, 0]).long()]
        distance = torch.full_like(points[..., 0], torch.inf)
        while len(chosen) < self.config.num_groups:
            distance = torch.minimum(distance, (points - points[rows, chosen[-1]][:, None]).square().sum(-1))
            chosen.append(distance.argmax(1))
        centres = gather_tokens(points, torch.stack(chosen, dim=1))
        nearest = torch.cdist(centres, points).topk(self.config.group_size, largest=False).indices
        groups = gather_tokens(points, nearest.flatten(1)).unflatten(1, nearest.shape[1:]) - centres[:, :, None]
        return {"x": torch.cat([centres[:, :, None], groups], dim=2)}

    def example(self, batch_size):
        return {"x": rng.uniform(0, "example", torch.arange(batch_size), 64 * 3).reshape(-1, 64, 3)}

    def evaluation_view(self, sample):
        return sample.data


@plugin
class PointEncoder(Encoder):
    """A token for every group, the mask token at hidden ones, with the centre as position."""

    name = "points"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        num_groups, _, chans = specs.view("x").shape
        self.points = nn.Sequential(nn.Linear(chans, 16), nn.GELU(), nn.Linear(16, 16))
        self.position, self.mask_token = nn.Linear(chans, 16), nn.Parameter(torch.zeros(16))
        self.mix = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.spec = EncoderSpec(16, Grid((num_groups,)), 1, 1, 1, in_chans=chans)

    def forward(self, view, mask, ask=Ask()):
        tokens = self.points(view[:, :, 1:]).amax(2)
        x = torch.where(mask.hidden[..., None], self.mask_token, tokens) + self.position(view[:, :, 0])
        return Latent(x + self.mix(x + x.mean(1, keepdim=True)), self.spec.grid)


@plugin
class PointTarget(Target):
    """The points of each group around its centre."""

    name = "points"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        num_groups, size, chans = specs.view("x").shape
        self.spec = TargetSpec("dense", (size - 1) * chans, Grid((num_groups,)))

    def forward(self, step, masked):
        return masked.clean("x")[:, :, 1:].flatten(2)


@plugin
class ChamferLoss(Loss):
    """Squared distance of each point to the nearest one of the other set, both ways."""

    name = "chamfer"

    def forward(self, pred, target, mask, latent):
        predicted = pred.values.unflatten(-1, (-1, 3))
        wanted = Pred(target, pred.grid).at(pred.ids).unflatten(-1, (-1, 3))
        distance = (predicted[..., :, None, :] - wanted[..., None, :, :]).square().sum(-1)
        return distance.amin(-1).mean() + distance.amin(-2).mean()


POINTS = {
    "data": {"source": {"type": "surfaces"}, "workers": 0},
    "views": "point_groups",
    "encoder": "points",
    "target": "points",
    "loss": "chamfer",
}


def test_point_sets_train_through_the_same_trainer(tmp_path):
    options = ["train.steps=60", "train.total_batch_size=16", "log.every_steps=5", "optim.lr=0.02"]
    run_dir = run(tmp_path, *options, **POINTS)
    losses = [line["loss"] for line in lines_of(run_dir)]
    assert losses[-1] < 0.75 * losses[0]
    [knn] = [line["knn_top1"] for line in read_metrics(run_dir) if "knn_top1" in line]
    assert 0 < knn <= 1
