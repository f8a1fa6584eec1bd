"""Attentive probing: a pooling of frozen patch tokens that is learned with the classifier. Start at `Attentive`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mim_framework.base.errors import DataError
from mim_framework.base.schedule import Curve, value_at
from mim_framework.base.section import Section
from mim_framework.base.text import plain_logger
from mim_framework.contract.evaluation import Evaluation, Subject
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.labelled import Labelled, labelled_features, tenth_of, token_width, top_shares
from mim_framework.evaluate.sweep import batches
from mim_framework.nn.attention import check_heads
from mim_framework.nn.attentive import AttentiveHead, HeadName, attentive_head, check_queries
from mim_framework.runtime.lars import LARS

logger = plain_logger(__name__)


@dataclass(frozen=True)
class Protocol:
    """How a head is trained officially. `lr` is that of `batch_size` images a step.

    `lead`: steps by which rate and decay run ahead, 1 where the official loop sets them before a step (V-JEPA).
    """

    batch_size: int
    epochs: int
    lr: float
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_from: float = 0.0
    warmup_inclusive: bool = False
    weight_decay: float = 0.0
    final_weight_decay: float = 0.0
    clip_grad_norm: float | None = None
    lead: int = 0


def _lars(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return LARS(groups, lr=0.0)


def _nesterov(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0)


_EP = Protocol(batch_size=4096, epochs=90, lr=0.1 * 4096 / 256, optimizer=_lars, warmup_epochs=10)
PROTOCOLS: dict[HeadName, Protocol] = {
    "ep": _EP,
    "aim": _EP,  # as the benchmark of efficient probing trains it
    "cae": Protocol(
        batch_size=8192, epochs=90, lr=0.4, optimizer=_nesterov, min_lr=1e-6, warmup_epochs=10, warmup_inclusive=True,
    ),
    "vjepa": Protocol(
        batch_size=1024, epochs=20, lr=1e-3, optimizer=_adamw, weight_decay=1e-3, final_weight_decay=1e-6,
        clip_grad_norm=1.0, lead=1,
    ),
}  # fmt: skip


FACTORS = (1, 10, 100)
"""What the official rate is tried with, where the recipe gives no rates."""


class Attentive(Evaluation):
    """Accuracy `top1` and `top5` of a head that pools the frozen patch tokens by attention, without any augmentation.

    `lr` is the rate that was chosen, on train images.

    The heads and their optimizers, schedules and first weights are official; crops and flips are not, as tokens are
    extracted once. They are held on the device: of ViT-B at 224 pixels 0.6 MB an image, 3 GB for `max_train` images.
    """

    name = "attentive"
    of_pixels = False

    class Config(Section):
        head: HeadName = "ep"
        """`ep`: efficient probing, 32 queries over the tokens as they are; `cae`, `vjepa`, `aim`: the cross-attention
        of these papers. All see patch tokens only."""
        num_queries: int = Field(32, gt=0)
        """Learned queries of `ep`; the encoder's width must be a multiple."""
        num_heads: int | None = Field(None, gt=0)
        """Heads of the attention of the others; those of the encoder by default."""
        layers: tuple[int, ...] = ()
        """Blocks whose tokens stand side by side; by default the encoder's own output."""
        batch_size: int = Field(256, gt=1)
        """Images of a step; all of them if they are fewer."""
        epochs: int | None = Field(None, gt=0)
        """Passes over the train images; by default the official 90 (`ep`, `cae`, `aim`) or 20 (`vjepa`). The warm-up
        keeps its share of them."""
        lr: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] | None = None
        """Highest learning rates, each for a head of its own; of several, the head counts that is right most often on a
        tenth of the train images, which none learns from. By default the official rate, ten and a hundred times it: it
        is made for ImageNet, and far too low for the few steps of a small set. Official are 0.1 for 256 images a step
        (`ep`, `aim`), 0.4 for 8,192 (`cae`) and 0.001 for 1,024 (`vjepa`), in proportion to `batch_size`."""
        max_train: int = Field(5_000, gt=0)
        """Labelled images to learn from; of a larger set, a fixed random choice."""
        max_test: int = Field(5_000, gt=0)
        """Images that are classified; of a larger set, a fixed random choice."""

    config: Config

    def check(self, encoder: EncoderSpec) -> None:
        c = self.config
        width = token_width(encoder, c.layers)
        if c.head == "ep":
            check_queries(width, c.num_queries)
        else:
            check_heads(width, c.num_heads or encoder.num_heads)

    def __call__(self, subject: Subject) -> dict[str, float]:
        c = self.config
        data = labelled_features(subject, pool="tokens", layers=c.layers, max_train=c.max_train, max_test=c.max_test)
        rates = c.lr or tuple(factor * self._official_lr(len(data.train.y)) for factor in FACTORS)
        aside = tenth_of(data.train.y) if len(rates) > 1 else torch.zeros_like(data.train.y, dtype=torch.bool)
        heads = {lr: self._trained(data, ~aside, lr, subject.spec) for lr in dict.fromkeys(rates)}
        finite = {lr: head for lr, head in heads.items() if bool(head_scores(head, data.test.x[:1]).isfinite().all())}
        if not finite:
            tried = ", ".join(f"{lr:g}" for lr in rates)
            raise DataError(f"attentive: the heads diverged at lr {tried}; give lower ones")
        if len(finite) < len(heads) and subject.world.is_main:
            diverged = ", ".join(f"{lr:g}" for lr in heads if lr not in finite)
            logger.warning(f"attentive: heads diverged at lr {diverged}; they are left out of the choice")
        x, y = data.train.x[aside], data.train.y[aside]
        right = {lr: int((head_scores(head, x).argmax(1) == y).sum()) if len(y) else 0 for lr, head in finite.items()}
        lr = max(right, key=right.__getitem__)
        if lr == max(finite) == max(heads) and len(heads) > 1 and subject.world.is_main:
            logger.warning(
                f"attentive: the highest lr, {lr:g}, was the best; higher ones may be better: attentive.lr=[...]"
            )
        return {**top_shares(head_scores(finite[lr], data.test.x), data.test.y), "lr": lr}

    def _official_lr(self, num_images: int) -> float:
        protocol = PROTOCOLS[self.config.head]
        return protocol.lr * min(self.config.batch_size, num_images) / protocol.batch_size

    def _trained(self, data: Labelled, learn: Tensor, lr: float, spec: EncoderSpec) -> AttentiveHead:
        """A head that has learned from the rows `learn` (n,) of the train images."""
        c, protocol = self.config, PROTOCOLS[self.config.head]
        x, y = data.train.x, data.train.y
        rows_of = learn.nonzero()[:, 0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = attentive_head(
                c.head, x.shape[-1], data.num_classes, num_heads=c.num_heads or spec.num_heads,
                num_queries=c.num_queries,
            )  # fmt: skip
        batch_size = min(c.batch_size, len(rows_of))
        training = HeadTraining(
            head.to(x.device), protocol, lr=lr, epochs=c.epochs or protocol.epochs,
            steps_per_epoch=math.ceil(len(rows_of) / batch_size),
        )  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            generator = torch.Generator().manual_seed(0)
            for chosen in batches(len(rows_of), batch_size, training.total_steps, generator):
                rows = rows_of[chosen.to(x.device)]
                training.step(x[rows], y[rows])
        return head


class HeadTraining:
    """Steps of a head by an official protocol.

    Args:
        lr: highest rate.
        first_step: step of the schedule at which it begins.
    """

    def __init__(
        self, head: nn.Module, protocol: Protocol, *, lr: float, epochs: int, steps_per_epoch: int, first_step: int = 0
    ) -> None:
        self.head, self.protocol, self.epochs, self.steps_per_epoch = head, protocol, epochs, steps_per_epoch
        self.done, self.total_steps = first_step, epochs * steps_per_epoch
        warmup_epochs = protocol.warmup_epochs * epochs / protocol.epochs
        self.lr_curve = Curve(
            shape="cosine", start=lr, end=protocol.min_lr, warmup_epochs=warmup_epochs,
            warmup_from=protocol.warmup_from, warmup_inclusive=protocol.warmup_inclusive,
        )  # fmt: skip
        self.decay_curve = Curve(shape="cosine", start=protocol.weight_decay, end=protocol.final_weight_decay)
        parameters = list(head.named_parameters())
        decayed = [each for name, each in parameters if each.ndim > 1 and not name.endswith("bias")]
        plain = [each for name, each in parameters if each.ndim <= 1 or name.endswith("bias")]
        self.optimizer = protocol.optimizer([{"params": decayed, "decay": True}, {"params": plain, "decay": False}])

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on tokens x (B, N, D) and labels y (B,) -> the loss before it."""
        self.schedule()
        self.head.train()
        with torch.enable_grad():
            loss = cross_entropy(self.head(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        if self.protocol.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.head.parameters(), self.protocol.clip_grad_norm)
        self.optimizer.step()
        self.done += 1
        return loss.detach()

    def schedule(self) -> tuple[float, float]:
        """Set the rate and the decay of the next step -> both."""
        epoch = (self.done + self.protocol.lead) / self.steps_per_epoch
        lr = value_at(self.lr_curve, epoch, self.epochs, self.steps_per_epoch)
        decay = value_at(self.decay_curve, epoch, self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decay"] else 0.0
        return lr, decay


@torch.no_grad()
def head_scores(head: AttentiveHead, x: Tensor) -> Tensor:
    """x (m, N, D) -> scores (m, C), batch norms with their running statistics."""
    head.eval()
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([head(part) for part in x.split(256)])
