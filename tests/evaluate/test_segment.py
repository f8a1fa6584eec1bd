"""Masks follow their images into the evaluation view, and tokens that see tell what each pixel shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mim_framework.base.errors import DataError
from mim_framework.base.section import Section
from mim_framework.contract.components import Encoder
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent, Sample
from mim_framework.contract.specs import EncoderSpec, Specs
from mim_framework.contract.world import World
from mim_framework.data.sources.folder import FolderSource
from mim_framework.data.views import ImageViews
from mim_framework.evaluate.base import EncoderSubject
from mim_framework.evaluate.geometry import Geometry
from mim_framework.evaluate.segment import Segment, mask_name, mean_iou, overlaps, soft_labels
from mim_framework.evaluate.splits import Splits
from mim_framework.nn.patches import patchify
from mim_framework.testing import run_ranks

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
VIEWS = ImageViews(ImageViews.Config(img_size=8, mean=(0, 0, 0), std=(1, 1, 1)))


class Seeing(Encoder):
    """A token is its patch; of `blind` one, nothing."""

    name = "seeing"

    def __init__(self, *, blind: bool = False) -> None:
        super().__init__(Section(), Specs(views=VIEWS.specs))
        self.blind = blind
        self.spec = EncoderSpec(dim=48, grid=Grid((2, 2)), stride=4, depth=1, num_heads=1)

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        tokens = patchify(view, 4)
        return Latent(torch.ones_like(tokens) if self.blind else tokens, self.spec.grid)


def write(folder: Path, count: int, *, seed: int, masks: Path | None = None, ignored: bool = False) -> None:
    """Images of four quarters, each of one of three colours, and masks that say which."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        ids = generator.integers(3, size=(2, 2)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        for path in (folder / "a" / f"{number}.png", (masks or folder) / "a" / f"{number}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOURS[ids]).save(folder / "a" / f"{number}.png")
        if masks is not None:
            ids[0] = 255 if ignored else ids[0]
            Image.fromarray(ids).save(masks / "a" / f"{number}.png")


def subject_of(folder: Path, *, encoder: Encoder | None = None, test: bool = True, world: World = World()):
    sources = {"train": FolderSource(FolderSource.Config(root=str(folder / "train")))}
    if test:
        sources["test"] = FolderSource(FolderSource.Config(root=str(folder / "test")))
    splits = Splits(sources, frozenset())
    return EncoderSubject(encoder or Seeing(), VIEWS, splits, device=torch.device("cpu"), world=world, batch_size=4)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train", 20, seed=0, masks=tmp_path / "masks")
    write(tmp_path / "test", 10, seed=1, masks=tmp_path / "test_masks")
    return tmp_path


def numbers_of(subject, folder: Path, **options) -> dict[str, float]:
    masks = {"masks": str(folder / "masks"), "eval_masks": str(folder / "test_masks")}
    return Segment(Segment.Config(**{**masks, "steps": 300, "k": 5, **options}))(subject)


def test_tokens_that_see_tell_every_pixel_and_blind_ones_do_not(folder):
    numbers = numbers_of(subject_of(folder), folder)
    assert numbers.keys() == {"linear_miou", "knn_miou"}
    for miou in numbers.values():
        assert miou > 0.75  # scores are interpolated between the middles of two patches a side
        assert miou.low <= miou <= miou.high
    assert numbers_of(subject_of(folder), folder) == numbers
    blind = numbers_of(subject_of(folder, encoder=Seeing(blind=True)), folder)
    assert all(miou < 0.3 for miou in blind.values())


def test_two_ranks_agree_with_one(folder):
    alone = numbers_of(subject_of(folder), folder)
    assert run_ranks(lambda rank: numbers_of(subject_of(folder, world=World(rank, 2, rank)), folder)) == [alone] * 2


def test_without_test_images_every_fifth_is_one(folder):
    numbers = numbers_of(subject_of(folder, test=False), folder, eval_masks=None)
    assert all(miou > 0.6 for miou in numbers.values())


def test_images_without_a_mask_are_left_out_and_counted(folder, caplog):
    for number in range(12):
        (folder / "masks" / "a" / f"{number}.png").unlink()
    assert numbers_of(subject_of(folder), folder)["linear_miou"] > 0.6
    assert "evaluation on split 'train': of 20 images, 12 have no label; they are left out" in caplog.text


def test_ignored_pixels_are_neither_learned_nor_counted(tmp_path):
    write(tmp_path / "train", 20, seed=0, masks=tmp_path / "masks", ignored=True)
    write(tmp_path / "test", 10, seed=1, masks=tmp_path / "test_masks", ignored=True)
    assert numbers_of(subject_of(tmp_path), tmp_path)["linear_miou"] > 0.7


def test_what_is_wrong_with_masks_is_told(folder):
    with pytest.raises(DataError, match=r"no mask of the train images below '.*nowhere', such as 'a/0\.png'"):
        numbers_of(subject_of(folder), folder, masks=str(folder / "nowhere"))
    with pytest.raises(DataError, match=r"k is 90, but there are 80 labelled patches; use k=80 or less"):
        numbers_of(subject_of(folder), folder, k=90)
    mask = folder / "masks" / "a" / "3.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"mask .*3\.png has mode RGB; class ids need a PNG in grey \(L\)"):
        numbers_of(subject_of(folder), folder)
    Image.fromarray(np.zeros((4, 8), np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"mask .*3\.png has 4x8 pixels, its image a/3\.png has 8x8"):
        numbers_of(subject_of(folder), folder)
    mask.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"mask .*3\.png cannot be read: UnidentifiedImageError"):
        numbers_of(subject_of(folder), folder)
    for path in (folder / "masks").rglob("*.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"the masks below '.*masks' show one class; at least two are needed"):
        numbers_of(subject_of(folder), folder)


def test_a_mask_of_images_of_both_splits_is_refused(folder):
    shutil.copytree(folder / "masks", folder / "all_masks")
    shutil.copytree(folder / "test_masks", folder / "all_masks", dirs_exist_ok=True)
    both = str(folder / "all_masks")
    text = r"segment: mask \S+\.png is that of a train and of a test image; name the masks of"
    with pytest.raises(DataError, match=text):
        numbers_of(subject_of(folder), folder, masks=both, eval_masks=None)


def test_what_is_read_is_known_to_the_subject(folder):
    subject = subject_of(folder)
    numbers_of(subject, folder)
    assert list(subject.asked) == [("tokens", ())]


def test_an_encoder_of_clips_is_refused():
    spec = EncoderSpec(dim=4, grid=Grid((2, 2, 2)), stride=4, depth=1, num_heads=1)
    with pytest.raises(ValueError, match="masks are of images; the encoder sees clips, or several views"):
        Segment(Segment.Config(masks="m")).check(spec)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_name_of_a_mask():
    assert (mask_name("cats/3.jpg"), mask_name("digits/4")) == ("cats/3.png", "digits/4.png")


def test_shares_of_classes_in_patches_by_hand():
    mask = torch.tensor([[[0, 1, 255, 255], [1, 1, 255, 2]]])  # two patches of two by two pixels
    shares, known = soft_labels(mask, Grid((1, 2)), 3, 255)
    assert shares.tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]
    assert known.tolist() == [True, True]
    assert soft_labels(torch.full((1, 2, 2), 255), Grid((1, 1)), 3, 255)[1].tolist() == [False]


def test_overlaps_and_their_mean_by_hand():
    scores = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # left pixel class 0, right pixel class 1
    intersections, unions = overlaps(scores, torch.tensor([[[0, 0]]]), Grid((1, 2)), 255)
    assert (intersections.tolist(), unions.tolist()) == ([[1.0, 0.0]], [[2.0, 1.0]])
    assert mean_iou(intersections, unions) == 0.25  # a half of class 0, nothing of class 1
    two = (torch.tensor(each).double() for each in ([[4, 0, 0], [0, 0, 0]], [[4, 0, 0], [4, 0, 0]]))
    estimate = mean_iou(*two)  # class 0 only: 4 of 8 pixels; of the first image alone 1, of the second alone 0
    assert (estimate, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


# --- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (37, 91), (300, 200), (1500, 2000)])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_a_pixel_of_the_view_shows_the_place_that_is_said(size, in_chans):
    """The edge between a dark and a light part of an image lies in its view where the places say, to a pixel."""
    views = ImageViews(ImageViews.Config(img_size=(32, 48), mean=(0,) * in_chans, std=(1,) * in_chans))
    rows, columns = Geometry(views).places(size, (32, 48))
    for axis, places in enumerate((rows, columns)):
        light = np.indices(size)[axis] >= round(0.4 * size[axis])
        image = (light * 255).astype(np.uint8)[..., None].repeat(in_chans, 2)
        view = views.evaluation_view(Sample(image[..., 0] if in_chans == 1 else image, "edge"))
        shown = view.float().mean((0, 2 - axis)) > 127
        said = torch.from_numpy(places >= round(0.4 * size[axis]))
        assert int((shown != said).sum()) <= 1
        assert 0 <= places.min() <= places.max() < size[axis]


def test_the_same_size_is_the_same_place():
    rows, columns = Geometry(VIEWS).places((8, 8), (8, 8))
    assert (rows.tolist(), columns.tolist()) == (list(range(8)), list(range(8)))


def test_a_flipped_view_turns_its_mask():
    class Flipped(ImageViews):
        def evaluation_view(self, sample):
            return super().evaluation_view(sample).flip(-1)

    rows, columns = Geometry(Flipped(VIEWS.config)).places((8, 8), (8, 8))
    assert (rows.tolist(), columns.tolist()) == (list(range(8)), list(range(8))[::-1])


def test_a_view_that_is_no_crop_is_told():
    class Waves(ImageViews):
        name = "waves"

        def evaluation_view(self, sample):
            return super().evaluation_view(sample).roll(3, -1)

    text = "evaluation view of 'waves' is no crop and resize of the image, so that its mask cannot follow"
    with pytest.raises(DataError, match=re.escape(text)):
        Geometry(Waves(VIEWS.config)).places((8, 8), (8, 8))
