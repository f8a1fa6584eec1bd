"""The discrete VAE that turns images into visual tokens: stage one of BEiT (Ramesh et al. 2021, arXiv 2102.12092).

The network is that of openai/DALL-E, parameter by parameter. Start at `DalleEncoder`; a training step is its logits,
the relaxed codes of `DalleDecoder`, the pixels of `DVAEPixels` and the bound of `ELBOLoss`. A trained encoder is the
`tokenizer` of stage two. The layouts of official weights are in `dvae_checkpoints.py`.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, mse_loss

from mim_framework import (
    Ask,
    Decoder,
    Encoder,
    EncoderSpec,
    Grid,
    Latent,
    Loss,
    Mask,
    Masked,
    Measured,
    Pred,
    PredSpec,
    Renormalize,
    Schedule,
    Section,
    Specs,
    Step,
    Target,
    TargetSpec,
    ViewSpec,
    extremes,
    patchify,
    perplexity,
    unpatchify,
    usage_picture,
    value_at,
    without_autocast,
)

logger = logging.getLogger(__name__)

STRIDE = 8
"""Pixels per token: three times a factor of two."""
NUM_GROUPS = 4
LOGIT_LAPLACE_EPS = 0.1
"""Pixels of [0, 1] are squeezed into [eps, 1 - eps], where their logit is finite (`dall_e/utils.py`)."""
ENCODER_KERNELS = (3, 3, 3, 1)
DECODER_KERNELS = (1, 3, 3, 3)
NOISE_CHUNK = 2**24
"""Random numbers drawn at a time; their integers take eight times the memory of the result."""


def map_pixels(images: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9]."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Inverse of `map_pixels`, cut to [0, 1]."""
    return ((mapped - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


def logit_laplace_nll(mapped: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Negative log-likelihood of each value of `mapped`, in (0, 1), whose logit is Laplace-distributed; in nats."""
    distance = (mapped.logit() - means).abs()
    return distance * (-log_scales).exp() + log_scales + math.log(2) + (mapped * (1 - mapped)).log()


def gumbel_noise(step: Step, shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard Gumbel noise, of each sample the same on any rank and in any micro-batch."""
    count = math.prod(shape)
    noise = torch.empty(len(step.positions), count, device=step.positions.device)
    rows = max(1, NOISE_CHUNK // count)
    for start in range(0, len(noise), rows):
        part = replace(step, positions=step.positions[start : start + rows])
        noise[start : start + rows] = part.rand("gumbel", count)
    return noise.clamp_(min=2.0**-25).log_().neg_().log_().neg_().unflatten(1, tuple(shape))


def unit_range(view: ViewSpec) -> tuple[Renormalize, Renormalize]:
    """From a view to [0, 1] and back.

    Raises:
        ValueError: if the view does not tell its normalisation.
    """
    if view.mean is None or view.std is None:
        raise ValueError(
            f"view '{view.name}' does not tell its normalisation, a dVAE needs images of a known range; a view builder "
            "publishes it in ViewSpec, for images in [0, 1] as mean=(0, 0, 0), std=(1, 1, 1)"
        )
    mean, std = (0.0,) * view.in_chans, (1.0,) * view.in_chans
    return Renormalize(view, mean, std), Renormalize(replace(view, mean=mean, std=std), view.mean, view.std)


# --- the network -----------------------------------------------------------------------------------------------------


class Convolution(nn.Conv2d):
    """Convolution that keeps the size of the map; weights from N(0, 1 / (in_dim * kernel^2)), biases zero."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__(in_dim, out_dim, kernel_size, padding=kernel_size // 2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(self.in_channels * self.kernel_size[0] ** 2) ** -0.5)
        nn.init.zeros_(self.bias)


class Bottleneck(nn.Module):
    """Residual block: ReLU before each of four convolutions, the first three at a quarter of the width."""

    def __init__(self, in_dim: int, out_dim: int, kernel_sizes: Sequence[int], scale: float) -> None:
        super().__init__()
        self.scale = scale
        widths = (in_dim, *[out_dim // 4] * 3, out_dim)
        self.id_path = nn.Identity() if in_dim == out_dim else Convolution(in_dim, out_dim, 1)
        self.res_path = nn.Sequential()
        for i, kernel_size in enumerate(kernel_sizes):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU(inplace=i > 0))  # the first one's input is needed again
            self.res_path.add_module(f"conv_{i + 1}", Convolution(widths[i], widths[i + 1], kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, h, w) -> (B, out_dim, h, w); the residual stream keeps its precision under autocast."""
        return self.id_path(x).to(x.dtype).add(self.res_path(x), alpha=self.scale)


def build_groups(
    widths: Sequence[int], blocks_per_group: int, kernel_sizes: Sequence[int], resize: nn.Module
) -> dict[str, nn.Module]:
    """Four groups of blocks by their official names, `resize` after the first three. `widths` begins with the input's.

    Residual branches are scaled by one over the squared number of blocks.
    """
    scale = (NUM_GROUPS * blocks_per_group) ** -2
    groups: dict[str, nn.Module] = {}
    for number in range(1, NUM_GROUPS + 1):
        group = nn.Sequential()
        for block in range(blocks_per_group):
            in_dim = widths[number - 1] if block == 0 else widths[number]
            group.add_module(f"block_{block + 1}", Bottleneck(in_dim, widths[number], kernel_sizes, scale))
        if number < NUM_GROUPS:
            group.add_module("resize", resize)
        groups[f"group_{number}"] = group
    return groups


def blocks_of(groups: nn.Module) -> list[nn.Module]:
    return [module for module in groups.modules() if isinstance(module, Bottleneck)]


class DalleEncoder(Encoder):
    """DALL-E's dVAE encoder: logits over a vocabulary for every 8 x 8 pixels; `ids` are the likeliest.

    It takes a view of any normalisation. There are no normalisation layers and no dropout.
    """

    name = "dvae"

    class Config(Section):
        vocab_size: int = Field(8192, gt=1)
        """Number of codes."""
        hidden_dim: int = Field(256, gt=0, multiple_of=4)
        """Width of the first group of blocks; the others have 2, 4 and 8 times as much (officially `n_hid`)."""
        blocks_per_group: int = Field(2, gt=0)
        """Residual blocks of each of the four groups."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        height, width = view.height_width
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"image size {height}x{width} is not a multiple of {STRIDE}, the pixels of a token")
        self.to_unit, _ = unit_range(view)
        widths = [c.hidden_dim * factor for factor in (1, 1, 2, 4, 8)]
        groups = build_groups(widths, c.blocks_per_group, ENCODER_KERNELS, nn.MaxPool2d(2))
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Convolution(widths[-1], c.vocab_size, 1)))
        self.blocks = nn.Sequential(
            OrderedDict(input=Convolution(view.in_chans, c.hidden_dim, 7), **groups, output=output)
        )
        self.spec = EncoderSpec(
            dim=c.vocab_size,
            grid=Grid((height // STRIDE, width // STRIDE)),
            stride=STRIDE,
            depth=NUM_GROUPS * c.blocks_per_group,
            num_heads=1,
            in_chans=view.in_chans,
            accepts=frozenset({"none"}),
            offers=Ask(aux=frozenset({"ids"})),
            num_classes=c.vocab_size,
        )

    def repeated_blocks(self) -> list[nn.Module]:
        return blocks_of(self.blocks)

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W) -> tokens (B, N, vocab_size), float32 logits; aux `ids` (B, N)."""
        pixels = map_pixels(self.to_unit(view))
        x = self.blocks.input(pixels.contiguous(memory_format=torch.channels_last)).to(pixels.dtype)
        for number in range(1, NUM_GROUPS + 1):
            x = self.blocks.get_submodule(f"group_{number}")(x)
        conv = self.blocks.output.conv
        with without_autocast():  # official: the last convolution is not in float16
            features = self.blocks.output.relu(x).flatten(2).transpose(1, 2)
            logits = linear(features, conv.weight.flatten(1), conv.bias)
        aux = {"ids": logits.argmax(-1)} if "ids" in ask.aux else {}
        return Latent(logits, self.spec.grid, aux=aux)


@dataclass(frozen=True, eq=False)
class PixelDistribution(Pred):
    """A distribution of pixels: `values` (B, N, C) are the means of their logits, `log_scales` the logs of the scales.

    The values of a position are those of its patch, (row, column, channel).
    """

    log_scales: Tensor | None = None


@dataclass(frozen=True)
class PixelDistributionSpec(PredSpec):
    """Of a decoder that gives a `PixelDistribution`."""


class DalleDecoder(Decoder):
    """DALL-E's dVAE decoder. In training it sees relaxed one-hot codes (Gumbel-softmax), otherwise the likeliest code.

    Metric `temperature`: that of the relaxation at the last step.
    """

    name = "dvae_decoder"

    class Config(Section):
        hidden_dim: int = Field(256, gt=0, multiple_of=4)
        """Width of the last group of blocks; those before have 2, 4 and 8 times as much (officially `n_hid`)."""
        init_dim: int = Field(128, gt=0)
        """Width to which a code is embedded (officially `n_init`)."""
        blocks_per_group: int = Field(2, gt=0)
        """Residual blocks of each of the four groups."""
        temperature: Schedule = 1.0
        """Of the relaxation: near 0 a code is one-hot. OpenAI: from 1 to 1/16 along a cosine."""
        straight_through: bool = False
        """One-hot codes already in training, with the gradient of the relaxed ones."""

        @model_validator(mode="after")
        def _positive(self) -> DalleDecoder.Config:
            if min(extremes(self.temperature)) <= 0:
                raise ValueError(f"'temperature' must stay above 0, got {min(extremes(self.temperature)):g}")
            return self

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        encoder, c = specs.encoder, self.config
        if encoder.num_classes is None or encoder.num_classes != encoder.dim:
            has = "no vocabulary" if encoder.num_classes is None else f"a vocabulary of {encoder.num_classes}"
            raise ValueError(
                f"decoder '{self.name}' draws a code from logits over a vocabulary, this encoder has tokens of width "
                f"{encoder.dim} and {has}; use encoder '{DalleEncoder.name}'"
            )
        widths = [c.init_dim, *[c.hidden_dim * factor for factor in (8, 4, 2, 1)]]
        groups = build_groups(widths, c.blocks_per_group, DECODER_KERNELS, nn.Upsample(scale_factor=2, mode="nearest"))
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Convolution(c.hidden_dim, 2 * encoder.in_chans, 1)))
        self.blocks = nn.Sequential(
            OrderedDict(input=Convolution(encoder.num_classes, c.init_dim, 1), **groups, output=output)
        )
        self.temperature = value_at(c.temperature, 0.0, 1.0)
        self.step: Step | None = None
        self.spec = PixelDistributionSpec("dense", STRIDE**2 * encoder.in_chans, encoder.grid)

    def repeated_blocks(self) -> list[nn.Module]:
        return blocks_of(self.blocks)

    def begin_step(self, step: Step) -> None:
        self.step, self.temperature = step, step.value(self.config.temperature)

    def metrics(self) -> dict[str, Tensor]:
        return {"temperature": torch.tensor(self.temperature)}

    def forward(self, latent: Latent, mask: Mask) -> PixelDistribution:
        conv = self.blocks.input
        with without_autocast():
            if self.training:
                embedded = linear(self.relaxed_codes(latent.tokens), conv.weight.flatten(1), conv.bias)
            else:
                embedded = embedding(latent.tokens.argmax(-1), conv.weight.flatten(1).t()) + conv.bias
        return self.decode(embedded, latent.grid)

    def relaxed_codes(self, logits: Tensor) -> Tensor:
        """logits (B, N, V) -> (B, N, V), near one-hot, summing to one.

        Raises:
            ValueError: if `begin_step` has not been called with this batch, whose samples decide the noise.
        """
        if self.step is None or len(self.step.positions) != len(logits):
            raise ValueError(f"decoder '{self.name}' in training needs begin_step(step) before each micro-batch")
        noise = gumbel_noise(self.step, logits.shape[1:])
        soft = noise.add_(logits).div_(self.temperature).softmax(-1)
        if not self.config.straight_through:
            return soft
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard - soft.detach() + soft

    def decode(self, embedded: Tensor, grid: Grid) -> PixelDistribution:
        """embedded codes (B, N, init_dim) -> distribution of the pixels of each position."""
        x = embedded.transpose(1, 2).unflatten(2, grid.shape)
        for number in range(1, NUM_GROUPS + 1):
            x = self.blocks.get_submodule(f"group_{number}")(x)
        with without_autocast():
            means, log_scales = self.blocks.output(x).chunk(2, dim=1)
        return PixelDistribution(patchify(means, STRIDE), grid, log_scales=patchify(log_scales, STRIDE))


# --- what it learns --------------------------------------------------------------------------------------------------


class DVAEPixels(Target):
    """All pixels, squeezed into [0.1, 0.9]; a prediction is the logit of such a pixel."""

    name = "dvae_pixels"

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view = specs.view("x")
        self.to_unit, self.from_unit = unit_range(view)
        self.patch_size = specs.encoder.stride
        self.spec = TargetSpec("map", prod(self.patch_size) * view.in_chans, specs.encoder.grid)

    def forward(self, step: Step, masked: Masked) -> Pred:
        """Values (B, N, P*P*C), those of a patch (row, column, channel)."""
        return Pred(patchify(map_pixels(self.to_unit(masked.clean("x"))), self.patch_size), self.spec.grid)

    def reconstruct(self, pred: Pred, mask: Mask, view: Tensor) -> Tensor:
        """(B, C, H, W): the mean of every pixel; nothing of `view` is pasted, as a dVAE sees all of it."""
        mapped = unpatchify(pred.values.float().sigmoid(), self.patch_size, self.spec.grid)
        return self.from_unit(unmap_pixels(mapped))


class ELBOLoss(Loss):
    """Negative evidence lower bound of a dVAE, per pixel value: reconstruction + kl_weight * KL.

    The reconstruction is a mean over all H * W * C values of an image. The KL divergence of the encoder's distribution
    over codes from the uniform one, ln V minus its entropy, is a mean over positions, in nats. The bound of the paper
    has it summed over the positions of an image and divided by H * W * C like the rest, that is by 64 * C per position:
    its weight beta is a `kl_weight` of beta / 192 for three channels.

    Metrics: `reconstruction` and `kl` of the last micro-batch on this rank. Of all images since the line before:
    `usage`, the share of codes that were the likeliest somewhere; `token_perplexity`, the exponential of the entropy of
    these likeliest codes; `perplexity`, that of the mean distribution. Both are the vocabulary's size if all codes are
    used alike. Picture `usage`: how often each code was the likeliest, from the most to the least frequent; heights are
    logarithmic.
    """

    name = "dvae_elbo"
    accepts = frozenset({"map"})

    class Config(Section):
        likelihood: Literal["logit_laplace", "mse"] = "logit_laplace"
        """Of the reconstruction: logit-Laplace (DALL-E), or squared error between pixels in [0.1, 0.9]."""
        kl_weight: Schedule = 6.6 / 192
        """Factor of the KL divergence per position."""
        min_usage: float = Field(0.05, ge=0, le=1)
        """Warn once if a smaller share of the codes is used after a tenth of the run."""

        @model_validator(mode="after")
        def _not_negative(self) -> ELBOLoss.Config:
            if min(extremes(self.kl_weight)) < 0:
                raise ValueError(f"'kl_weight' must not be negative, got {min(extremes(self.kl_weight)):g}")
            return self

    counted_for_the_log = ("counts",)

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        if not isinstance(specs.pred, PixelDistributionSpec):
            raise ValueError(
                f"loss '{self.name}' needs the distribution of pixels that decoder '{DalleDecoder.name}' gives"
            )
        self.vocab_size = specs.encoder.dim
        self.kl_weight = value_at(self.config.kl_weight, 0.0, 1.0)
        self.warned = False
        self.last_counts: Tensor | None = None
        for name in ("step_counts", "counts"):  # rows: likeliest codes, probabilities; of this step and since a line
            self.register_buffer(name, torch.zeros(2, self.vocab_size), persistent=False)

    def begin_step(self, step: Step) -> None:
        self.kl_weight = step.value(self.config.kl_weight)

    def forward(self, pred: PixelDistribution, target: Pred, mask: Mask, latent: Latent) -> Measured:
        means, mapped = pred.values.float(), target.values.float()
        if self.config.likelihood == "logit_laplace":
            reconstruction = logit_laplace_nll(mapped, means, pred.log_scales.float()).mean()
        else:
            reconstruction = mse_loss(means.sigmoid(), mapped)
        log_probs = latent.tokens.float().log_softmax(-1)
        probs = log_probs.exp()
        kl = math.log(self.vocab_size) + (probs * log_probs).sum(-1).mean()
        self.observe(latent.tokens.detach(), probs.detach())
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        return Measured(reconstruction + self.kl_weight * kl, metrics, float(len(means)))

    def observe(self, logits: Tensor, probs: Tensor) -> None:
        """Count the codes of a micro-batch, both (B, N, V)."""
        ids = logits.argmax(-1).flatten()
        self.step_counts[0].index_add_(0, ids, torch.ones_like(ids, dtype=self.step_counts.dtype))
        self.step_counts[1] += probs.sum((0, 1))

    def before_step(self, step: Step) -> None:
        self.counts += step.world.sum(self.step_counts)
        self.step_counts.zero_()
        self.late, self.on_main = step.index >= 0.1 * step.total, step.world.is_main

    def metrics(self) -> dict[str, Tensor]:
        if not bool(self.counts.any()):
            return {}
        of_ids, of_probabilities = perplexity(self.counts)
        usage = (self.counts[0] > 0).float().mean()
        self.warn(usage.item())
        self.last_counts = self.counts.clone()
        self.counts.zero_()
        return {"usage": usage, "token_perplexity": of_ids, "perplexity": of_probabilities}

    def warn(self, usage: float) -> None:
        """Once, on rank 0, about a vocabulary that is hardly used, if so many positions have been seen."""
        enough = int(self.counts[0].sum()) >= self.vocab_size
        if usage < self.config.min_usage and enough and self.late and self.on_main and not self.warned:
            self.warned = True
            logger.warning(
                f"only {usage:.1%} of the {self.vocab_size} codes are in use (min_usage is {self.config.min_usage:g}). "
                "Tokens that hardly vary teach stage two little: use a larger kl_weight, a slower temperature, or a "
                "smaller vocab_size"
            )

    def pictures(self) -> dict[str, Tensor]:
        counts = self.counts if bool(self.counts.any()) else self.last_counts
        return {} if counts is None else {"usage": usage_picture(counts[0])}
