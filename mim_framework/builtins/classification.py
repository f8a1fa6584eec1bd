"""Classification, as papers train it on a pre-trained encoder: its head and the order of a step. Start at `Classify`.

A protocol is a recipe: linear probing freezes the encoder, fine-tuning trains all of it, partial fine-tuning its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mim_framework.base.section import Section
from mim_framework.builtins.objectives import MaskedPrediction
from mim_framework.contract.components import Decoder, Encoder, Parts
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent, Pred, Views
from mim_framework.contract.specs import EncoderSpec, PredSpec, Specs
from mim_framework.contract.step import Step
from mim_framework.nn.blocks import NORM_EPS
from mim_framework.nn.init import FAR

HALF = ("norm2.", "mlp.", "gamma_2")
"""What of a block is its MLP half (He et al. 2021, section 4.2)."""
FOR_MASKS = ("mask_token",)
"""Last parts of names of parameters that only masked images need."""


class Classifier(Decoder):
    """One vector of an image, normalised or not, and a linear layer: the logits of its classes.

    It computes in float32, whatever the precision of the run. Statistics of its batch norm are those of a rank's
    micro-batch, as in official linear probes; the running ones, for evaluation, are averaged over ranks after a step.
    """

    name = "classifier"
    full_precision = True

    class Config(Section):
        pool: Literal["mean", "cls", "cls_mean"] = "mean"
        """The vector of an image: the mean of its patch tokens, the class token, or that one and the mean side by side
        (BEiT's linear probe)."""
        norm: Literal["encoder", "new", "none"] = "encoder"
        """`encoder` takes tokens as they leave the encoder, after its final norm. `new` takes the output of a block and
        gives the pooled vector a LayerNorm of its own, official `fc_norm`; `none` takes that output as it is."""
        layer: int | None = None
        """Whose output `new` and `none` take: a block, from 0, or from the end if negative; null is the last one."""
        batch_norm: bool = False
        """Batch norm without parameters of its own before the linear layer (MAE's linear probe, MoCo v3)."""
        init_std: float = Field(0.02, gt=0)
        """Standard deviation of the initial weights; biases are zero. BEiT's 0.02 times 0.001 is 2e-5 here."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c, encoder, target = self.config, specs.encoder, specs.target
        if target.grid != Grid(()):
            raise ValueError(f"decoder 'classifier' predicts whole images, the target lives on grid {target.grid}")
        if c.pool != "mean" and not encoder.num_prefix_tokens:
            raise ValueError(f"decoder 'classifier': pool={c.pool}, but the encoder has no class token; use pool=mean")
        self.layer, self.num_prefix_tokens, dim = block_read(c, encoder), encoder.num_prefix_tokens, encoder.dim
        if self.layer is not None:
            self.ask = Ask(layers=frozenset({self.layer}))
            dim = encoder.layers.get(self.layer, (dim,))[0]
        dim *= 2 if c.pool == "cls_mean" else 1
        self.fc_norm = nn.LayerNorm(dim, eps=NORM_EPS) if c.norm == "new" else nn.Identity()
        self.batch_norm = nn.BatchNorm1d(dim, eps=NORM_EPS, affine=False) if c.batch_norm else nn.Identity()
        self.head = nn.Linear(dim, target.dim)
        nn.init.trunc_normal_(self.head.weight, std=c.init_std, a=-FAR, b=FAR)
        nn.init.zeros_(self.head.bias)
        self.spec = PredSpec.for_target(target, Grid(()))

    def pooled(self, latent: Latent) -> Tensor:
        """(B, D) float32: the vector of an image that the linear layer, or the batch norm before it, sees."""
        prefix, tokens = latent.prefix, latent.tokens
        if self.layer is not None:
            sequence = latent.layers[self.layer]
            prefix, tokens = sequence[:, : self.num_prefix_tokens], sequence[:, self.num_prefix_tokens :]
        parts = [] if self.config.pool == "mean" else [prefix[:, 0].float()]
        parts += [] if self.config.pool == "cls" else [tokens.float().mean(1)]
        return self.fc_norm(torch.cat(parts, dim=1))

    def forward(self, latent: Latent, mask: Mask) -> Pred:
        """values (B, 1, num_classes)"""
        return Pred(self.head(self.batch_norm(self.pooled(latent))).unsqueeze(1), self.spec.grid)

    def after_step(self, step: Step) -> None:
        if isinstance(self.batch_norm, nn.BatchNorm1d):
            for statistic in (self.batch_norm.running_mean, self.batch_norm.running_var):
                statistic.copy_(step.world.mean(statistic))


class Classify(MaskedPrediction):
    """Images with nothing hidden, and a loss on the class of each: linear probing, fine-tuning, partial fine-tuning.

    `init` gives it the encoder; a classifier only from another run of the same classes.
    """

    name = "classify"
    starts_from_encoder = True

    class Config(Section):
        trained_blocks: float | None = Field(None, ge=0)
        """Train only so many of the encoder's last blocks, what follows them, and the heads; 0.5 is the MLP of the
        last block with its norm (He et al. 2021, section 4.2). null trains all. For linear probing see
        `train.frozen`."""

    config: Config

    def __init__(self, config: Section, parts: Parts) -> None:
        super().__init__(config, parts)
        if parts.masker.spec.num_hidden:
            raise ValueError(f"masker '{self.masker.name}' hides patches, images are classified whole: masker=none")
        names = [name for name, _ in self.encoder.named_parameters()]
        unused = {name for name in names if name.split(".")[-1] in FOR_MASKS}
        after = parameters_of_final_norm(self.encoder)
        layers = [getattr(head.decoder, "layer", None) for head in self.heads.values()]
        read = [layer for layer in layers if layer is not None]
        if len(read) == len(layers):  # no head sees the encoder's own output
            unused |= after | blocks_after(self.encoder, max(read))
        count = self.config.trained_blocks
        frozen = unused if count is None else unused | (set(names) - after - set(last_blocks(self.encoder, count)))
        self.freeze(f"encoder.{name}" for name in frozen)

    def logits(self, views: Views) -> Tensor:
        """(B, num_classes), or (B, num_heads, num_classes) of several heads in their order."""
        spec = self.encoder.spec
        masks = {name: Mask.none(len(views[name]), spec.of(name).grid, views[name].device) for name in spec.views}
        latent = self.encoder.encode(views, masks, self.ask)
        every = torch.cat([head.decoder(latent, masks[head.view]).values for head in self.heads.values()], dim=1)
        return every[:, 0] if len(self.heads) == 1 else every


def block_read(config: Classifier.Config, encoder: EncoderSpec) -> int | None:
    """The number, from 0, of the block whose output a classifier takes; None if it takes the encoder's.

    Raises:
        ValueError: if there is no such block, or its number has no effect.
    """
    layer, depth = config.layer, encoder.depth
    if config.norm == "encoder":
        if layer is None:
            return None
        raise ValueError(
            f"decoder 'classifier': layer={layer} has no effect with norm=encoder, which is the encoder's end; use "
            "norm=none or norm=new"
        )
    if layer is not None and not -depth <= layer < depth:
        raise ValueError(f"decoder 'classifier': layer={layer} is none of the encoder's {depth} blocks, from 0")
    return depth - 1 if layer is None else layer % depth


def blocks_after(encoder: Encoder, layer: int) -> set[str]:
    """Names of the parameters in the blocks after one, of an encoder that has a block for each of its layers."""
    blocks = list(encoder.repeated_blocks())
    return set(last_blocks(encoder, len(blocks) - 1 - layer)) if len(blocks) == encoder.spec.depth else set()


def last_blocks(encoder: Encoder, count: float) -> Iterator[str]:
    """Names of the parameters in so many of an encoder's last blocks; 0.5 is the MLP half of the last one.

    Raises:
        ValueError: if it has not so many, or the number is neither whole nor a half.
    """
    blocks = list(encoder.repeated_blocks())
    if count not in (0.5, *range(len(blocks) + 1)):
        raise ValueError(
            f"trained_blocks {count:g}: encoder '{encoder.name}' has {len(blocks)} blocks; give a whole number of them "
            "or 0.5"
        )
    paths = {id(module): path for path, module in encoder.named_modules()}
    half = count == 0.5
    for block in blocks[len(blocks) - 1 if half else len(blocks) - int(count) :]:
        inside = [name for name, _ in block.named_parameters() if not half or name.startswith(HALF)]
        if not inside:
            raise ValueError(f"trained_blocks 0.5: the blocks of encoder '{encoder.name}' have no 'mlp' and 'norm2'")
        yield from (f"{paths[id(block)]}.{name}" for name in inside)


def parameters_of_final_norm(encoder: Encoder) -> set[str]:
    """Names of the parameters that `Encoder.final_norm` uses: those that its result depends on."""
    named = [(name, parameter) for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    spec = encoder.spec
    with torch.enable_grad():
        device = named[0][1].device if named else None
        out = encoder.final_norm(torch.ones(1, spec.num_prefix_tokens + 1, spec.dim, device=device)).sum()
    if not out.requires_grad:
        return set()
    found = torch.autograd.grad(out, [parameter for _, parameter in named], allow_unused=True)
    return {name for (name, _), gradient in zip(named, found, strict=True) if gradient is not None}
