"""Our MaskFeat against numbers of two official implementations: SlowFast (287ec007) and mmpretrain (ee7f2e88).

Every `maskfeat_*`, `maskfeat-mm_*` and `hog_*.safetensors` in `MIM_PARITY_DIR` is one case; by default those committed
beside this file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mim_plugin_maskfeat import MaskFeatViT
from mim_plugin_maskfeat.checkpoints import MMPretrainCheckpoint, OfficialCheckpoint
from mim_plugin_maskfeat.hog import gaussian_kernel, histogram_by_bins, hog, orientations
from parity.harness import (
    OUTPUT_TOLERANCE,
    Case,
    cases,
    check_gradients,
    check_optimizer_steps,
    check_rules,
    fine_tuning_rules,
    imported_case,
    named,
    of_committed_cases,
    read,
    read_json,
    relative,
    small_encoder,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from mim_framework.assembly.builder import exempt_names
from mim_framework.assembly.preflight import make_step
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent, Masked
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import OptimSection

CASES = cases("maskfeat_*.safetensors") + cases("maskfeat-mm_*.safetensors")
HOG_CASES = cases("hog_*.safetensors")
HOG_TOLERANCE = 1e-5  # absolute

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    metadata = read(request.param)[1]
    config, is_slowfast = metadata["config"], metadata["method"] == "maskfeat"
    case = imported_case(
        request.param,
        tmp_path,
        our_names=(OfficialCheckpoint if is_slowfast else MMPretrainCheckpoint)().import_state,
        options={"encoder.num_heads": config["num_heads"]},
        changes={},
        container="model_state" if is_slowfast else "state_dict",
    )
    hidden = case.tensors["input/mask"].flatten(1).bool()
    # SlowFast's masks stop short, those of mmpretrain hide a fixed number
    mask = Mask(hidden, case.model.objective.masker.spec.grid, equal=not is_slowfast)
    step = make_step(case.model.recipe, torch.arange(config["batch_size"]))
    case.mask_with(Masked({"x": mask}, {"x": case.images}), step)
    return case


def everywhere(case: Case) -> Mask:
    return case.mask.predicting(torch.ones_like(case.mask.hidden))


def sequence(latent: Latent) -> Tensor:
    assert latent.prefix is not None
    return torch.cat([latent.prefix, latent.tokens], dim=1)


@of_committed_cases
def test_official_cases_are_committed():
    assert {path.stem.partition("_")[0] for path in CASES} == {"maskfeat", "maskfeat-mm"}
    assert HOG_CASES


# --- HOG -------------------------------------------------------------------------------------------------------------


def in_patches(cells: Tensor) -> Tensor:
    """(1, 3, bins, 28, 28) -> (1, 196, 108), written down by index: ((colour * bins + bin) * 2 + row) * 2 + column."""
    corners = [cells[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.stack(corners, dim=3).flatten(1, 3).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("path", HOG_CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("flat_threshold", [0.0, 3e-6])
def test_hog_is_that_of_both_official_implementations(path: Path, flat_threshold: float):
    tensors = load_file(path)
    images = tensors["input/image_u8"] if "input/image_u8" in tensors else tensors["input/image"]
    ours = hog(images, flat_threshold=flat_threshold)
    assert (ours - tensors["out/slowfast_cells"]).abs().max() < HOG_TOLERANCE
    assert (in_patches(ours) - tensors["out/slowfast"]).abs().max() < HOG_TOLERANCE
    weighted = hog(images, gaussian_window=16, flat_threshold=flat_threshold)
    assert (in_patches(weighted) - tensors["out/mmpretrain"]).abs().max() < HOG_TOLERANCE
    by_bins = normalize(histogram_by_bins(*orientations(images.float(), 9, flat_threshold, None), 9, 8), dim=2)
    assert (by_bins - tensors["out/slowfast_cells"]).abs().max() < HOG_TOLERANCE


@pytest.mark.parametrize("path", [p for p in HOG_CASES if "float" not in p.stem], ids=lambda path: path.stem)
def test_hog_of_the_normalised_image_is_exactly_that_of_its_8_bit_pixels(path: Path):
    """Where the official code keeps 0 to 91 % of the cells (`extra/robust_cells`), all are kept here."""
    tensors = load_file(path)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    normalised = tensors["input/image_u8"].float().mul(1 / (255 * std)).add(-mean / std)
    error = (hog(normalised, flat_threshold=3e-6) - tensors["out/slowfast_cells"]).abs()
    assert error.max() < HOG_TOLERANCE
    assert not tensors["extra/robust_cells"].all()


def test_the_filters_and_the_window_of_the_official_code_are_ours(case: Case):
    filters = {name: tensor for name, tensor in named(case.tensors, "param").items() if "weight_" in name}
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    assert len(filters) == 2
    for name, tensor in filters.items():
        assert torch.equal(tensor[:, 0], (sobel if name.endswith("x") else sobel.t()).expand(3, 3, 3))
    if "param/target_generator.gaussian_kernel" in case.tensors:
        assert torch.equal(gaussian_kernel(16), case.tensors["param/target_generator.gaussian_kernel"])


def test_hog_targets_are_those_of_the_official_code(case: Case):
    target = case.model.objective.heads["main"].target
    official = case.tensors["out/hog_all"] if "out/hog_all" in case.tensors else case.tensors["out/target"]
    ours = target(case.step, Masked({"x": everywhere(case)}, {"x": case.images})).values
    assert ours.shape == official.shape
    assert (ours - official).abs().max() < HOG_TOLERANCE


# --- model -----------------------------------------------------------------------------------------------------------


def test_imported_weights_are_bitwise_those_of_the_file(case: Case):
    state, weights = case.model.objective.state_dict(), case.group("param")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_latents_and_predictions_are_those_of_the_official_code(case: Case):
    objective = case.model.objective
    encoder, decoder = objective.encoder, objective.heads["main"].decoder
    seen: dict[str, Tensor] = {}
    encoder.patch_embed.register_forward_hook(lambda module, args, out: seen.update(patch_embed=out))
    latent = encoder(case.images, case.mask, Ask(layers=frozenset(range(encoder.spec.depth))))
    assert relative(sequence(latent), case.tensors["out/latent"]) < OUTPUT_TOLERANCE
    if "out/latent_norm" in case.tensors:
        assert relative(decoder.norm(sequence(latent)), case.tensors["out/latent_norm"]) < OUTPUT_TOLERANCE
    seen |= {f"blocks.{i}": layer for i, layer in latent.layers.items()}
    middle = case.our_names(named(case.tensors, "mid"))
    assert {name.removeprefix("encoder.") for name in middle} == seen.keys()
    for name, tensor in middle.items():
        assert relative(seen[name.removeprefix("encoder.")][:1], tensor) < OUTPUT_TOLERANCE, name

    pred = decoder(latent, everywhere(case))
    official = case.tensors["out/pred_all"] if "out/pred_all" in case.tensors else case.tensors["out/pred"]
    assert relative(pred.values, official) < OUTPUT_TOLERANCE
    if "out/pred_all" in case.tensors:
        assert relative(pred.values[case.mask.hidden], case.tensors["out/pred"]) < OUTPUT_TOLERANCE


def test_the_loss_is_that_of_the_official_code(case: Case):
    official = case.tensors["out/loss"]
    assert relative(case.loss(), official) < OUTPUT_TOLERANCE


def test_gradients_are_those_of_the_official_code(case: Case):
    check_gradients(case)


def test_three_optimizer_steps_end_at_the_official_weights(case: Case):
    official = case.metadata["method"] == "maskfeat"
    assert exempt_names(case.model.objective) == (set() if official else {"encoder.mask_token"})
    check_optimizer_steps(case)


@torch.no_grad()
def test_features_for_fine_tuning_are_those_of_the_official_code(case: Case):
    encoder = case.model.objective.encoder.eval()
    last = encoder.spec.depth - 1
    latent = encoder(case.images, Mask.none(len(case.images), encoder.spec.grid), Ask(layers=frozenset({last})))
    pooled = latent.layers[last][:, 1:].mean(1)
    pooled = layer_norm(pooled, pooled.shape[-1:], eps=1e-6)
    assert relative(pooled, case.tensors["extra/finetune_pooled"]) < OUTPUT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("fault", ["norm eps 1e-5", "tanh GELU", "mask token after positions", "no mask"])
def test_a_wrong_implementation_would_be_found(case: Case, fault: str):
    encoder, decoder = case.model.objective.encoder, case.model.objective.heads["main"].decoder
    for module in case.model.objective.modules():
        if fault == "norm eps 1e-5" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    mask = Mask.none(len(case.images), case.mask.grid) if fault == "no mask" else case.mask
    if fault == "mask token after positions":
        encoder.mask_token -= encoder.pos_embed[:, 1:2]
    pred = decoder(encoder(case.images, mask), everywhere(case))
    official = case.tensors["out/pred_all"] if "out/pred_all" in case.tensors else case.tensors["out/pred"]
    assert relative(pred.values, official) > 5 * OUTPUT_TOLERANCE


def test_a_wrong_hog_would_be_found(case: Case):
    target = case.model.objective.heads["main"].target
    official = case.tensors["out/hog_all"] if "out/hog_all" in case.tensors else case.tensors["out/target"]
    other = 0 if target.config.gaussian_window else 16
    cells = {"cell_size": target.cell_size, "gaussian_window": target.config.gaussian_window}
    for images, options in (
        (case.images, cells | {"gaussian_window": other}),
        (case.images.transpose(2, 3).contiguous(), cells),
        (case.images.flip(1), cells),
    ):
        wrong = hog(images, **options)
        split = target.cells_per_side
        wrong = wrong.unflatten(4, (-1, split)).unflatten(3, (-1, split)).permute(0, 3, 5, 1, 2, 4, 6)
        assert (wrong.reshape(official.shape) - official).abs().max() > 1000 * HOG_TOLERANCE


# --- schedules and groups --------------------------------------------------------------------------------------------


def test_the_learning_rate_of_every_iteration_is_the_official_one():
    for schedule in read_json("maskfeat_schedule.json")["schedules"]:
        setting = schedule["setting"]
        section = OptimSection(
            lr=setting["base_lr"],
            warmup_epochs=setting["warmup_epochs"],
            warmup_lr=setting["warmup_start_lr"],
            min_lr=setting["cosine_end_lr"],
        )
        curve, per_epoch = section.lr_curve(total_batch_size=1), setting["iters_per_epoch"]
        ours = [
            value_at(curve, epoch_of(i, per_epoch), setting["epochs"], per_epoch)
            for i in range(setting["epochs"] * per_epoch)
        ]
        assert ours == pytest.approx(schedule["lr_per_iteration"], rel=1e-12)


def test_the_recipe_has_the_official_rates():
    optim = load_recipe("maskfeat", [], Registry()).optim
    setting = read_json("maskfeat_schedule.json")["schedules"][0]["setting"]
    assert optim.peak_lr(2048) == pytest.approx(setting["base_lr"])
    assert (optim.warmup_lr, optim.min_lr) == (setting["warmup_start_lr"], setting["cosine_end_lr"])
    official = read_json("maskfeat_schedule.json")["pretrain_param_groups"]
    ours = {"betas": list(optim.betas), "eps": optim.eps, "clip_grad_norm": optim.clip_grad_norm}
    assert ours | {"weight_decay": optim.weight_decay} == {key: official[key] for key in (*ours, "weight_decay")}


@pytest.mark.parametrize("index", [0, 1])
def test_layer_decay_and_decay_groups_of_fine_tuning_are_exact(index: int):
    official = read_json("maskfeat_schedule.json")["finetune_layer_decay"]["cases"][index]
    encoder = small_encoder(MaskFeatViT, final_norm=True, embed_dim=16, num_heads=2, depth=official["depth"])
    ours = fine_tuning_rules(encoder, official)
    check_rules(ours, official, rate="layer_decay", rename=lambda name: name.replace("head.projection.", "head."))
