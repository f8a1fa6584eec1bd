"""How well the classifier that a run trains does on the images of evaluations. Start at `Accuracy`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mim_framework.contract.evaluation import Estimate, Evaluation, Subject


class Accuracy(Evaluation):
    """Of the classifier that a run trains, on one central crop of every test image: `top1`, `top5` and `loss`.

    Shares of the images, each counted once whatever the number of ranks, and the mean cross-entropy.
    """

    name = "accuracy"
    needs = frozenset({"test"})
    of_pixels = False

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        scores = subject.logits("test")
        count = len(scores.y)
        right = {k: int(hits(scores.x, scores.y, k).sum()) for k in (1, 5)}
        loss = float(cross_entropy(scores.x.float(), scores.y))
        return {**{f"top{k}": Estimate.of_share(found, count) for k, found in right.items()}, "loss": loss}


def hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """logits (n, num_classes), labels (n,) -> bool (n,): the label is among the k likeliest classes."""
    likeliest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (likeliest == labels[:, None]).any(1)
