"""Point-MAE as a guest: what defines the method, on surfaces of meshes, through a core that knows images only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mim_framework import DataError, Grid, Mask, Masked, Pred, RecipeError, Sample
from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.opened import load_run
from mim_framework.assembly.preflight import make_step
from mim_framework.commands.check import report
from mim_framework.contract.world import World
from mim_framework.data.loader import evaluation_batches
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import read_metrics
from mim_framework.runtime.optim import parameter_groups
from mim_framework.testing import ComponentContract, RecipeContract, RegistryWith, run_ranks
from mim_framework.testing.runs import SHORT, CrashAtStep, losses_of, weights_of
from mim_framework.training.trainer import train

SMALL = [
    "data.source={type: mesh_shapes, num_shapes: 100, num_points: 200}",
    "views={type: point_groups, num_points: 128, num_groups: 10, group_size: 12}",
    "encoder={type: pointmae, embed_dim: 32, depth: 2, num_heads: 2, point_dim: 8, norm: layer, drop_path_rate: 0}",
    "decoder={type: pointmae_decoder, depth: 1, num_heads: 2, drop_path_rate: 0}",
]
SGD = "optim={type: momentum, lr: 0.05, shape: constant, weight_decay: 0, options: {momentum: 0.0}}"
"""Adam would turn the rounding of a gradient that is zero into a step of full size."""
NORMS = pytest.mark.parametrize("norm", ["layer", "batch"])


@pytest.fixture(scope="module", autouse=True)
def guest(install_guest: Callable[[str], Path]) -> ModuleType:
    install_guest("mim-plugin-guest-pointmae")
    return importlib.import_module("mim_plugin_guest_pointmae")


def recipe_at(folder: Path, *overrides: str, registry: Any = None) -> Any:
    options = [*SMALL, *SHORT, f"output_dir={folder}", *overrides]
    return load_recipe("pointmae_quickstart", options, registry or Registry())


def model_of(folder: Path, *overrides: str) -> Any:
    return build_model(recipe_at(folder, *overrides), Registry())


def run(folder: Path, *overrides: str, registry: Any = None) -> Path:
    registry = registry or RegistryWith()
    return train(recipe_at(folder, *overrides, registry=registry), registry)


def random_cloud(num_points: int = 128, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, num_points, 3, generator=torch.Generator().manual_seed(1))


def random_mask(num_hidden: int = 6, num_groups: int = 10, batch_size: int = 2) -> Mask:
    noise = torch.rand(batch_size, num_groups, generator=torch.Generator().manual_seed(2))
    return Mask.from_shuffle(noise.argsort(dim=1), num_groups - num_hidden, Grid((num_groups,)))


class TestComponents(ComponentContract):
    plugin = "guest_pointmae"


@pytest.mark.slow
class TestRecipes(RecipeContract):
    """With layer norm: batch norm knows the parts that a batch comes in; its tests are those of training, below."""

    plugin = "guest_pointmae"
    recipes = ("pointmae_quickstart",)
    overrides = tuple(SMALL)


# --- surfaces --------------------------------------------------------------------------------------------------------


def area_of(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[triangles[:, corner]] for corner in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def test_a_square_prism_has_the_area_of_its_six_faces():
    shapes = importlib.import_module("mim_plugin_guest_pointmae.shapes")
    vertices, triangles = shapes.revolve([[0, -1], [1, -1], [1, 1], [0, 1]], sides=4)
    assert area_of(vertices, triangles).sum() == pytest.approx(2 * 2 + 4 * 2 * 2**0.5)


def test_points_lie_on_the_faces_and_each_face_has_its_share():
    shapes = importlib.import_module("mim_plugin_guest_pointmae.shapes")
    mesh = shapes.revolve([[0, -1], [1, -1], [1, 1], [0, 1]], sides=4)
    x, y, z = shapes.sample_surface(*mesh, 20_000, np.random.default_rng(0)).T
    on_side, on_end = np.isclose(abs(x) + abs(y), 1), np.isclose(abs(z), 1)
    assert (on_side | on_end).all()
    assert on_end.mean() == pytest.approx(4 / (4 + 8 * 2**0.5), abs=0.01)
    assert ((x > 0) & (y > 0))[on_side].mean() == pytest.approx(1 / 4, abs=0.015)
    assert z[on_side].mean() == pytest.approx(0, abs=0.02)
    assert z[on_side].var() == pytest.approx(1 / 3, abs=0.01)  # uniform between -1 and 1


def test_shapes_of_a_kind_differ_and_each_follows_from_its_number(guest):
    source = guest.MeshShapes(guest.MeshShapes.Config(num_points=50))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = source.read(0), source.read(0), source.read(7)
    assert (first.label, other.label) == (0, 0)
    assert torch.equal(first.data, again.data)
    extents = [(sample.data.amax(0) - sample.data.amin(0)) for sample in (first, other)]
    assert (extents[0] - extents[1]).abs().max() > 0.1
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_every_fifth_shape_is_held_out_and_all_kinds_are_in_both_parts(guest):
    source = guest.MeshShapes(guest.MeshShapes.Config(num_shapes=80, num_points=8))
    train, test = source.evaluation_sources()
    names = [{part.read(i).name for i in range(len(part))} for part in (train, test)]
    assert (len(names[0]), len(names[1])) == (64, 16)
    assert not names[0] & names[1]
    for part in (train, test):
        assert {part.read(i).label for i in range(len(part))} == set(range(8))


# --- groups ----------------------------------------------------------------------------------------------------------


def test_the_farthest_points_by_hand(guest):
    line = torch.tensor([0.0, 1.0, 10.0, 4.0, 7.0])
    points = torch.stack([line, torch.zeros(5), torch.zeros(5)], dim=1)[None]
    # From 0 the farthest is 10; then 1, 4 and 7 are 1, 4 and 3 from the nearest of both; then 1 and 7 are 1 and 3.
    assert guest.farthest_points(points, 4).tolist() == [[0, 2, 3, 4]]


def test_every_next_centre_is_as_far_as_any_point_from_those_before(guest):
    points = random_cloud()
    chosen = guest.farthest_points(points, 20)
    for cloud, ids in zip(points, chosen, strict=True):
        distance = (cloud[:, None] - cloud[None]).norm(dim=-1)
        for count in range(1, 20):
            to_nearest = distance[:, ids[:count]].amin(1)
            assert to_nearest[ids[count]] == to_nearest.max()


def test_groups_are_the_nearest_points_of_the_cloud_relative_to_their_centre(guest):
    points = random_cloud()
    groups = guest.group(points, 10, 12)
    assert groups.shape == (2, 10, 13, 3)
    assert torch.equal(groups[:, :, 0], points[torch.arange(2)[:, None], guest.farthest_points(points, 10)])
    assert not groups[:, :, 1].any()  # the point nearest to a centre is the centre
    for cloud, rows in zip(points, groups, strict=True):
        for row in rows:
            centre, members = row[0], row[0] + row[1:]
            distance = (cloud - centre).norm(dim=1)
            nearest = cloud[distance.argsort()[:12]]
            assert torch.allclose(members, nearest, atol=1e-6)


def test_a_permutation_that_keeps_the_first_point_leaves_the_tokens_as_they_are(guest, tmp_path):
    """The official kernel begins with the first point too, so that another first point gives other groups there."""
    model = model_of(tmp_path)
    cloud = random_cloud(batch_size=1)[0]
    permuted = cloud[torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(127)])]
    another_first = cloud.roll(-1, 0)
    views = [
        model.views.prepare(None, {"x": guest.unit_sphere(each)[None]})["x"]
        for each in (cloud, permuted, another_first)
    ]
    none = Mask.none(1, Grid((10,)))
    tokens = [model.objective.encoder(view, none).tokens for view in views]
    assert torch.allclose(tokens[0], tokens[1], atol=1e-5)
    assert not torch.allclose(tokens[0], tokens[2], atol=1e-2)


def test_where_a_cloud_lies_and_how_large_it_is_is_forgotten(guest, tmp_path):
    model = model_of(tmp_path)
    cloud = random_cloud(batch_size=1)[0]
    normalised, moved = (guest.unit_sphere(each) for each in (cloud, 5 * cloud + torch.tensor([3.0, -2.0, 7.0])))
    assert torch.allclose(normalised.mean(0), torch.zeros(3), atol=1e-6)
    assert normalised.norm(dim=1).max() == pytest.approx(1)
    assert torch.allclose(normalised, moved, atol=1e-5)
    views = [model.views.prepare(None, {"x": each[None]})["x"] for each in (normalised, moved)]
    assert torch.allclose(*views, atol=1e-5)


def test_a_view_is_scaled_and_moved_along_each_axis_and_takes_other_points_every_time(guest):
    views = guest.PointGroups(guest.PointGroups.Config(num_points=64, num_groups=4, group_size=4))
    sample = Sample(random_cloud(100)[0], "cloud")
    unmoved = torch.tensor([0.4, 0.4, 0.4, 0.5, 0.5, 0.5, 0.1, 0.2])  # 2/3 + 0.4 * (3/2 - 2/3) = 1
    largest = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.1, 0.2])
    points = views(sample, unmoved)["x"]
    assert points.norm(dim=1).max() == pytest.approx(1)
    expected = points * torch.tensor([1.5, 1.5, 2 / 3]) + torch.tensor([-0.2, 0.2, 0.0])
    assert torch.allclose(views(sample, largest)["x"], expected, atol=1e-6)
    assert torch.equal(views(sample, unmoved)["x"], points)
    others = views(sample, unmoved + torch.tensor([0, 0, 0, 0, 0, 0, 0, 0.1]))["x"]
    assert others.norm(dim=1).max() == pytest.approx(1)
    assert not torch.allclose(others[0], points[0])


def test_what_is_no_cloud_or_has_too_few_points_is_named_with_the_cure(guest):
    views = guest.PointGroups(guest.PointGroups.Config(num_points=64))
    with pytest.raises(DataError, match=r"'thin' has 63 points, views.num_points=64 wants more; lower it"):
        views.evaluation_view(Sample(torch.rand(63, 3), "thin"))
    with pytest.raises(DataError, match=r"'photo.png' is no cloud of points \(N, 3\); use a source of points"):
        views.evaluation_view(Sample(b"bytes of a file", "photo.png"))


def test_more_groups_than_points_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="point_groups: num_groups 129 is more than num_points 128"):
        model_of(tmp_path, "views.num_groups=129")


@pytest.mark.parametrize("encoder", ["{type: mae_vit, patch_size: 1}", "{type: vit, patch_size: 1}"])
def test_an_encoder_of_images_refuses_points(tmp_path, encoder):
    with pytest.raises(RecipeError, match="view 'x' holds points, images are needed"):
        model_of(tmp_path, f"encoder={encoder}")


def test_points_are_not_taken_from_images(tmp_path):
    with pytest.raises(RecipeError, match="view 'x' holds image, encoder 'pointmae' needs points; use views"):
        model_of(tmp_path, "data.source=digits", "views={type: image, img_size: 16}")


# --- masks -----------------------------------------------------------------------------------------------------------


def test_the_random_masker_of_the_core_hides_three_of_five_groups(tmp_path):
    model = model_of(tmp_path)
    step = make_step(model.recipe, torch.arange(8))
    hidden = model.objective.masker(step, {}).masks["x"].hidden
    assert hidden.sum(1).tolist() == [6] * 8
    assert len({tuple(row) for row in hidden.tolist()}) > 4


def test_a_block_is_a_group_and_those_that_are_nearest_to_it(tmp_path):
    model = model_of(tmp_path, "masker={type: group_block, mask_ratio: 0.65}")
    step = make_step(model.recipe, torch.arange(8))
    x = model.views.prepare(None, {"x": random_cloud(batch_size=8)})["x"]
    mask = model.objective.masker(step, {"x": x}).masks["x"]
    mask.validate()
    assert mask.hidden.sum(1).tolist() == [6] * 8  # 6.5 rounded down, as officially
    for centres, hidden in zip(x[:, :, 0], mask.hidden, strict=True):
        distance = (centres[:, None] - centres[None]).norm(dim=-1)
        radius, next_one = distance[:, hidden].amax(1), distance[:, ~hidden].amin(1)
        assert (radius < next_one)[hidden].any()
    assert torch.equal(mask.hidden[3:5], model.objective.masker(
        make_step(model.recipe, torch.arange(3, 5)), {"x": x[3:5]}).masks["x"].hidden)  # fmt: skip


# --- encoder and decoder ---------------------------------------------------------------------------------------------


def with_other_points(x: Tensor, where: Tensor) -> Tensor:
    """x (B, G, 1 + K, 3) with other points, not centres, in the groups `where` (B, G)."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    noise[:, :, 0] = 0
    return x + noise * where[:, :, None, None]


@NORMS
def test_no_token_knows_the_points_of_a_hidden_group(tmp_path, norm):
    model = model_of(tmp_path, f"encoder.norm={norm}")
    encoder, mask = model.objective.encoder.train(), random_mask()
    x = model.views.prepare(None, {"x": random_cloud()})["x"]
    tokens = encoder(x, mask).tokens
    assert tokens.shape == (2, 4, 32)
    assert torch.equal(tokens, encoder(with_other_points(x, mask.hidden), mask).tokens)
    far_away = x.clone()
    far_away[:, :, 0] += 9 * mask.hidden[..., None]
    assert torch.equal(tokens, encoder(far_away, mask).tokens)
    assert not torch.allclose(tokens, encoder(with_other_points(x, ~mask.hidden), mask).tokens, atol=1e-2)


def test_a_prediction_knows_where_hidden_groups_lie_but_not_their_points(tmp_path):
    model = model_of(tmp_path)
    mask = random_mask()
    x = model.views.prepare(None, {"x": random_cloud()})["x"]

    def predict(view: Tensor) -> Pred:
        decoder = model.objective.heads["main"].decoder
        return decoder(model.objective.encoder(view, mask, decoder.ask), mask)

    pred = predict(x)
    assert pred.values.shape == (2, 6, 36)
    assert pred.ids is mask.ids_hidden
    assert torch.equal(pred.values, predict(with_other_points(x, mask.hidden)).values)
    moved = x.clone()
    moved[0, mask.ids_hidden[0, 0], 0] += 1
    changed = (predict(moved).values - pred.values).abs().amax(-1)
    assert changed[0, 0] > 1e-3
    assert not changed[1].any()


def test_a_prediction_is_relative_to_the_centre_of_its_group(tmp_path):
    """Groups of one form at several places are predicted by one set of points."""
    model = model_of(tmp_path)
    head = model.objective.heads["main"]
    form = random_cloud(12, 1)[0]
    centres = random_cloud(10)
    x = torch.cat([centres[:, :, None], form.expand(2, 10, 12, 3)], dim=2)
    nn.init.zeros_(head.decoder.head.weight)
    head.decoder.head.bias.data.copy_(form[torch.randperm(12)].flatten())
    step = make_step(model.recipe, torch.arange(2))
    assert model.objective(step, {"x": x}).losses["main"].item() == 0
    real, visible, completed = head.loss.pictures()["completion"].chunk(3, dim=2)
    assert torch.equal(completed, real)
    assert 0 < visible.sum() < real.sum()


def test_a_masks_own_places_to_predict_are_predicted(tmp_path):
    model = model_of(tmp_path)
    head, mask = model.objective.heads["main"], random_mask()
    x = model.views.prepare(None, {"x": random_cloud()})["x"]
    latent = model.objective.encoder(x, mask, head.decoder.ask)
    target = x[:, :, 1:].flatten(2)
    hidden = head.decoder(latent, mask)
    everywhere = mask.predicting(mask.hidden)
    pred = head.decoder(latent, everywhere)
    assert torch.allclose(pred.at(mask.ids_hidden), hidden.values, atol=1e-6)
    losses = [head.loss(p, target, m, latent).item() for p, m in ((hidden, mask), (pred, everywhere))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert head.loss.pictures()["completion"].shape == (3, 64, 192)


def test_a_decoder_without_centres_or_hidden_groups_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="pointmae_decoder: it stands in for hidden tokens"):
        model_of(tmp_path, "masker=none")


# --- the mini-PointNet's batch norm ----------------------------------------------------------------------------------


def test_batch_norm_is_that_of_torch_in_value_gradient_and_statistics(guest):
    ours, torchs = guest.BatchNorm(4), nn.BatchNorm1d(4)
    rows = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(4)) * 3 + 1
    ours_in, torchs_in = rows.clone().requires_grad_(), rows.flatten(0, 1).requires_grad_()
    a, b = ours(ours_in), torchs(torchs_in)
    assert torch.allclose(a.flatten(0, 1), b, atol=1e-5)
    a.pow(3).sum().backward()
    b.pow(3).sum().backward()
    assert torch.allclose(ours_in.grad.flatten(0, 1), torchs_in.grad, atol=1e-4)
    assert torch.allclose(ours.running_mean, torchs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, torchs.running_var, atol=1e-5)
    assert torch.allclose(ours.eval()(rows).flatten(0, 1), torchs.eval()(rows.flatten(0, 1)), atol=1e-5)


def test_batch_norm_of_two_ranks_is_that_of_one_with_their_rows_together(guest):
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))

    def normalised(part: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
        norm, x = guest.BatchNorm(4), part.clone().requires_grad_()
        norm.world = world
        y = norm(x)
        y.pow(3).sum().backward()
        return y.detach(), x.grad, norm.running_var

    alone = normalised(rows, World())
    ranks = run_ranks(lambda rank: normalised(rows[4 * rank : 4 * rank + 4], World(rank, 2)))
    for whole, parts in zip(alone[:2], zip(*(rank[:2] for rank in ranks), strict=True), strict=True):
        assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert torch.allclose(ranks[0][2], alone[2], atol=1e-6)
    assert torch.equal(ranks[0][2], ranks[1][2])


# --- loss ------------------------------------------------------------------------------------------------------------


def test_the_chamfer_distance_by_hand(guest):
    one = torch.tensor([[0.0, 0.0, 0.0]])
    two = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert guest.chamfer(one, two).item() == pytest.approx(1 + (1 + 4) / 2)


def test_the_chamfer_distance_is_the_formula_written_out(guest):
    a, b = random_cloud(7), random_cloud(5, 4)[2:]
    for x, y, distance in zip(a, b, guest.chamfer(a, b), strict=True):
        pairs = [[sum((float(p[i]) - float(q[i])) ** 2 for i in range(3)) for q in y] for p in x]
        one_way = sum(min(row) for row in pairs) / 7
        other_way = sum(min(column) for column in zip(*pairs, strict=True)) / 5
        assert distance.item() == pytest.approx(one_way + other_way, rel=1e-5)


def test_the_order_of_points_costs_nothing(guest):
    points = random_cloud(20, 1)
    assert guest.chamfer(points, points[:, torch.randperm(20)]).item() == 0


# --- training --------------------------------------------------------------------------------------------------------


def test_the_recipe_is_checked_and_counted_without_a_cloud(tmp_path):
    text = report(load_recipe("pointmae_quickstart", [f"output_dir={tmp_path}"], Registry()), Registry())
    assert "4 of 10 reach the encoder" in text
    assert "800 images (mesh_shapes)" in text


def test_mask_tokens_biases_and_norms_do_not_decay_and_positions_do(tmp_path):
    objective = model_of(tmp_path).objective
    decays = {
        name
        for group in parameter_groups(objective.named_parameters(), exempt_names(objective))
        for name in group["names"]
        if group["decay"]
    }
    assert {"heads.main.decoder.pos_embed.0.weight", "encoder.tokenizer.first.0.weight"} <= decays
    assert not {"heads.main.decoder.mask_token", "encoder.norm.weight", "encoder.blocks.0.mlp.fc1.bias"} & decays


BATCH_NORM = "encoder.norm=batch"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_with_batch_norm_learn_what_one_learns(tmp_path, mode):
    """Its statistics are those of one micro-batch on all ranks, so that there is no accumulation here."""
    alone = run(tmp_path / "alone", SGD, BATCH_NORM)
    options = [SGD, BATCH_NORM, f"train.distributed={mode}", "train.batch_size=4"]
    run_ranks(lambda rank: run(tmp_path / mode, *options))
    together = tmp_path / mode / alone.name
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-5)
    weights = weights_of(together)
    assert {"encoder.tokenizer.first.1.running_mean", "heads.main.decoder.mask_token"} <= weights.keys()
    for name, tensor in weights_of(alone).items():
        assert torch.allclose(weights[name], tensor, rtol=0, atol=2e-6), name


@pytest.mark.slow
def test_a_run_with_batch_norm_block_masks_and_dropped_paths_resumes_to_the_bit(tmp_path):
    options = ["masker=group_block", BATCH_NORM, "encoder.drop_path_rate=0.5"]
    straight = run(tmp_path / "straight", *options)
    registry = RegistryWith()
    registry.listen(CrashAtStep(2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", *options, "checkpoint.every_steps=1", registry=registry)
    resumed = run(tmp_path / "resumed", *options)
    assert losses_of(resumed) == losses_of(straight)
    weights = weights_of(resumed)
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(straight).items())


@pytest.mark.slow
def test_batch_norm_in_bfloat16_stays_near_float32(tmp_path):
    full = losses_of(run(tmp_path / "full", BATCH_NORM))
    half = losses_of(run(tmp_path / "half", BATCH_NORM, "train.precision=bfloat16"))
    assert half == pytest.approx(full, rel=2e-2)
    assert half != full


def best_form(groups: Tensor, guest: ModuleType) -> Tensor:
    """(K, 3): the one set of points that is nearest to groups (n, K, 3), by gradient descent."""
    generator = torch.Generator().manual_seed(6)
    form = nn.Parameter(0.1 * torch.randn(groups.shape[1:], generator=generator))
    optimizer = torch.optim.Adam([form], lr=0.02)
    for _ in range(150):
        some = groups[torch.randint(len(groups), (64,), generator=generator)]
        optimizer.zero_grad()
        guest.chamfer(form.expand_as(some), some).mean().backward()
        optimizer.step()
    return form.detach()


@pytest.mark.slow
def test_shapes_never_seen_are_completed_better_than_by_the_best_single_form(guest, tmp_path):
    """A quarter of the recipe; what the whole of it brings is in the README."""
    options = ["train.epochs=8", "checkpoint={every_epochs: 0}", "log.every_steps=10", "train.device=cpu"]
    recipe = load_recipe("pointmae_quickstart", [*options, f"output_dir={tmp_path}"], Registry())
    run_dir = train(recipe, Registry())
    losses = losses_of(run_dir)
    assert losses[-1] < 0.2 * losses[0]
    [knn] = [line["knn_top1"] for line in read_metrics(run_dir / "metrics.jsonl") if "knn_top1" in line]
    assert knn > 2 / 8
    assert len(list((run_dir / "heads.main.loss.completion").iterdir())) == 1

    loaded = load_run(run_dir)
    known, unknown = (
        torch.cat([loaded.views.prepare(None, batch)["x"] for batch, _ in evaluation_batches(part, loaded.views, 100)])
        for part in loaded.source.evaluation_sources()
    )
    objective, head = loaded.objective.eval(), loaded.objective.heads["main"]
    step = make_step(recipe, torch.arange(len(unknown)))
    masked = objective.masker(step, {"x": unknown})
    mask, target = masked.masks["x"], head.target(step, masked)
    form = best_form(known[:, :, 1:].flatten(0, 1), guest).flatten()
    with torch.no_grad():
        latent = objective.encode(Masked({"x": mask}, {"x": unknown}))
        pred = head.decoder(latent, mask)
        loss = head.loss(pred, target, mask, latent)
        of_form = head.loss(replace(pred, values=form.expand_as(pred.values)), target, mask, latent)
        others = replace(latent, tokens=latent.tokens.roll(1, 0))
        of_others = head.loss(head.decoder(others, mask), target, mask, latent)
    assert loss < 0.8 * of_form
    assert loss < 0.98 * of_others  # what is visible helps, beyond the centres that the decoder knows anyway
