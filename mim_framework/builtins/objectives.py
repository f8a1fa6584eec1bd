"""The order of a step over the five slots. `training/trainer.py` calls it; both are one whole step."""

from __future__ import annotations

from functools import reduce
from operator import or_

from torch import Tensor, nn

from mim_framework.base.section import Section
from mim_framework.contract.components import Objective, Parts
from mim_framework.contract.records import Ask, Latent, Masked, Measured, Outcome, Views
from mim_framework.contract.step import Step


class MaskedPrediction(Objective):
    """Mask, the targets of all heads, encode, then for every head: decode, loss. What most of the field does.

    Targets come first: what teachers need for them is free again before the encoder keeps its activations.
    """

    name = "masked_prediction"

    def __init__(self, config: Section, parts: Parts) -> None:
        super().__init__(config, parts)
        self.masker = parts.masker
        self.encoder = parts.encoder
        self.heads = nn.ModuleDict(parts.heads)
        self.ask = reduce(or_, (head.decoder.ask for head in parts.heads.values()), Ask())

    def forward(self, step: Step, views: Views) -> Outcome:
        masked = self.masker(step, views)
        targets = {name: head.target(step, masked) for name, head in self.heads.items()}
        latent = self.encode(masked)
        found = Outcome(self.losses_beside_heads(masked, latent), {}, {})
        for name, head in self.heads.items():
            self.add(found, name, head.measure(masked, latent, targets[name]), step.value(head.weight))
        return found

    def encode(self, masked: Masked) -> Latent:
        """What the heads see of masked views; an objective that refines the encoder's answer overrides this."""
        return self.encoder.encode(masked.views, masked.masks, self.ask)

    @staticmethod
    def add(outcome: Outcome, name: str, measured: Measured, weight: float = 1.0) -> None:
        """A head's loss with its weight, and what was measured beside it, into the outcome of a micro-batch."""
        outcome.losses[name] = weight * measured.loss
        outcome.metrics.update({f"heads.{name}.loss/{key}": value for key, value in measured.metrics.items()})
        if measured.count is not None:
            outcome.counts[name] = measured.count

    def losses_beside_heads(self, masked: Masked, latent: Latent) -> dict[str, Tensor]:
        """What masker and encoder have to minimise themselves.

        Raises:
            ValueError: if two of them, or one and a head, share a name.
        """
        own, names = latent.losses.keys(), self.heads.keys()
        if clash := (masked.losses.keys() | own) & names | masked.losses.keys() & own:
            sides = f"masker '{self.masker.name}', encoder '{self.encoder.name}'"
            raise ValueError(f"two losses are called '{min(clash)}': of {sides} or a head of the recipe")
        return {**masked.losses, **latent.losses}
