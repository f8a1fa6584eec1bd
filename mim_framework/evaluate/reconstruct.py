"""What a model makes of hidden patches, as rows of pictures."""

from __future__ import annotations

from torch import Tensor

from mim_framework.contract.components import Objective, Target, ViewBuilder
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Pred
from mim_framework.contract.step import Step
from mim_framework.evaluate.base import evaluation_mode
from mim_framework.evaluate.pictures import flat, mask_image

Row = tuple[Tensor, Tensor, Tensor]
"""Input, masked and reconstructed image, each (C, H, W) in [0, 1] on the CPU."""


def reconstruct(objective: Objective, views: ViewBuilder, step: Step, batch: dict[str, Tensor]) -> list[Row] | None:
    """What the first head with a picture makes of a batch; None if there is none, or no one mask of each image.

    Args:
        step: gives the masks; `step.positions` has one entry per image.
        batch: evaluation views before `prepare`, on the device.
    """
    if objective.masker is None or not set(objective.masker.spec.views) <= batch.keys():
        return None  # the evaluation view is "x" alone
    with evaluation_mode(objective):
        masked = objective.masker(step, views.prepare(step, batch))
        if any(len(mask.where) != len(masked.clean(name)) for name, mask in masked.masks.items()):
            return None  # several masks of an image, or several sets of positions to predict
        latent = objective.encode(masked)
        if latent is None:
            return None
        for head in objective.heads.values():
            if head.view != "x":
                continue  # `to_image` knows no other
            mask, clean = masked.masks["x"], masked.clean("x")
            pred = head.decoder(latent.of("x"), mask)
            picture = _picture(head.target, pred, mask, clean, views) if isinstance(pred, Pred) else None
            if picture is not None:
                break
        else:
            return None
        images, reconstructed = views.to_image(clean.float()).cpu(), picture.cpu()
    factor = reconstructed.shape[-1] // images.shape[-1]  # of a drawing
    images = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    hidden = mask.hidden.cpu()
    return [
        (flat(image), flat(mask_image(image, row, mask.grid)), flat(result))
        for image, row, result in zip(images, hidden, reconstructed, strict=True)
    ]


def _picture(target: Target, pred: Pred, mask: Mask, clean: Tensor, views: ViewBuilder) -> Tensor | None:
    """What a prediction looks like, in [0, 1], if it is an image or can be drawn."""
    image = target.reconstruct(pred, mask, clean)
    return target.draw(pred, mask, clean) if image is None else views.to_image(image.float())
