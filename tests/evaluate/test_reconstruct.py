"""What is visible stays as it is, what was hidden is what the decoder says, and every image that fails is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from mim_framework.assembly.opened import load_run
from mim_framework.assembly.preflight import make_step
from mim_framework.base.errors import DataError, MimError
from mim_framework.commands.reconstruct import reconstruct_run
from mim_framework.evaluate.pictures import CAPTION_HEIGHT, GAP
from mim_framework.evaluate.reconstruct import reconstruct
from mim_framework.training.pictures import draw_fixed

RED, GREY, WHITE = (200, 0, 0), (128, 128, 128), (255, 255, 255)


def test_the_rows_of_a_reconstruction_by_hand(make_run, registry):
    run = load_run(make_run(), registry=registry)
    run.objective.train()
    batch = {"x": torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)}
    step = make_step(run.recipe, torch.arange(2))

    rows = reconstruct(run.objective, run.views, step, batch)

    hidden = run.objective.masker(step, run.views.prepare(step, batch)).masks["x"].hidden
    assert len(rows) == 2
    for row, patches in zip(rows, hidden.reshape(2, 2, 2), strict=True):
        image, masked, reconstruction = row
        pixels = patches.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, 8, 8)
        assert torch.allclose(image, torch.full((3, 8, 8), 0.2))
        assert torch.allclose(masked, torch.where(pixels, 0.5, 0.2))
        assert torch.allclose(reconstruction, torch.where(pixels, 1.0, 0.2))
    assert run.objective.encoder.dropout.training
    assert not rows[0][2].requires_grad


def cells(path) -> list[list[tuple[int, int, int]]]:
    """The four patches of the three images in the first row of a picture."""
    picture = Image.open(path)
    size = (picture.width - 4 * GAP) // 3
    corners = [(size // 4, size // 4), (3 * size // 4, size // 4), (size // 4, 3 * size // 4), (3 * size // 4,) * 2]
    lefts = [GAP + column * (size + GAP) for column in range(3)]
    return [[picture.getpixel((left + x, CAPTION_HEIGHT + GAP + y)) for x, y in corners] for left in lefts]


def test_pictures_of_a_run_show_input_mask_and_reconstruction(make_run, registry, tmp_path):
    run_dir = make_run()
    image = tmp_path / "train" / "red" / "200.png"
    (tmp_path / "other").mkdir()
    namesake = shutil.copy(image, tmp_path / "other" / "200.png")

    written = reconstruct_run(run_dir, [image, namesake], tmp_path / "out" / "deep", registry=registry)

    assert written == [tmp_path / "out" / "deep" / "200.png", tmp_path / "out" / "deep" / "200_2.png"]
    for path in written:
        original, masked, reconstruction = cells(path)
        assert original == [RED] * 4
        assert sorted(masked) == [GREY, GREY, RED, RED]
        assert reconstruction == [WHITE if patch == GREY else RED for patch in masked]


def test_pictures_go_into_the_run_directory_by_default(make_run, registry, tmp_path):
    run_dir = make_run()
    image = tmp_path / "train" / "red" / "200.png"
    assert reconstruct_run(run_dir, [image], registry=registry) == [run_dir / "reconstructions" / "200.png"]


def test_an_image_that_cannot_be_read_is_named_before_anything_is_drawn(make_run, registry, tmp_path):
    run_dir, good, broken = make_run(), tmp_path / "train" / "red" / "200.png", tmp_path / "page.jpg"
    broken.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"page\.jpg: not_an_image"):
        reconstruct_run(run_dir, [good, broken], registry=registry)
    with pytest.raises(DataError, match=r"missing\.jpg cannot be read: No such file"):
        reconstruct_run(run_dir, [good, tmp_path / "missing.jpg"], registry=registry)
    assert not (run_dir / "reconstructions").exists()


def test_a_folder_that_cannot_be_written_is_a_clear_error(make_run, registry, tmp_path):
    run_dir, image = make_run(), tmp_path / "train" / "red" / "200.png"
    with pytest.raises(MimError, match=r"cannot write .*200\.png"):
        reconstruct_run(run_dir, [image], image, registry=registry)


def test_a_method_that_predicts_no_pixels_is_refused(make_run, registry, tmp_path):
    run_dir, image = make_run(target="edges"), tmp_path / "train" / "red" / "200.png"
    with pytest.raises(MimError, match="colours has no picture to show: its target 'edges' predicts no pixels"):
        reconstruct_run(run_dir, [image], registry=registry)


# --- during a run ----------------------------------------------------------------------------------------------------


def test_the_fixed_picture_is_the_same_each_time_and_holds_images_from_all_over_the_source(make_run, registry, as_run):
    run = load_run(make_run(), registry=registry)
    picture = draw_fixed(as_run(run), run.source)
    assert picture.tobytes() == draw_fixed(as_run(run), run.source).tobytes()
    rows = [picture.getpixel((GAP, CAPTION_HEIGHT + GAP + row * (96 + GAP))) for row in range(3)]
    assert rows == [(0, 0, 100), (0, 100, 0), (100, 0, 0)]  # images 0, 3 and 6 of 9


def test_a_broken_image_leaves_the_fixed_picture_one_row_shorter(make_run, registry, as_run, tmp_path):
    run_dir = make_run()
    (tmp_path / "train" / "green" / "100.png").write_bytes(b"")
    run = load_run(run_dir, registry=registry)
    assert draw_fixed(as_run(run), run.source).height == CAPTION_HEIGHT + GAP + 2 * (96 + GAP)


@pytest.mark.parametrize(
    "reason",
    [
        "no images wanted",
        "no pixels predicted",
        "another order of the step",
        "another view",
        "several masks of an image",
    ],
)
def test_there_is_no_fixed_picture_where_there_is_nothing_to_show(make_run, registry, as_run, reason):
    run = load_run(make_run(target="edges" if reason == "no pixels predicted" else "pixels"), registry=registry)
    step_of = partial(make_step, run.recipe)
    objective = run.objective
    if reason == "another order of the step":
        objective.encode = lambda masked: None
    if reason == "another view":
        objective.masker.spec = replace(objective.masker.spec, views=("x", "half"))
    if reason == "several masks of an image":
        masked = objective.masker.forward
        objective.masker.forward = lambda step, views: masked(step_of(torch.arange(6)), views)
    stand_in = as_run(run)
    if reason == "no images wanted":
        log = run.recipe.log.model_copy(update={"num_images": 0})
        stand_in.recipe = run.recipe.model_copy(update={"log": log})
    assert draw_fixed(stand_in, stand_in.source) is None


def test_a_prediction_that_is_no_image_can_be_drawn_on_a_finer_scale(make_run, registry, monkeypatch):
    run = load_run(make_run(target="edges"), registry=registry)
    drawn = torch.full((2, 1, 16, 16), 0.25)
    monkeypatch.setattr(run.objective.heads["main"].target, "draw", lambda pred, mask, view: drawn)
    batch = {"x": torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)}
    rows = reconstruct(run.objective, run.views, make_step(run.recipe, torch.arange(2)), batch)
    image, masked, drawing = rows[0]
    assert torch.allclose(image, torch.full((3, 16, 16), 0.2))
    assert (masked == 0.5).sum() == masked.numel() / 2
    assert torch.equal(drawing, drawn[0])
