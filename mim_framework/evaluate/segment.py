"""Segmentation from frozen patch tokens, linear and by neighbours, on images with mask files. Start at `Segment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image as pil
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, linear, one_hot

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage, DataError
from mim_framework.base.section import LocalPath, Section
from mim_framework.contract.components import Source, ViewBuilder
from mim_framework.contract.evaluation import Estimate, Evaluation, Split, Subject
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.base import EncoderSubject
from mim_framework.evaluate.geometry import Geometry
from mim_framework.evaluate.knn import nearest
from mim_framework.evaluate.labelled import token_width
from mim_framework.evaluate.splits import Splits
from mim_framework.evaluate.sweep import batches, half_cosine

RESAMPLED = 1000
"""So many times are images drawn anew for an interval."""
TESTED_OF = 5
"""Without test images, one of so many is a test image."""


class Segment(Evaluation):
    """How well the patch tokens tell what each pixel shows: the mean over classes of intersection over union.

    `linear_miou`: a linear classifier of single tokens; `knn_miou`: tokens of the nearest patches vote. Scores of
    patches are interpolated to pixels of the evaluation view. With an interval that follows from drawing images anew.

    A mask is a PNG file with one class id per pixel, grey or with a palette, as large as its image; it has the name of
    the image with the suffix .png: of `cats/3.jpg`, `cats/3.png`. Images without a mask are left out and counted.
    Without a split of test images, every fifth image is one. Tokens are held on the device: of ViT-B at 224 pixels
    0.6 MB an image.
    """

    name = "segment"
    needs = frozenset()
    of_pixels = False

    class Config(Section):
        masks: LocalPath = Field(min_length=1)
        """Folder of the masks, arranged as the images are below their root."""
        eval_masks: LocalPath | None = Field(None, min_length=1)
        """Folder of the masks of test images; by default `masks`."""
        ignore_index: int = Field(255, ge=0, le=255)
        """Pixels with this id are of no class, and neither learned from nor counted."""
        by: Annotated[tuple[Literal["linear", "knn"], ...], Field(min_length=1)] = ("linear", "knn")
        """What classifies tokens."""
        steps: int = Field(1000, gt=0)
        """Steps of the linear classifier by AdamW on standardised tokens, 4,096 patches each; its rate of 0.001 falls
        to 0 as half a cosine."""
        k: int = Field(30, gt=0)
        """Neighbours that vote."""
        temperature: float = Field(0.07, ge=0.0125)
        """A neighbour votes with the weight exp(cosine similarity / temperature), a float32 down to 0.0125."""
        max_patches: int = Field(50_000, gt=0)
        """Patches that can be neighbours; of more, a fixed random choice."""
        layers: tuple[int, ...] = ()
        """Blocks whose tokens stand side by side; by default the encoder's own output."""
        max_train: int = Field(500, gt=0)
        """Images to learn from; of a larger set, a fixed random choice."""
        max_test: int = Field(500, gt=0)
        """Images to be judged by; of a larger set, a fixed random choice."""

    config: Config

    def check(self, encoder: EncoderSpec) -> None:
        token_width(encoder, self.config.layers)
        if encoder.views != ("x",) or len(encoder.grid.shape) != 2:
            raise ValueError("masks are of images; the encoder sees clips, or several views")

    def __call__(self, subject: Subject) -> dict[str, float]:
        c = self.config
        train, test = self._patches(subject)
        num_classes = 1 + max(int(each.masks[each.masks != c.ignore_index].max()) for each in (train, test))
        shares, known = soft_labels(train.masks, train.grid, num_classes, c.ignore_index)
        if int((shares.sum(0) > 0).sum()) < 2:
            raise DataError(f"segment: the masks below '{c.masks}' show one class; at least two are needed")
        x, shares = train.x.flatten(0, 1)[known], shares[known]
        numbers = {}
        with torch.autocast(x.device.type, enabled=False):
            for by in dict.fromkeys(c.by):
                scores = (self._linear if by == "linear" else self._neighbours)(x, shares, test.x)
                counts = overlaps(scores, test.masks, test.grid, c.ignore_index)
                numbers[f"{by}_miou"] = mean_iou(*counts)
        return numbers

    def _linear(self, x: Tensor, shares: Tensor, test_x: Tensor) -> Tensor:
        """x (P, D), shares (P, C), test_x (m, N, D) -> scores (m, N, C)."""
        mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
        weight = torch.zeros(shares.shape[1], x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(shares.shape[1], device=x.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], lr=0.0, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for done, rows in enumerate(batches(len(x), min(4096, len(x)), self.config.steps, generator)):
            rows = rows.to(x.device)
            with torch.enable_grad():
                logits = linear((x[rows] - mean) / std, weight, bias)
                loss = -(shares[rows] * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 1e-3 * half_cosine(done, self.config.steps)
            optimizer.step()
        return linear((test_x - mean) / std, weight.detach(), bias.detach())

    def _neighbours(self, x: Tensor, shares: Tensor, test_x: Tensor) -> Tensor:
        """x (P, D), shares (P, C), test_x (m, N, D) -> shares of votes (m, N, C)."""
        c = self.config
        chosen = rng.permutation(0, "segment", len(x))[: c.max_patches].to(x.device)
        x, shares = x[chosen], shares[chosen]
        if c.k > len(x):
            raise DataError(f"segment: k is {c.k}, but there are {len(x):,} labelled patches; use k={len(x)} or less")
        votes = []
        for image in test_x:
            similarity, neighbours = nearest(x, image, c.k)
            weights = (similarity / c.temperature).softmax(1)
            votes.append(torch.einsum("nk,nkc->nc", weights, shares[neighbours]))
        return torch.stack(votes)

    def _patches(self, subject: Subject) -> tuple[Patches, Patches]:
        """Of train and test images.

        Raises:
            DataError: if there are none with a mask, or a mask is of images of both splits.
        """
        c, sources = self.config, _both(subject)
        folders: dict[Split, Path] = {"train": Path(c.masks), "test": Path(c.eval_masks or c.masks)}
        masked = {split: MaskedSource(source, folders[split]) for split, source in sources.items()}
        own = _of_other_images(subject, masked)
        spec = subject.spec
        grid = spec.layers.get(c.layers[0] % spec.depth, (0, spec.grid))[1] if c.layers else spec.grid
        size = tuple(cells * stride for cells, stride in zip(spec.grid.shape, spec.stride, strict=True))
        geometry = Geometry(subject.views)
        found = []
        for split, limit in (("train", c.max_train), ("test", c.max_test)):
            try:
                features = own.features(split, pool="tokens", layers=c.layers, limit=limit)
            except DataError as error:
                text = f"segment: no mask of the {split} images below '{folders[split]}', such as "
                raise DataError(f"{text}'{mask_name(sources[split].read(0).name)}'") from error
            masks = [masked[split].mask(index, subject.views, geometry, size) for index in features.y.tolist()]
            found.append(Patches(features.x, torch.stack(masks).to(subject.device), grid))
        if isinstance(subject, EncoderSubject):
            subject.asked.update(own.asked)
        if shared := sorted(masked["train"].used & masked["test"].used):
            raise DataError(
                f"segment: mask {shared[0]} is that of a train and of a test image; name the masks of test images by "
                "segment.eval_masks=FOLDER, and test on other images than those to learn from"
            )
        return found[0], found[1]


@dataclass(frozen=True, eq=False)
class Patches:
    """Tokens `x` (n, N, D) on `grid`, and `masks` (n, H, W) of class ids, int64, of n images."""

    x: Tensor
    masks: Tensor
    grid: Grid


class MaskedSource(Source):
    """The images of a source; the label of an image is its index if it has a mask, else it has none."""

    def __init__(self, source: Source, folder: Path) -> None:
        super().__init__(source.config)
        self.inner, self.folder = source, folder
        self.name, self.blocks, self.remote = source.name, source.blocks, source.remote
        self.used: set[Path] = set()
        """The masks that were read."""

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, index: int) -> Sample:
        return self._labelled(self.inner.read(index), index)

    def read_many(self, indices: Sequence[int]) -> list[Sample | BrokenImage]:
        found = self.inner.read_many(indices)
        pairs = zip(found, indices, strict=True)
        return [each if isinstance(each, BrokenImage) else self._labelled(each, index) for each, index in pairs]

    def _labelled(self, sample: Sample, index: int) -> Sample:
        has_mask = (self.folder / mask_name(sample.name)).is_file()
        return Sample(sample.data, sample.name, index if has_mask else None, sample.page)

    def mask(self, index: int, views: ViewBuilder, geometry: Geometry, size: tuple[int, ...]) -> Tensor:
        """Class ids (H, W) int64 of the evaluation view of a sample, which has `size`.

        Raises:
            DataError: if the file is no mask of the image.
        """
        sample = self.inner.read(index)
        path = self.folder / mask_name(sample.name)
        self.used.add(path)
        ids = read_mask(path)
        shown = geometry.image_size(sample)
        if ids.shape != shown:
            is_, should = (f"{height}x{width}" for height, width in (ids.shape, shown))
            raise DataError(f"segment: mask {path} has {is_} pixels, its image {sample.name} has {should}")
        rows, columns = geometry.places(shown, size)
        return torch.from_numpy(ids.astype(np.int64)[rows[:, None], columns[None]])


class Fifths(Source):
    """Every fifth image of a source, or the others."""

    def __init__(self, source: Source, *, test: bool) -> None:
        super().__init__(source.config)
        self.inner, self.name, self.remote = source, source.name, source.remote
        self._ids = [index for index in range(len(source)) if (index % TESTED_OF == TESTED_OF - 1) == test]

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Sample:
        return self.inner.read(self._ids[index])

    def read_many(self, indices: Sequence[int]) -> list[Sample | BrokenImage]:
        return self.inner.read_many([self._ids[index] for index in indices])


def _both(subject: Subject) -> dict[Split, Source]:
    """The sources of both splits."""
    train = subject.source("train")
    try:
        return {"train": train, "test": subject.source("test")}
    except DataError:
        return {"train": Fifths(train, test=False), "test": Fifths(train, test=True)}


def _of_other_images(subject: Subject, sources: Mapping[Split, Source]) -> EncoderSubject:
    """The same encoder, whose features are those of other sources, all labelled."""
    workers, batch_size = (subject.workers, subject.batch_size) if isinstance(subject, EncoderSubject) else (0, 64)
    return EncoderSubject(
        subject.encoder, subject.views, Splits(sources, frozenset(sources)), device=subject.device,
        world=subject.world, workers=workers, batch_size=batch_size, precision=subject.frozen,
    )  # fmt: skip


def mask_name(name: str) -> str:
    """The name of the mask of a sample, relative to the folder of masks."""
    return str(PurePosixPath(name).with_suffix(".png"))


def read_mask(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Class ids (H, W) uint8 of a PNG file.

    Raises:
        DataError: if it cannot be read, or holds colours.
    """
    try:
        with pil.open(path, formats=("PNG",)) as file:
            mode, ids = file.mode, np.asarray(file)
    except Exception as error:  # Pillow raises many kinds
        raise DataError(f"segment: mask {path} cannot be read: {type(error).__name__}: {error}") from error
    if mode not in ("L", "P", "1"):
        raise DataError(f"segment: mask {path} has mode {mode}; class ids need a PNG in grey (L) or with a palette (P)")
    return ids.astype(np.uint8)


def soft_labels(masks: Tensor, grid: Grid, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """masks (n, H, W) -> share of each class in the counted pixels of patches, (n*N, C), and (n*N,) bool: has any."""
    rows, columns = grid.shape
    patches = masks.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3).flatten(3)
    found = []
    for image in patches.flatten(1, 2):  # (N, pixels)
        counted = image != ignore_index
        ids = one_hot(image.masked_fill(~counted, 0), num_classes) * counted[..., None]
        found.append(ids.sum(1))
    counts = torch.cat(found).float()
    total = counts.sum(1, keepdim=True)
    return counts / total.clamp_min(1), total[:, 0] > 0


def overlaps(scores: Tensor, masks: Tensor, grid: Grid, ignore_index: int) -> tuple[Tensor, Tensor]:
    """scores (m, N, C), masks (m, H, W) -> pixels of intersection and of union, each (m, C) float64, on the CPU."""
    intersections, unions = [], []
    num_classes = scores.shape[2]
    for score, mask in zip(scores, masks, strict=True):
        planes = score.t().unflatten(1, grid.shape)[None]
        predicted = interpolate(planes, size=mask.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        counted = mask != ignore_index
        pairs = (mask[counted] * num_classes + predicted[counted]).bincount(minlength=num_classes**2)
        confusion = pairs.unflatten(0, (num_classes, num_classes)).cpu().double()
        intersections.append(confusion.diag())
        unions.append(confusion.sum(0) + confusion.sum(1) - confusion.diag())
    return torch.stack(intersections), torch.stack(unions)


def mean_iou(intersections: Tensor, unions: Tensor) -> Estimate:
    """(m, C) pixels of each image -> the mean over classes of the summed intersection over the summed union.

    Classes that no pixel has and that no pixel is taken for are left out. The interval holds 95 % of what the images
    give when as many are drawn from them anew, with repetition, a thousand times.
    """

    def of(counts: Tensor) -> Tensor:
        """counts (r, m): how often each image counts -> (r,)."""
        return (counts @ intersections / (counts @ unions)).nanmean(1)

    m = len(unions)
    drawn = torch.randint(m, (RESAMPLED, m), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLED, m, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    low, high = of(counts).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = of(torch.ones(1, m, dtype=torch.float64)).item()
    return Estimate(value, min(low, value), max(high, value))
