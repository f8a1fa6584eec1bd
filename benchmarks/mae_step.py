"""One whole training step of MAE (forward, backward, gradient norm, AdamW), ours beside the official implementation.

    python benchmarks/mae_step.py                                   # ours alone
    python benchmarks/mae_step.py --against ~/src/mae               # beside a checkout of facebookresearch/mae

Steps of all variants are interleaved, so that a busy machine disturbs all of them alike; medians are compared.
The official code is imported from the checkout as it stands. What it expects of the libraries of its time is supplied
in memory: `np.float`, and timm 0.3.2's block, whose attention uses no fused kernel.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.layers
import timm.models.vision_transformer as timm_vit
import torch
from mim_plugin_mae import MAEDecoder, MAEEncoder
from torch import Tensor, nn

from mim_framework.builtins.losses import MSELoss
from mim_framework.builtins.maskers import RandomMasker
from mim_framework.builtins.objectives import MaskedPrediction
from mim_framework.builtins.targets import PixelTarget
from mim_framework.contract.components import Head, Objective, Parts
from mim_framework.contract.specs import Specs, ViewSpec
from mim_framework.contract.step import Step
from mim_framework.contract.world import World
from mim_framework.runtime.optim import parameter_groups

MODELS = {
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
IMG_SIZE = 224
LossOf = Callable[[Tensor, int], Tensor]


def build_ours(options: dict[str, Any]) -> Objective:
    specs = Specs(views={"x": ViewSpec("x", size=(IMG_SIZE, IMG_SIZE))})
    encoder = MAEEncoder(MAEEncoder.Config(**options), specs)
    specs = specs.also(encoder=encoder.spec)
    masker = RandomMasker(RandomMasker.Config(mask_ratio=0.75), specs)
    specs = specs.also(masker=masker.spec)
    target = PixelTarget(PixelTarget.Config(norm_pix_loss=True), specs)
    decoder = MAEDecoder(MAEDecoder.Config(), specs.also(target=target.spec))
    head = Head(target, decoder, MSELoss(MSELoss.Config(), specs))
    return MaskedPrediction(MaskedPrediction.Config(), Parts(masker, encoder, {"main": head}, None, specs))


def ours(options: dict[str, Any], device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer, LossOf]:
    model = build_ours(options).to(device)
    groups = parameter_groups(model.named_parameters())
    for group in groups:
        group["weight_decay"] = 0.05 if group["decay"] else 0.0
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def loss(images: Tensor, index: int) -> Tensor:
        positions = torch.arange(len(images), device=device) + index * len(images)
        step = Step(index, total=1000, epoch=0.0, epochs=1.0, positions=positions, seed=0, world=World())
        return sum(model(step, {"x": images}).losses.values())

    return model, optimizer, loss


class OldAttention(timm.layers.Attention):
    """Attention in the steps of timm 0.3.2, which the official code requires: no fused kernel."""

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class OldBlock(timm_vit.Block):
    """A block that takes the argument `qk_scale`, which later versions dropped."""

    def __init__(self, *args: Any, qk_scale: None = None, **options: Any) -> None:
        super().__init__(*args, attn_layer=OldAttention, **options)


@contextmanager
def libraries_of_2021() -> Iterator[None]:
    """What the official code expects of numpy and timm, while it is imported and its model is built."""
    block, vars(np)["float"], timm_vit.Block = timm_vit.Block, float, OldBlock
    try:
        yield
    finally:
        timm_vit.Block = block
        del vars(np)["float"]


def official(
    checkout: Path, options: dict[str, Any], device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, LossOf]:
    sys.path.insert(0, str(checkout))
    try:
        with libraries_of_2021():
            import models_mae

            sizes = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16, "mlp_ratio": 4}
            norm_layer = partial(nn.LayerNorm, eps=1e-6)
            model = models_mae.MaskedAutoencoderViT(**options, **sizes, norm_layer=norm_layer, norm_pix_loss=True)
    finally:
        sys.path.remove(str(checkout))
    model.to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    return model, optimizer, lambda images, index: model(images, mask_ratio=0.75)[0]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="checkout of facebookresearch/mae to measure beside")
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7, help="measured steps per variant")
    parser.add_argument("--warmup", type=int, default=2, help="steps per variant before measuring")
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="CPU threads of torch; by default all")
    parser.add_argument("--compile", action="store_true", help="compile our transformer blocks")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    sides = {"ours": ours(MODELS[args.model], args.device)}
    if args.compile:
        for component in sides["ours"][0].components():
            for block in component.repeated_blocks():
                block.compile()
    if args.against:
        sides["official"] = official(args.against, MODELS[args.model], args.device)
    images = torch.randn(args.batch_size, 3, IMG_SIZE, IMG_SIZE, device=args.device)
    rates: dict[tuple[str, str], list[float]] = {(side, p): [] for p in args.precision for side in sides}
    for index in range(args.warmup + args.steps):
        for (side, precision), measured in rates.items():
            model, optimizer, loss_of = sides[side]
            synchronize(args.device)
            start = time.perf_counter()
            with torch.autocast(args.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = loss_of(images, index)
            loss.backward()
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(args.device)
            if index >= args.warmup:
                measured.append(args.batch_size / (time.perf_counter() - start))

    device = (
        torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    where = f"{args.device} ({device}), torch {torch.__version__}"
    print(f"MAE ViT-{args.model}, {IMG_SIZE} px, batch {args.batch_size}, {where}")
    medians = {variant: statistics.median(measured) for variant, measured in rates.items()}
    for (side, precision), median in medians.items():
        measured = rates[side, precision]
        print(f"{side:9} {precision:9} {median:8.2f} images/s   ({min(measured):.2f} to {max(measured):.2f})")
    if args.against:
        for precision in args.precision:
            ratio = medians["ours", precision] / medians["official", precision]
            print(f"{precision} against {precision}: {ratio:.2f} times")
        if len(args.precision) == 2:
            ratio = medians["ours", "bfloat16"] / medians["official", "float32"]
            print(f"our bfloat16 against their float32 (their only mode on a CPU): {ratio:.2f} times")


if __name__ == "__main__":
    main()
