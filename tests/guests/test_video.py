"""Masked autoencoding of clips as a guest: tubes, cubes and pictures of clips are the framework's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mim_framework import Grid, Mask, RecipeError, Sample
from mim_framework.assembly.builder import Model, build_model
from mim_framework.assembly.preflight import make_step
from mim_framework.commands.evaluate import evaluate
from mim_framework.commands.replay import save_images
from mim_framework.evaluate.pictures import reconstruction_picture
from mim_framework.evaluate.reconstruct import reconstruct
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.testing import ComponentContract, RecipeContract
from mim_framework.testing.runs import SHORT, first_batch, trainer_of
from mim_framework.training.trainer import train

QUICKSTART = "video_quickstart"
TINY = [
    "encoder.embed_dim=16", "encoder.depth=1", "encoder.num_heads=2",
    "decoder={type: mae_decoder, embed_dim: 16, depth: 1, num_heads: 2}",
    *SHORT,
]  # fmt: skip
GRID = Grid((4, 4, 4))
"""8 frames of 16x16 pixels in cubes of 2x4x4."""


@pytest.fixture(scope="module", autouse=True)
def video(install_guest: Callable[[str], Path]) -> ModuleType:
    site = install_guest("mim-plugin-guest-video")
    module = importlib.import_module("mim_plugin_guest_video")
    assert module.__file__.startswith(str(site))
    return module


class TestComponents(ComponentContract):
    plugin = "guest_video"


@pytest.mark.slow
class TestRecipes(RecipeContract):
    plugin = "guest_video"
    recipes = (QUICKSTART,)


def built(*overrides: str) -> Model:
    return build_model(load_recipe(QUICKSTART, [*TINY, *overrides], Registry()), Registry())


def moving(video: ModuleType, **options: Any) -> Any:
    return video.MovingImage(video.MovingImage.Config(**options))


def digit(seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(torch.randint(1, 256, (8, 8), generator=generator, dtype=torch.uint8).numpy(), "noise")


def masked_clips(model: Model, batch_size: int = 4) -> tuple[Mask, Tensor]:
    """Masks of the recipe's masker, and clips of noise."""
    views = model.views.prepare(None, model.views.example(batch_size))
    masked = model.objective.masker(make_step(model.recipe, torch.arange(batch_size)), views)
    return masked.masks["x"].at(GRID), masked.views["x"]


# --- clips -----------------------------------------------------------------------------------------------------------


def test_what_moves_turns_round_at_both_ends(video):
    places = video.bounce(torch.tensor([3.0, 0.0]), torch.tensor([2.0, -1.0]), num_frames=4, limit=4)
    assert places[:, 0].tolist() == [3, 3, 1, 1]  # 3, then 5, 7 and 9 folded back at 4 and at 0
    assert places[:, 1].tolist() == [0, 1, 2, 3]  # 0, then -1, -2 and -3 folded back at 0
    assert not video.bounce(torch.zeros(2), torch.ones(2), num_frames=4, limit=0).any()


def test_every_frame_shows_the_image_at_the_place_that_its_numbers_give(video):
    views, sample = moving(video, num_frames=3), digit()
    clip = views(sample, torch.tensor([0.5, 0.0, 0.75, 1.0]))["x"]  # from (4, 0), by (1, 2) pixels a frame
    assert clip.shape == views.specs["x"].shape == (1, 3, 16, 16)
    image = torch.from_numpy(sample.data)
    for number, (top, left) in enumerate([(4, 0), (5, 2), (6, 4)]):
        frame = clip[0, number]
        assert torch.equal(frame[top : top + 8, left : left + 8], image)
        assert frame.count_nonzero() == 64


def test_clips_follow_from_the_numbers_of_a_position_alone(video):
    views, numbers = moving(video), torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first, again, other = (views(digit(), row)["x"] for row in (numbers[0], numbers[0], numbers[1]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_that_does_not_fit_into_a_frame_is_refused(video):
    with pytest.raises(ValueError, match="'moving_size' must be at most 'img_size', 16, got 20"):
        moving(video, moving_size=20)


# --- tubes and cubes -------------------------------------------------------------------------------------------------


def test_a_tube_is_hidden_at_all_times():
    mask, _ = masked_clips(built())
    times = mask.hidden.unflatten(1, (4, 16))
    assert torch.equal(times, times[:, :1].expand_as(times))
    assert mask.num_hidden == 4 * 12  # three quarters of the 16 tubes, at four times
    assert len({tuple(row.tolist()) for row in mask.hidden}) == 4
    free, _ = masked_clips(built("masker.tube=false"))
    times = free.hidden.unflatten(1, (4, 16))
    assert not torch.equal(times, times[:, :1].expand_as(times))


def test_a_target_is_a_normalised_cube_of_the_clip():
    model = built()
    views = model.views.prepare(None, model.views.example(2))
    step = make_step(model.recipe, torch.arange(2))
    masked = model.objective.masker(step, views)
    target = model.objective.heads["main"].target(step, masked)
    assert target.values.shape == (2, 48, 2 * 4 * 4)
    time, row, column = (int(i) for i in torch.unravel_index(target.ids[1, 5], GRID.shape))
    cube = views["x"][1, 0, 2 * time : 2 * time + 2, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
    assert torch.allclose(target.values[1, 5], (cube - cube.mean()) / cube.std(), atol=1e-4)


def test_an_encoder_sees_the_visible_cubes_only():
    model = built()
    mask, clips = masked_clips(model)
    encoder = model.objective.encoder.eval()
    pixels = mask.hidden.reshape(-1, 1, *GRID.shape)
    for axis, side in enumerate((2, 4, 4), start=2):
        pixels = pixels.repeat_interleave(side, axis)
    seen, other_hidden, other_visible = (
        encoder(each, mask).tokens for each in (clips, clips.where(~pixels, 0.0), clips.where(pixels, 0.0))
    )
    assert seen.shape == (4, 16, 16)
    assert torch.equal(seen, other_hidden)
    assert not torch.allclose(seen, other_visible, atol=1e-3)


def test_an_encoder_of_clips_refuses_images():
    with pytest.raises(RecipeError, match="'video_vit' needs a clip; view 'x' has the axes height, width"):
        built("views={type: image, img_size: 16}", "masker.tube=false")


# --- pictures and what is learned ------------------------------------------------------------------------------------


def test_a_picture_shows_four_frames_side_by_side():
    model = built()
    batch = {"x": torch.stack([model.views.evaluation_view(digit(seed)) for seed in range(2)])}
    rows = reconstruct(model.objective, model.views, make_step(model.recipe, torch.arange(2)), batch)
    clip = batch["x"][0].float() / 255
    assert [image.shape for image in rows[0]] == [(1, 16, 4 * 16)] * 3
    assert torch.equal(rows[0][0], torch.cat([clip[:, frame] for frame in (0, 2, 4, 6)], dim=-1))
    grey = rows[0][1] == 0.5
    assert grey.float().mean() == 0.75
    assert torch.equal(rows[0][2][~grey], rows[0][0][~grey])
    assert reconstruction_picture(rows).width > 3 * 4 * 16


def test_the_clips_of_a_step_can_be_saved(tmp_path):
    from PIL import Image

    with trainer_of(tmp_path / "run", QUICKSTART, *TINY) as trainer:
        save_images(trainer, first_batch(trainer), tmp_path / "images")
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 8
    with Image.open(files[0]) as picture:
        assert picture.size == (64, 16)


@pytest.mark.slow
def test_the_digit_in_a_clip_is_known_better_after_training_than_before(tmp_path):
    run_dir = train(load_recipe(QUICKSTART, [f"output_dir={tmp_path}", "evaluate=[]"], Registry()), Registry())
    [judged] = evaluate(["knn"], [run_dir])
    assert judged.numbers["trained"]["knn_top1"] > judged.numbers["untrained"]["knn_top1"] + 0.03
    assert judged.numbers["untrained"]["knn_top1"] > 0.1
