"""MixMIM, also called MixMAE (Liu et al. 2022, arXiv 2205.13137): hidden patches are filled from another image.

Start at `MixMasker.forward`, `MixEncoder.forward` and `MixDecoder.forward`: a step is those three with the core's
`pixels` target and `mse` loss. The layouts of official checkpoints are in `checkpoints.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn

from mim_framework import (
    Ask,
    Decoder,
    Encoder,
    EncoderSpec,
    Grid,
    Latent,
    Mask,
    Masked,
    Masker,
    MaskerSpec,
    Pred,
    PredSpec,
    RecipeError,
    Section,
    Specs,
    Step,
    Views,
    ViewSpec,
    attend,
    hookimpl,
    sincos_position_table,
)
from mim_plugin_mixmim.checkpoints import (
    MMPretrainCheckpoint,
    OfficialCheckpoint,
    SafetensorsCheckpoint,
    encoder_options,
    img_size_of,
)

PER_STAGE = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]


# --- masker ----------------------------------------------------------------------------------------------------------


class MixMasker(Masker):
    """Two images exchange the cells of one random mask: what either hides, the other one's row shows.

    The partner of the image at the run's position 2k is the one at 2k + 1, however a step is divided among ranks and
    micro-batches. Mixing pixels is exactly mixing tokens, as every token lies inside one cell.
    """

    name = "mixmim"

    class Config(Section):
        mask_ratio: float = Field(0.5, gt=0, lt=1)
        """Share of the cells that an image takes from its partner, rounded down."""
        mask_patch_size: int | None = Field(None, gt=0)
        """Side of a cell in pixels; the encoder's output stride by default."""
        scope: Literal["batch", "pair"] = "batch"
        """One mask for all images of an optimizer step, as officially, or one for every pair."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        height, width = specs.view("x").img_size
        self.cell = self.config.mask_patch_size or specs.encoder.stride
        if height % self.cell or width % self.cell:
            raise ValueError(f"image size {height}x{width} is not a multiple of mask_patch_size {self.cell}")
        grid = Grid((height // self.cell, width // self.cell))
        self.num_hidden = int(grid.num_patches * self.config.mask_ratio)
        if not self.num_hidden:
            ratio, count = self.config.mask_ratio, grid.num_patches
            raise ValueError(f"mask_ratio {ratio} hides none of the {count} cells of {self.cell} pixels")
        self.spec = MaskerSpec(
            grid,
            equal=True,
            shared=self.config.scope == "batch",
            num_hidden=self.num_hidden,
            rewrites=("x",),
            mixes=True,
        )

    def forward(self, step: Step, views: Views) -> Masked:
        images, grid = views["x"], self.spec.grid
        if self.training and len(images) % 2:
            raise RecipeError(
                f"masker 'mixmim' mixes images in pairs, a micro-batch of {len(images)} leaves one alone; "
                "use an even train.batch_size"
            )
        partner = partner_rows(step.positions)
        hidden = hide_smallest(self.noise(step), self.num_hidden).expand(len(images), -1)
        mask = Mask(
            hidden,
            grid,
            predict=torch.ones_like(hidden),  # the two rows of a pair together show every position of both images
            equal=True,
            shared=self.spec.shared,
            num_hidden=self.num_hidden,
            partner=partner,
        )
        pixels = hidden.unflatten(1, grid.shape).repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2)
        mixed = torch.where(pixels[:, None], images[partner], images)
        return Masked({"x": mask}, views | {"x": mixed}, originals={"x": images})

    def noise(self, step: Step) -> Tensor:
        """(1 or B, N): one draw for the step, or in both rows of a pair that of its first image."""
        count = self.spec.grid.num_patches
        if self.spec.shared:
            return step.rand_shared("mask", count)
        return replace(step, positions=step.positions - step.positions % 2).rand("mask", count)


def partner_rows(positions: Tensor) -> Tensor:
    """positions (B,) of the run -> the row of each one's partner (B,); its own row if the partner is not next to it."""
    rows = torch.arange(len(positions), device=positions.device)
    neighbour = (rows + 1 - 2 * (positions % 2)).clamp(0, len(positions) - 1)
    return torch.where(positions[neighbour] == positions ^ 1, neighbour, rows)


def hide_smallest(noise: Tensor, num_hidden: int) -> Tensor:
    """noise (B, N) -> bool (B, N): the smallest are hidden, unlike MAE's, which are kept (models_mixmim.py)."""
    order = noise.argsort(dim=1, stable=True)
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(1, order[:, :num_hidden], True)


# --- blocks ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention inside windows, with learned biases by relative position if `window` is given."""

    def __init__(self, dim: int, num_heads: int, window: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        """x (B, W, T, D), W windows of T tokens -> (B, W, T, D), before the output projection.

        apart (1 or B, W, 1, T, T) bool: tokens that must not see one another.
        """
        num_windows = x.shape[1]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        mixed = attend(*qkv, self.bias(num_windows, apart))  # windows stand beside heads, so that images share biases
        return mixed.unflatten(1, (num_windows, self.num_heads)).transpose(2, 3).flatten(3)

    def bias(self, num_windows: int, apart: Tensor | None) -> Tensor | None:
        """(1 or B, W * heads, T, T): what is added to the logits."""
        if self.window is None:
            return None
        bias = relative_position_bias(self.relative_position_bias_table, self.window)
        if apart is None:
            return bias.expand(num_windows, -1, -1, -1).flatten(0, 1)[None]
        return bias.masked_fill(apart, -torch.inf).flatten(1, 2)


def relative_position_bias(table: Tensor, window: int) -> Tensor:
    """table ((2w - 1)^2, heads) -> (heads, w^2, w^2), the same as Swin's `table[relative_position_index]`.

    For query (y, x) and key (y', x') it reads place (y + w - 1 - y', x + w - 1 - x') of the table. Overlapping views
    with the key reversed say so without an index, whose gradient would take longer.
    """
    places = table.t().unflatten(1, (2 * window - 1, 2 * window - 1))
    pairs = places.unfold(1, window, 1).unfold(2, window, 1).flip(3, 4)
    return pairs.flatten(3, 4).flatten(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block on windows; LayerNorm with torch's eps of 1e-5, unlike MAE's."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        window: int | None = None,
        *,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        """x (B, W, T, D) -> the same shape; `apart` as in `Attention`."""
        return self.finish(x, self.attn(self.norm1(x), apart))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn.proj(mixed))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class JoiningBlock(Block):
    """The last block of the decoder: of two branches it finishes, at every position, the one that is wanted there."""

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (2B, 1, T, D), hidden (B, 1, T, 1) -> (B, 1, T, D): the first half where hidden, else the second."""
        mixed = self.attn(self.norm1(x))
        return self.finish(*(torch.where(hidden, *each.chunk(2)) for each in (x, mixed)))


class PatchMerging(nn.Module):
    """Half the grid, twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, cells: Tensor) -> Tensor:
        """cells (..., 4 D) of `merge_places` -> (..., 2 D)."""
        return self.reduction(self.norm(cells)).to(cells.dtype)  # under autocast the residual stream stays float32


def merge_places(x: Tensor, grid: Grid) -> Tensor:
    """x (B, N, D) on `grid` -> (B, N / 4, 4 D): the places of a cell in the order (0, 0), (1, 0), (0, 1), (1, 1)."""
    rows, columns = grid.shape
    cells = x.unflatten(1, (rows // 2, 2, columns // 2, 2)).permute(0, 1, 3, 4, 2, 5)
    return cells.flatten(3).flatten(1, 2)


class Stage(nn.Module):
    """Blocks on one grid. All have the same windows, never shifted, so tokens are put in window order only once."""

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_heads: int,
        window: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        *,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.grid, self.window = grid, window
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, window, drop_path=rate) for rate in drop_path)
        self.downsample = PatchMerging(dim) if downsample else None

    def to_windows(self, x: Tensor) -> Tensor:
        """x (B, N, D) in raster order -> (B, W, T, D)."""
        (rows, columns), w = self.grid.shape, self.window
        return x.unflatten(1, (rows // w, w, columns // w, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def from_windows(self, x: Tensor) -> Tensor:
        """The inverse."""
        (rows, columns), w = self.grid.shape, self.window
        x = x.unflatten(2, (w, w)).unflatten(1, (rows // w, columns // w))
        return x.transpose(2, 3).flatten(1, 4)

    def apart(self, mask: Mask) -> Tensor:
        """(1 or B, W, 1, T, T) bool: pairs of tokens in a window that come from two images."""
        hidden = mask.at(self.grid).hidden
        hidden = self.to_windows((hidden[:1] if mask.shared else hidden)[..., None])
        return (hidden != hidden.mT)[:, :, None]


# --- encoder ---------------------------------------------------------------------------------------------------------


class MixEncoder(Encoder):
    """Swin without shifts, with large windows and fixed positions, whose tokens see those of their own image only."""

    name = "mixmim_swin"

    class Config(Section):
        patch_size: int = Field(4, gt=0)
        """Side of a patch in pixels at the input; every stage but the first halves the grid."""
        embed_dim: int = Field(128, gt=0)
        """Width of the first stage, a multiple of 4; it doubles with every stage."""
        depths: PER_STAGE = (2, 2, 18, 2)
        """Blocks of each stage."""
        num_heads: PER_STAGE = (4, 8, 16, 32)
        """Attention heads of each stage."""
        window_size: PER_STAGE = (14, 14, 14, 7)
        """Side of the attention windows of each stage in tokens; a smaller grid is one window."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs, as a multiple of the width."""
        drop_path_rate: float = Field(0.0, ge=0, lt=1)
        """Stochastic depth of the last block, growing linearly from 0 at the first; MixMIM pre-trains without."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        num_stages = len(c.depths)
        for name, values in (("num_heads", c.num_heads), ("window_size", c.window_size)):
            if len(values) != num_stages:
                raise ValueError(f"depths {list(c.depths)} and {name} {list(values)} need as many stages")
        stride = c.patch_size * 2 ** (num_stages - 1)
        height, width = view.img_size
        if height % stride or width % stride:
            raise ValueError(f"image size {height}x{width} is not a multiple of {stride}, the stride of the last stage")

        self.patch_embed = PatchEmbed(
            view.img_size, c.patch_size, view.in_chans, c.embed_dim, norm_layer=nn.LayerNorm
        )  # eps 1e-5
        grids = [Grid((height // c.patch_size >> stage, width // c.patch_size >> stage)) for stage in range(num_stages)]
        self.register_buffer("absolute_pos_embed", sincos_position_table(c.embed_dim, grids[0])[None])
        depth = sum(c.depths)
        rates = [c.drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList()
        for stage, (grid, num_heads) in enumerate(zip(grids, c.num_heads, strict=True)):
            dim, window = c.embed_dim * 2**stage, min(c.window_size[stage], *grid.shape)
            if dim % num_heads:
                raise ValueError(f"width {dim} of stage {stage} is not a multiple of {num_heads} heads")
            if any(side % window for side in grid.shape):
                raise ValueError(
                    f"window_size {window} of stage {stage} does not divide its grid of {grid} tokens; "
                    "use one that does, or another image size"
                )
            own_rates = [rates.pop(0) for _ in range(c.depths[stage])]
            last = stage == num_stages - 1
            self.layers.append(Stage(dim, grid, num_heads, window, c.mlp_ratio, own_rates, downsample=not last))
        self.norm = nn.LayerNorm(dim)
        self.apply(init_weights)

        sizes = [(c.embed_dim * 2**stage, grids[stage]) for stage in range(num_stages) for _ in range(c.depths[stage])]
        self.spec = EncoderSpec(
            dim=dim,
            grid=grids[-1],
            stride=stride,
            depth=depth,
            num_heads=c.num_heads[-1],
            in_chans=view.in_chans,
            accepts=frozenset({"mixed", "none"}),
            offers=Ask(layers=frozenset(range(depth))),
            layers=dict(enumerate(sizes)),
        )

    def repeated_blocks(self) -> list[nn.Module]:
        return [block for stage in self.layers for block in stage.blocks]

    def layer_of(self, name: str) -> int:
        """Nothing is in the last layer (official, util/lr_decay.py).

        A merging layer goes with the first block after it, and the last norm with the last block.
        """
        if merging := re.match(r"layers\.(\d+)\.downsample\.", name):
            return sum(self.config.depths[: int(merging[1]) + 1]) + 1
        return min(super().layer_of(name), self.num_layers - 2)

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W), mixed already if the mask says so -> tokens (B, N, D) on the grid of the last stage."""
        mask = mask.at(self.spec.grid)
        mixed = mask.num_hidden != 0
        if mixed and mask.partner is None:
            raise ValueError("encoder 'mixmim_swin' takes mixed images only, this mask has no partners")
        first, *following = self.layers
        # No block sees a mere view of another tensor: `torch.compile` would compile it once more for that.
        x = first.to_windows(self.patch_embed(view)) + first.to_windows(self.absolute_pos_embed)
        layers: dict[int, Tensor] = {}
        number = 0
        for stage, following_stage in zip(self.layers, [*following, None], strict=True):
            apart = stage.apart(mask) if mixed else None
            for block in stage.blocks:
                x = block(x, apart)
                if number in ask.layers:
                    layers[number] = stage.from_windows(x)
                number += 1
            if following_stage is not None:
                cells = merge_places(stage.from_windows(x), stage.grid)
                x = stage.downsample(following_stage.to_windows(cells))
        return Latent(self.final_norm(stage.from_windows(x)), self.spec.grid, layers=layers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)


def load_encoder(path: Path, drop_path_rate: float = 0.0) -> MixEncoder:
    """The encoder in a safetensors file of `mim export --to safetensors`, rebuilt from the shapes of its tensors.

    Raises:
        ValueError: naming tensors that are missing or left over.
    """
    state = load_file(path)
    side, chans = img_size_of(state), state["patch_embed.proj.weight"].shape[1]
    config = MixEncoder.Config(**encoder_options(state), drop_path_rate=drop_path_rate)
    encoder = MixEncoder(config, Specs(views={"x": ViewSpec("x", (chans, side, side))}))
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} holds no MixMIM encoder: missing {missing}, unexpected {unexpected}")
    return encoder


# --- decoder ---------------------------------------------------------------------------------------------------------


class MixDecoder(Decoder):
    """Light transformer that reconstructs both images of a mixture, each from its own tokens and mask tokens.

    The tokens of an image lie in two rows: those that its own row shows, and those that ride in its partner's. Each
    share alone predicts the positions of the other, so that every position is predicted exactly once, unseen.
    """

    name = "mixmim_decoder"
    unmixes = True

    class Config(Section):
        embed_dim: int = Field(512, gt=0)
        """Width of the decoder, independent of the encoder's; a multiple of 4 and of `num_heads`."""
        depth: int = Field(8, gt=0)
        """Number of transformer blocks."""
        num_heads: int = Field(16, gt=0)
        """Attention heads per block."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs, as a multiple of `embed_dim`."""
        norm_eps: float = Field(1e-5, gt=0)
        """Term under the root of every LayerNorm; mmpretrain has 1e-6."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        encoder, target, c = specs.encoder, specs.target, self.config
        if encoder.visible_only:
            raise ValueError("decoder 'mixmim_decoder' needs an encoder with a token at every position")
        if target.grid != encoder.grid:
            raise ValueError(
                f"decoder 'mixmim_decoder': the target's grid {target.grid} is not the encoder's {encoder.grid}"
            )
        if c.embed_dim % c.num_heads:
            raise ValueError(f"embed_dim {c.embed_dim} is not a multiple of num_heads {c.num_heads}")
        self.decoder_embed = nn.Linear(encoder.dim, c.embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        self.register_buffer("decoder_pos_embed", sincos_position_table(c.embed_dim, encoder.grid)[None])
        kinds = [Block] * (c.depth - 1) + [JoiningBlock]
        self.decoder_blocks = nn.ModuleList(
            kind(c.embed_dim, c.num_heads, c.mlp_ratio, norm_eps=c.norm_eps) for kind in kinds
        )
        self.decoder_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.decoder_pred = nn.Linear(c.embed_dim, target.dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.spec = PredSpec("probs" if target.kind in ("ids", "probs") else "dense", target.dim, encoder.grid)

    def repeated_blocks(self) -> nn.ModuleList:
        return self.decoder_blocks

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """Predictions of every image at every position (B, N, C)."""
        mask = mask.at(self.spec.grid)
        hidden = mask.hidden[..., None]
        x = self.decoder_embed(latent.tokens)
        shown = torch.where(hidden, self.mask_token, x)
        riding = torch.where(hidden, x[mask.partner], self.mask_token)  # partners hide the same positions
        x = torch.cat([shown, riding])[:, None] + self.decoder_pos_embed
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        x = last(x, hidden[:, None])[:, 0]
        return Pred(self.decoder_pred(self.decoder_norm(x)), self.spec.grid)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform for every linear layer; the patch embedding keeps torch's default, unlike MAE's."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@hookimpl
def mim_maskers():
    return [MixMasker]


@hookimpl
def mim_encoders():
    return [MixEncoder]


@hookimpl
def mim_decoders():
    return [MixDecoder]


@hookimpl
def mim_checkpoint_formats():
    return [OfficialCheckpoint, SafetensorsCheckpoint, MMPretrainCheckpoint]
