"""An objective of one's own, over two views (iBOT)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.harness import (
    GRID,
    NO_HEAD,
    SGD,
    assert_same_weights,
    in_training,
    lines_of,
    on_two_ranks,
    plugin,
    run,
    watch,
)
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax

from mim_framework.contract.components import Masker, Objective, ViewBuilder
from mim_framework.contract.hooks import hookimpl
from mim_framework.contract.records import Masked
from mim_framework.contract.specs import MaskerSpec
from mim_framework.data.views import ImageViews
from mim_framework.nn.masking import mask_from_noise
from mim_framework.runtime.sharding import local


@plugin
class TwoCrops(ViewBuilder):
    """Two crops of one image: `x` and `x2`."""

    name = "two_crops"
    num_random = 2 * ImageViews.num_random

    def __init__(self, config):
        super().__init__(config)
        self.crop = ImageViews(ImageViews.Config(img_size=16))
        self.specs = {name: replace(self.crop.specs["x"], name=name) for name in ("x", "x2")}

    def __call__(self, sample, rand):
        return {name: self.crop(sample, part)["x"] for name, part in zip(self.specs, rand.chunk(2), strict=True)}

    def prepare(self, step, batch):
        return {name: self.crop.prepare(step, {"x": images})["x"] for name, images in batch.items()}

    def evaluation_view(self, sample):
        return self.crop.evaluation_view(sample)

    def to_image(self, view):
        return self.crop.to_image(view)


@plugin
class TwoMasks(Masker):
    """A mask of its own for each of two views."""

    name = "two_masks"

    def __init__(self, config, specs):
        super().__init__(config, specs)
        self.spec = MaskerSpec(GRID, equal=True, num_hidden=5, views=tuple(specs.views))

    def forward(self, step, views):
        masks = {name: mask_from_noise(step.rand(f"mask {name}", 16), 11, GRID) for name in self.spec.views}
        return Masked(masks, views)


@plugin
class SelfDistillation(Objective):
    """Cross-entropy to a momentum teacher's centred outputs: per image across crops, per patch inside one."""

    name = "self_distillation"
    teacher_outputs: list[Tensor] = []

    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.masker, self.encoder = parts.masker, parts.encoder
        self.head = nn.Linear(parts.specs.encoder.dim, 6)
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("batch_sum", torch.zeros(7), persistent=False)  # outputs of this step, and their number

    def forward(self, step, views):
        masked = self.masker(step, views)
        head = step.teachers.part("ema", "head")
        students = {name: self.head(self.encoder(view, masked.masks[name]).tokens) for name, view in views.items()}
        teachers = {name: head(step.teacher("ema", view).tokens) for name, view in views.items()}
        probs = {name: softmax((output - self.centre) / 0.1, -1) for name, output in teachers.items()}
        for output in teachers.values():
            self.batch_sum[:6] += output.sum((0, 1))
            self.batch_sum[6] += len(output) * 16
            if in_training(step):
                self.teacher_outputs.append(output)
        patch = sum(self.cross_entropy(students[name], probs[name])[masked.masks[name].hidden].mean() for name in views)
        image = self.cross_entropy(students["x"].mean(1), probs["x2"].mean(1)).mean()
        return {"image": image, "patch": patch}

    def cross_entropy(self, logits, probs):
        return -(probs * log_softmax(logits / 0.2, -1)).sum(-1)

    def before_step(self, step):
        self.step_sum = self.batch_sum.clone()
        self.batch_sum.zero_()  # also if the step will be skipped

    def after_step(self, step):
        total = step.world.sum(self.step_sum)
        self.centre.lerp_(total[:6] / total[6], 0.1)


IBOT = {
    "views": "two_crops",
    "masker": "two_masks",
    "objective": "self_distillation",
    "teachers": {"ema": {"copy": ["encoder", "head"], "momentum": 0.9}},
    "optim": SGD,
    **NO_HEAD,
}


def test_two_views_are_pulled_to_a_teacher_whose_centre_is_that_of_its_outputs(tmp_path):
    SelfDistillation.teacher_outputs = []
    run_dir, centres = watch(tmp_path, lambda model: model.objective.centre.clone(), **IBOT)
    outputs = SelfDistillation.teacher_outputs
    assert [len(output) for output in outputs] == [4] * 6
    expected = torch.zeros(6)
    for index in range(3):
        expected = 0.9 * expected + 0.1 * torch.cat(outputs[2 * index : 2 * index + 2]).mean((0, 1))
        assert torch.allclose(centres[index + 1], expected, atol=1e-6)
    line = lines_of(run_dir)[-1]
    assert line["loss"] == pytest.approx(line["loss/image"] + line["loss/patch"])


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_centre_and_the_weights_are_the_same_on_two_ranks_as_on_one(tmp_path, mode):
    alone = run(tmp_path / "alone", **IBOT)
    see = lambda trainer: (trainer.objective.centre.clone(), [local(p).clone() for p in trainer.objective.parameters()])  # noqa: E731
    ranks, ((centre, weights), (other_centre, other_weights)) = on_two_ranks(
        tmp_path / "ranks", see, f"train.distributed={mode}", **IBOT
    )
    assert torch.equal(centre, other_centre)
    assert centre.abs().max() > 1e-3
    if mode == "ddp":
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert_same_weights(ranks, alone, atol=1e-6)


def test_a_resumed_objective_of_ones_own_goes_on_with_its_centre(tmp_path):
    class Crash:
        @hookimpl
        def mim_checkpoint_saved(self, run, path):
            raise KeyboardInterrupt

    straight = run(tmp_path / "straight", **IBOT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", "checkpoint.every_steps=2", hooks=Crash(), **IBOT)
    resumed = run(tmp_path / "resumed", **IBOT)
    assert_same_weights(straight, resumed)
    assert [line["loss"] for line in lines_of(straight)] == [line["loss"] for line in lines_of(resumed)]
