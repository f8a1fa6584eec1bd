"""The encoder of MixMIM, which takes mixed images. Start at `MixEncoder.forward`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from torch import Tensor, nn

from mim_framework import Ask, Encoder, EncoderSpec, Grid, Latent, Mask, Section, Specs, ViewSpec
from mim_framework.nn import drop_path_ramp, sincos_position_table, xavier_if_linear
from mim_plugin_mixmim.blocks import Stage, merge_places
from mim_plugin_mixmim.checkpoints import encoder_options, img_size_of

PER_STAGE = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]


class MixEncoder(Encoder):
    """Swin without shifts, with large windows and fixed positions, whose tokens see those of their own image only."""

    name = "mixmim_swin"
    bias_tables = "bicubic"  # util/pos_embed.py

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
        height, width = view.height_width
        if height % stride or width % stride:
            raise ValueError(f"image size {height}x{width} is not a multiple of {stride}, the stride of the last stage")

        self.patch_embed = PatchEmbed(
            view.img_size, c.patch_size, view.in_chans, c.embed_dim, norm_layer=nn.LayerNorm
        )  # eps 1e-5
        grids = [Grid((height // c.patch_size >> stage, width // c.patch_size >> stage)) for stage in range(num_stages)]
        self.register_buffer("absolute_pos_embed", sincos_position_table(c.embed_dim, grids[0])[None])
        depth = sum(c.depths)
        rates = drop_path_ramp(c.drop_path_rate, depth)
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
        self.apply(xavier_if_linear)  # the patch embedding keeps torch's default, unlike MAE's

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
    encoder = MixEncoder(config, Specs(views={"x": ViewSpec("x", size=(side, side), in_chans=chans)}))
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} holds no MixMIM encoder: missing {missing}, unexpected {unexpected}")
    return encoder
