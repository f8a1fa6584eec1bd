"""Point-MAE, masked autoencoders of point clouds (Pang et al. 2022, arXiv 2203.06604).

A step reads `PointGroups.prepare`, `PointEncoder.forward`, `PointDecoder.forward` and `chamfer`, in this order. The
view "x" is one tensor (B, G, 1 + K, 3): of every group its centre, then its K points relative to it. The core's
`random` masker hides groups as it hides patches; the surfaces to learn from are in `shapes.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim_framework import (
    Ask,
    DataError,
    Decoder,
    Encoder,
    EncoderSpec,
    Grid,
    Latent,
    Loss,
    Mask,
    Masked,
    Masker,
    MaskerSpec,
    Pred,
    PredSpec,
    Sample,
    Section,
    Specs,
    Step,
    Target,
    TargetSpec,
    ViewBuilder,
    Views,
    ViewSpec,
    gather_tokens,
    hookimpl,
)
from mim_framework.nn import check_heads, replace_drop_path
from mim_plugin_guest_pointmae.shapes import MeshShapes

requires_api = "2"

# --- from a cloud to groups ------------------------------------------------------------------------------------------


def unit_sphere(points: Tensor) -> Tensor:
    """points (N, 3), moved and scaled so that their mean is the origin and the farthest one is at distance 1."""
    points = points - points.mean(0)
    return points / points.norm(dim=1).max()


def farthest_points(points: Tensor, num_points: int) -> Tensor:
    """points (B, N, 3) -> indices (B, num_points): the first point, then always the one farthest from those chosen.

    The official kernel begins with the first point too. It also skips points closer than 0.03 to the origin, wherever
    the cloud lies; we do not.
    """
    rows = torch.arange(len(points), device=points.device)
    chosen = [torch.zeros_like(rows)]
    distance = torch.full_like(points[..., 0], torch.inf)
    while len(chosen) < num_points:
        newest = points[rows, chosen[-1]][:, None]
        distance = torch.minimum(distance, (points - newest).square().sum(-1))
        chosen.append(distance.argmax(1))
    return torch.stack(chosen, dim=1)


def group(points: Tensor, num_groups: int, group_size: int) -> Tensor:
    """points (B, N, 3) -> (B, G, 1 + K, 3): centres far apart, each before its K nearest points relative to it."""
    centres = gather_tokens(points, farthest_points(points, num_groups))
    # By differences: a matrix product would round coarsely.
    distance = torch.cdist(centres, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.topk(group_size, largest=False).indices
    neighbours = gather_tokens(points, nearest.flatten(1)).unflatten(1, nearest.shape[1:])
    centres = centres[:, :, None]
    return torch.cat([centres, neighbours - centres], dim=2)


def silhouettes(points: Tensor, size: int = 32, reach: float = 1.25) -> Tensor:
    """points (B, N, 3) -> pictures (B, 3, size, size): points seen along each axis, as red, green and blue."""
    cell = ((points / reach + 1) / 2 * size).long().clamp(0, size - 1)
    pixel = torch.stack([cell[..., i] + size * (size - 1 - cell[..., j]) for i, j in ((1, 2), (0, 2), (0, 1))], dim=1)
    return points.new_zeros(len(points), 3, size * size).scatter(2, pixel, 1.0).unflatten(2, (size, size))


class PointGroups(ViewBuilder):
    """Some points of a cloud, in the unit sphere, scaled and moved at random; cut into groups on the device."""

    name = "point_groups"
    num_random = 8

    class Config(Section):
        num_points: int = Field(1024, gt=0)
        """Points that are drawn from a cloud."""
        num_groups: int = Field(64, gt=0)
        """Groups of a cloud; their centres are chosen far apart."""
        group_size: int = Field(32, gt=0)
        """Points of a group, the nearest ones to its centre; groups may share points."""
        scale: tuple[float, float] = (2 / 3, 3 / 2)
        """Smallest and largest factor, drawn for each axis."""
        translate: float = Field(0.2, ge=0)
        """Largest shift along each axis, in radii of the unit sphere."""

    config: Config

    def __init__(self, config: Section) -> None:
        super().__init__(config)
        c = self.config
        for key in ("num_groups", "group_size"):
            if getattr(c, key) > c.num_points:
                raise ValueError(f"{key} {getattr(c, key)} is more than num_points {c.num_points}")
        self.specs = {"x": ViewSpec.of_kind("points", "x", c.num_groups, 1 + c.group_size, 3)}

    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        """Points (num_points, 3), another choice in every epoch, as officially of 8192 stored ones."""
        smallest, largest = self.config.scale
        scale = smallest + (largest - smallest) * rand[:3]
        shift = self.config.translate * (2 * rand[3:6] - 1)
        order = np.random.default_rng((rand[6:] * 2**24).long().tolist()).permutation(len(sample.data))
        return {"x": self.choose(sample, torch.from_numpy(order)) * scale + shift}

    def evaluation_view(self, sample: Sample) -> Tensor:
        """The first points, as a source gives them in random order."""
        return self.choose(sample, torch.arange(len(sample.data)))

    def choose(self, sample: Sample, order: Tensor) -> Tensor:
        """The points (num_points, 3) that come first in an order, in the unit sphere.

        Raises:
            DataError: if the cloud has too few, or is none.
        """
        if not isinstance(sample.data, Tensor) or sample.data.shape[1:] != (3,):
            raise DataError(
                f"'{sample.name}' is no cloud of points (N, 3); use a source of points, such as mesh_shapes"
            )
        if len(order) < self.config.num_points:
            wanted = f"views.num_points={self.config.num_points}"
            raise DataError(f"'{sample.name}' has {len(order)} points, {wanted} wants more; lower it")
        return unit_sphere(sample.data[order[: self.config.num_points]])

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """points (B, N, 3) -> groups (B, G, 1 + K, 3)."""
        return {"x": group(batch["x"], self.config.num_groups, self.config.group_size)}

    def example(self, batch_size: int) -> dict[str, Tensor]:
        """Points in a cube."""
        points = np.random.default_rng(0).uniform(-0.5, 0.5, (batch_size, self.config.num_points, 3))
        return {"x": torch.from_numpy(points).float()}

    def to_image(self, view: Tensor) -> Tensor:
        """Silhouettes, (B, 3, 32, 32): what `mim eval knn` compares with as raw pixels."""
        return silhouettes(absolute(view).flatten(1, 2))


def absolute(view: Tensor) -> Tensor:
    """groups (B, G, 1 + K, 3) -> their points (B, G, K, 3) where they lie in the cloud."""
    return view[:, :, 1:] + view[:, :, :1]


# --- what is hidden --------------------------------------------------------------------------------------------------


class BlockOfGroups(Masker):
    """Hide a connected part: a group drawn at random and those whose centres are nearest (the paper's block mask)."""

    name = "group_block"

    class Config(Section):
        mask_ratio: float = Field(0.6, gt=0, lt=1)
        """Share of the groups to hide, rounded down to a whole number."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        grid = specs.encoder.grid
        num_hidden = int(self.config.mask_ratio * grid.num_patches)
        if num_hidden < 1:
            raise ValueError(f"mask_ratio {self.config.mask_ratio} hides none of the {grid.num_patches} groups")
        self.spec = MaskerSpec(grid, equal=True, num_hidden=num_hidden)

    def forward(self, step: Step, views: Views) -> Masked:
        grid, centres = self.spec.grid, views["x"][:, :, 0]
        seed = (step.rand("mask", 1) * grid.num_patches).long()
        distance = (centres - gather_tokens(centres, seed)).square().sum(-1)
        order = distance.argsort(dim=1, descending=True, stable=True)
        return Masked({"x": Mask.from_shuffle(order, grid.num_patches - int(self.spec.num_hidden), grid)}, views)


# --- encoder ---------------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch norm over all but the last axis, with the statistics of all ranks, on any device."""

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.world: Any = None
        """The ranks of the step; None where there is no step yet, which is alone."""
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (
            self.statistics(x.float().flatten(0, -2)) if self.training else (self.running_mean, self.running_var)
        )
        return ((x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

    def statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows (n, D) -> mean and variance (D,) over the rows of all ranks, which have the same number of them."""
        mean = self.over_ranks(rows.mean(0))
        var = self.over_ranks((rows - mean).square().mean(0))
        num_rows = len(rows) * (1 if self.world is None else self.world.size)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * num_rows / (num_rows - 1), self.momentum)
        return mean, var

    def over_ranks(self, value: Tensor) -> Tensor:
        return value if self.world is None else self.world.mean(value)


class MiniPointNet(nn.Module):
    """A token for every group: each point alone, with the maximum over the group, and the maximum of that."""

    def __init__(self, dim: int, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, width), norm(width), nn.ReLU(), nn.Linear(width, 2 * width))
        self.second = nn.Sequential(
            nn.Linear(4 * width, 4 * width), norm(4 * width), nn.ReLU(), nn.Linear(4 * width, dim)
        )

    def forward(self, groups: Tensor) -> Tensor:
        """groups (B, n, K, 3) -> (B, n, D), whatever the order of a group's points."""
        x = self.first(groups)
        x = torch.cat([x.amax(2, keepdim=True).expand_as(x), x], dim=-1)
        return self.second(x).amax(2)


def position_mlp(dim: int) -> nn.Sequential:
    """From the centre of a group to its position embedding."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


def make_blocks(dim: int, config: Any) -> nn.ModuleList:
    """Pre-norm transformer blocks without biases of query, key and value."""
    check_heads(dim, config.num_heads)
    rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
    blocks = nn.ModuleList(Block(dim, config.num_heads, drop_path=rate, norm_layer=nn.LayerNorm) for rate in rates)
    replace_drop_path(blocks)
    return blocks


class PointEncoder(Encoder):
    """Mini-PointNet tokens of the visible groups alone, through a transformer that gets positions at every block.

    Aux `centres` (B, G, 3): where all groups lie, hidden ones too. Officially hidden groups pass through the
    mini-PointNet as well before they are dropped, where batch norm lets visible tokens know of them; ours do not.
    """

    name = "pointmae"

    class Config(Section):
        embed_dim: int = Field(384, gt=0)
        """Width; a multiple of `num_heads`."""
        depth: int = Field(12, gt=0)
        """Number of transformer blocks."""
        num_heads: int = Field(6, gt=0)
        """Attention heads per block."""
        drop_path_rate: float = Field(0.1, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first."""
        point_dim: int = Field(128, gt=0)
        """Width of the mini-PointNet's first layer; the next are two and four times as wide."""
        norm: Literal["batch", "layer"] = "batch"
        """Norm inside the mini-PointNet. `batch` is the paper's, over all ranks; its statistics, and so the weights,
        depend on the size of the micro-batch. With `layer` every point stands alone."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        if view.kind != "points":
            raise ValueError(f"view 'x' holds {view.kind}, encoder 'pointmae' needs points; use views 'point_groups'")
        self.tokenizer = MiniPointNet(c.embed_dim, c.point_dim, {"batch": BatchNorm, "layer": nn.LayerNorm}[c.norm])
        self.pos_embed = position_mlp(c.embed_dim)
        self.blocks = make_blocks(c.embed_dim, c)
        self.norm = nn.LayerNorm(c.embed_dim)
        self.apply(partial(init_linear, init=partial(nn.init.trunc_normal_, std=0.02)))
        grid, layers = Grid(view.shape[:1]), range(c.depth)
        self.spec = EncoderSpec(
            dim=c.embed_dim,
            grid=grid,
            stride=1,
            depth=c.depth,
            num_heads=c.num_heads,
            in_chans=3,
            visible_only=True,
            accepts=frozenset({"equal", "none"}),
            offers=Ask(layers=frozenset(layers), aux=frozenset({"centres"})),
            layers=dict.fromkeys(layers, (c.embed_dim, grid)),
        )

    def begin_step(self, step: Step) -> None:
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.world = step.world

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, G, 1 + K, 3) -> tokens (B, n, D) of the visible groups, in the order of `mask.ids_keep`."""
        ids = None if mask.num_hidden == 0 else mask.ids_keep
        visible = view if ids is None else gather_tokens(view.flatten(2), ids).unflatten(2, view.shape[2:])
        x, position = self.tokenizer(visible[:, :, 1:]), self.pos_embed(visible[:, :, 0])
        layers = {}
        for i, block in enumerate(self.blocks):
            x = block(x + position)
            if i in ask.layers:
                layers[i] = x
        aux = {"centres": view[:, :, 0]} if "centres" in ask.aux else {}
        return Latent(self.final_norm(x), self.spec.grid, ids, layers=layers, aux=aux)


# --- target, decoder, loss -------------------------------------------------------------------------------------------


class GroupTarget(Target):
    """The points of a group relative to its centre."""

    name = "group_points"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        num_groups, rows, chans = specs.view("x").shape
        self.spec = TargetSpec("dense", (rows - 1) * chans, Grid((num_groups,)))

    def forward(self, step: Step, masked: Masked) -> Tensor:
        """(B, G, 3K)"""
        return masked.clean("x")[:, :, 1:].flatten(2)


class PointDecoder(Decoder):
    """Light transformer over visible tokens and mask tokens, which know where their groups lie but nothing else."""

    name = "pointmae_decoder"
    ask = Ask(aux=frozenset({"centres"}))

    class Config(Section):
        depth: int = Field(4, gt=0)
        """Number of transformer blocks, as wide as the encoder's."""
        num_heads: int = Field(6, gt=0)
        """Attention heads per block."""
        drop_path_rate: float = Field(0.1, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        if not specs.encoder.visible_only or not specs.masker.num_hidden:
            raise ValueError(
                "it stands in for hidden tokens; use an encoder that drops some and a masker that hides some"
            )
        dim = specs.encoder.dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = position_mlp(dim)
        self.blocks = make_blocks(dim, self.config)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, specs.target.dim)
        self.blocks.apply(partial(init_linear, init=nn.init.xavier_uniform_))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.spec = PredSpec("dense", specs.target.dim, specs.encoder.grid)

    def no_weight_decay(self) -> Iterable[str]:
        return ("mask_token",)

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """Points of the hidden groups (B, M, 3K), or of every group where the mask says what to predict."""
        mask_tokens = self.mask_token.expand(len(latent.tokens), mask.num_hidden, -1)
        x = torch.cat([latent.tokens, mask_tokens.to(latent.tokens.dtype)], dim=1)
        position = self.pos_embed(gather_tokens(latent.aux["centres"], mask.ids_shuffle))
        for block in self.blocks:
            x = block(x + position)
        ids = mask.ids_predict
        x = gather_tokens(x, mask.ids_restore) if ids is None else x[:, -ids.shape[1] :]
        return Pred(self.head(self.norm(x)), self.spec.grid, ids)


def init_linear(module: nn.Module, init: Any) -> None:
    """Weights by `init` and zero biases, where a module is a linear layer."""
    if isinstance(module, nn.Linear):
        init(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """a (..., n, 3), b (..., m, 3) -> (...): mean squared distance to the nearest point of the other set, both ways."""
    distance = (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
    return distance.amin(-1).mean(-1) + distance.amin(-2).mean(-1)


class ChamferLoss(Loss):
    """Squared Chamfer distance of predicted to real groups, mean over the groups to predict (official cdl2)."""

    name = "chamfer"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.last: tuple[Any, ...] | None = None
        """Of the latest batch's first cloud: centres, groups, which are hidden, which predicted, and the prediction."""

    def forward(self, pred: Pred, target: Tensor, mask: Mask, latent: Latent) -> Tensor:
        wanted = Pred(target, pred.grid).at(pred.ids)
        distance = chamfer(split_points(pred.values), split_points(wanted))
        weights = mask.where if pred.ids is None else mask.where.gather(1, pred.ids)
        ids = slice(None) if pred.ids is None else pred.ids[0]
        self.last = (latent.aux["centres"][0], target[0], mask.hidden[0], ids, pred.values[0].detach())
        return (distance * weights).sum() / weights.sum()

    def pictures(self) -> dict[str, Tensor]:
        """Silhouettes of one cloud, of its visible groups, and of these with the predicted ones."""
        if self.last is None:
            return {}
        centres, groups, hidden, ids, guess = self.last
        groups = split_points(groups) + centres[:, None]
        guess = split_points(guess) + centres[ids, None]
        clouds = [groups, groups[~hidden], torch.cat([groups[~hidden], guess])]
        return {"completion": torch.cat([silhouettes(each.flatten(0, 1)[None], 64)[0] for each in clouds], dim=2)}


def split_points(values: Tensor) -> Tensor:
    """values (..., 3K) -> points (..., K, 3) float32."""
    return values.float().unflatten(-1, (-1, 3))


@hookimpl
def mim_sources() -> list[type]:
    return [MeshShapes]


@hookimpl
def mim_views() -> list[type]:
    return [PointGroups]


@hookimpl
def mim_maskers() -> list[type]:
    return [BlockOfGroups]


@hookimpl
def mim_encoders() -> list[type]:
    return [PointEncoder]


@hookimpl
def mim_targets() -> list[type]:
    return [GroupTarget]


@hookimpl
def mim_decoders() -> list[type]:
    return [PointDecoder]


@hookimpl
def mim_losses() -> list[type]:
    return [ChamferLoss]
