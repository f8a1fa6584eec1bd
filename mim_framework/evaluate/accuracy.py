"""How well the classifier that a run trains does on the images of evaluations. Start at `Accuracy`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mim_framework.contract.evaluation import Estimate, Evaluation, Subject


class Accuracy(Evaluation):
    """Of the classifier that a run trains, on one central crop of every test image: `top1`, `top5` and `loss`.

    Shares of the images, each counted once whatever the number of ranks, and the mean cross-entropy. Of several heads
    these are the numbers of the one with the highest `top1`, which is thus chosen on the test images; `best_head` is
    its place in the recipe, from 0, and `head0_top1` and so on are those of each.
    """

    name = "accuracy"
    needs = frozenset({"test"})
    of_pixels = False
    of_classifier = True

    @torch.no_grad()
    def __call__(self, subject: Subject) -> dict[str, float]:
        scores = subject.logits("test")
        if scores.x.ndim == 2:
            return of_one(scores.x, scores.y)
        each = [of_one(logits, scores.y) for logits in scores.x.unbind(1)]
        best = max(range(len(each)), key=lambda number: each[number]["top1"])
        top1 = {f"head{number}_top1": found["top1"] for number, found in enumerate(each)}
        return {**each[best], "best_head": float(best), **top1}


def of_one(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The numbers of one classifier: logits (n, num_classes), labels (n,)."""
    right = {k: int(hits(logits, labels, k).sum()) for k in (1, 5)}
    shares: dict[str, float] = {f"top{k}": Estimate.of_share(found, len(labels)) for k, found in right.items()}
    return {**shares, "loss": float(cross_entropy(logits.float(), labels))}


def hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """logits (n, num_classes), labels (n,) -> bool (n,): the label is among the k likeliest classes."""
    likeliest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (likeliest == labels[:, None]).any(1)
