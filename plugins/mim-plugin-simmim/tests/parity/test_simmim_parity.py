"""Our SimMIM against numbers that the official implementation computed (microsoft/SimMIM d3e29bc, timm 0.4.12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mim_plugin_simmim import SimMIMViT, SwinEncoder
from mim_plugin_simmim.checkpoints import OfficialSwinCheckpoint, OfficialViTCheckpoint, head_to_official
from parity.harness import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    Case,
    cases,
    check_gradients,
    check_optimizer_steps,
    check_rules,
    check_weights,
    fine_tuning_rules,
    imported_case,
    named,
    of_committed_cases,
    read,
    read_json,
    relative,
    small_encoder,
)
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pixel_shuffle

from mim_framework.assembly.builder import build_model, exempt_names
from mim_framework.assembly.preflight import make_step
from mim_framework.base.schedule import epoch_of, value_at
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Masked
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.optim import OptimSection, parameter_groups

CASES = cases("simmim-*_*.safetensors")
SCHEDULES = read_json("simmim_schedule.json")

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    tensors, metadata = read(request.param)
    config = metadata["config"]
    is_vit = metadata["method"] == "simmim-vit"
    layout = OfficialViTCheckpoint() if is_vit else OfficialSwinCheckpoint()
    options = {"encoder.num_heads": config["num_heads"], "views.img_size": config["img_size"]}
    case = imported_case(
        request.param,
        tmp_path,
        our_names=layout.import_state,
        options=options | ({} if is_vit else {"encoder.window_size": config["window_size"]}),
        changes={"masker": {"mask_ratio": config["mask_ratio"], "mask_patch_size": config["mask_patch_size"]}},
    )
    official = tensors["input/mask"]
    grid = Grid(tuple(official.shape[1:]))
    step = make_step(case.model.recipe, torch.arange(config["batch_size"]))
    unit = case.model.objective.masker.spec.grid
    factor = grid.shape[0] // unit.shape[0]
    coarse = official[:, ::factor, ::factor].flatten(1).bool()
    mask = Mask(coarse, unit, equal=True)
    assert torch.equal(mask.at(grid).hidden, official.flatten(1).bool())
    assert mask.num_hidden == case.model.objective.masker.spec.num_hidden
    case.mask_with(Masked({"x": mask}, {"x": case.images}), step)
    return case


@of_committed_cases
def test_official_cases_are_committed():
    assert {path.stem.partition("_")[0] for path in CASES} == {"simmim-vit", "simmim-swin"}


def test_imported_weights_are_those_of_the_file_and_exported_again(case: Case):
    is_swin = isinstance(case.model.objective.encoder, SwinEncoder)
    layout = OfficialSwinCheckpoint() if is_swin else OfficialViTCheckpoint()
    check_weights(case, layout, computed=["relative_position_index", "attn_mask"])


def test_index_buffers_are_the_official_ones(case: Case):
    ours = {name.replace("swin.", "encoder."): b for name, b in case.model.objective.encoder.named_buffers()}
    ours |= {f"encoder.{name}": buffer for name, buffer in case.model.objective.encoder.named_buffers()}
    official = named(case.tensors, "param")
    indices = [name for name in official if name.endswith("relative_position_index")]
    assert indices
    for name in indices:
        assert torch.equal(ours[name], official[name]), name
    for name in (name for name in official if name.endswith("attn_mask")):
        assert torch.equal(ours[name] < 0, official[name] < 0), name


def everywhere(case: Case) -> Tensor:
    """Our prediction of all pixels as an image, (B, 3, H, W)."""
    objective = case.model.objective
    decoder = objective.heads["main"].decoder
    latent = objective.encoder(case.images, case.mask)
    weight, bias = (head_to_official(getattr(decoder.head, part)) for part in ("weight", "bias"))
    cells = latent.tokens.transpose(1, 2).unflatten(2, latent.grid.shape)
    return pixel_shuffle(nn.functional.conv2d(cells, weight, bias), objective.encoder.spec.stride[0])


def test_latents_and_predictions_are_those_of_the_official_code(case: Case):
    objective = case.model.objective
    encoder = objective.encoder
    latent = encoder(case.images, case.mask, Ask(layers=frozenset(range(encoder.spec.depth))))
    tokens = latent.tokens.transpose(1, 2).unflatten(2, latent.grid.shape)
    assert relative(tokens, case.tensors["out/latent"]) < OUTPUT_TOLERANCE
    assert relative(everywhere(case), case.tensors["out/pred"]) < OUTPUT_TOLERANCE
    if isinstance(encoder, SwinEncoder):
        return
    for name, official in named(case.tensors, "mid").items():
        if name.startswith("encoder.blocks."):
            assert relative(latent.layers[int(name.split(".")[2])][:1], official) < OUTPUT_TOLERANCE, name
        if name == "encoder.rel_pos_bias":
            assert relative(encoder.rel_pos_bias()[0], official) < OUTPUT_TOLERANCE


def test_every_swin_block_gives_what_the_official_one_does(case: Case):
    """`layers.S` of the official code ends with the merging that begins our next stage."""
    encoder = case.model.objective.encoder
    if not isinstance(encoder, SwinEncoder):
        return
    seen: dict[str, Tensor] = {}
    for stage, module in enumerate(encoder.swin.layers):
        module.downsample.register_forward_hook(
            lambda _, __, out, s=stage: seen.update({f"encoder.layers.{s - 1}": out.flatten(1, 2)})
        )
        for number, block in enumerate(module.blocks):
            place = f"encoder.layers.{stage}.blocks.{number}"
            block.register_forward_hook(lambda _, __, out, p=place: seen.update({p: out.flatten(1, 2)}))
    encoder.swin.patch_embed.register_forward_hook(
        lambda _, __, out: seen.update({"encoder.patch_embed": out.flatten(1, 2)})
    )
    encoder(case.images, case.mask)
    middle = named(case.tensors, "mid")
    compared = middle.keys() & seen.keys()
    assert len(compared) >= 3
    for name in compared:
        assert relative(seen[name][:1], middle[name]) < OUTPUT_TOLERANCE, name


def test_loss_at_hidden_cells_only_is_the_official_one(case: Case):
    official = case.tensors["out/loss"].item()
    assert abs(case.loss().item() - official) < OUTPUT_TOLERANCE * official


def test_gradients_are_those_of_the_official_code(case: Case):
    head = "decoder.0.weight"  # of which a file may hold the first rows, in the official order
    rows = case.tensors.get(f"gradslice/{head}")
    case.tensors = {name: tensor for name, tensor in case.tensors.items() if name != f"gradslice/{head}"}
    check_gradients(case)
    if rows is not None:
        ours = head_to_official(case.model.objective.heads["main"].decoder.head.weight.grad)
        assert relative(ours[: len(rows)], rows) < GRADIENT_TOLERANCE


def test_three_optimizer_steps_end_at_the_official_weights(case: Case):
    check_optimizer_steps(case)


@torch.no_grad()
def test_features_for_fine_tuning_are_those_of_the_official_code(case: Case):
    if "extra/finetune_pooled" not in case.tensors:
        pytest.skip("the official remapping needs a shared table")
    encoder = case.model.objective.encoder.eval()
    last = encoder.spec.depth - 1
    latent = encoder(case.images, Mask.none(len(case.images), encoder.spec.grid), Ask(layers=frozenset({last})))
    pooled = latent.pooled()
    if not isinstance(encoder, SwinEncoder):  # a new norm after the mean instead of the pre-trained one before it
        pooled = layer_norm(latent.layers[last][:, 1:].mean(1), (encoder.spec.dim,), eps=1e-6)
    assert relative(pooled, case.tensors["extra/finetune_pooled"]) < OUTPUT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("fault", ["norm eps", "tanh GELU", "mask elsewhere", "no shift mask"])
def test_a_wrong_implementation_would_be_found(case: Case, fault: str):
    encoder = case.model.objective.encoder
    shifted = [b for b in encoder.repeated_blocks() if getattr(b, "attn_mask", None) is not None]
    if fault == "no shift mask" and not shifted:
        pytest.skip("no shifted windows in this case")
    for module in encoder.modules():
        if fault == "norm eps" and isinstance(module, nn.LayerNorm):
            module.eps = 1e-6 if module.eps == 1e-5 else 1e-5
        if fault == "tanh GELU" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    for block in shifted if fault == "no shift mask" else ():
        block.attn_mask.zero_()
    if fault == "mask elsewhere":
        case.mask_with(Masked({"x": Mask(case.mask.hidden.roll(1, 1), case.mask.grid, equal=True)}, {}), case.step)
    assert relative(everywhere(case), case.tensors["out/pred"]) > 5 * OUTPUT_TOLERANCE


# --- the recipe around the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES["schedules"], ids=lambda s: s["setting"]["scheduler"])
def test_the_learning_rate_of_every_iteration_is_the_official_one(schedule: dict[str, Any]):
    """The official loop sets the rate after a step, from the number of that micro-step."""
    setting = schedule["setting"]
    scale, accum = setting["scale"], max(1, setting["accumulation_steps"])
    shape = {"multistep": "step"}.get(setting["scheduler"], setting["scheduler"])
    milestones = setting["multisteps_epochs"]
    if setting["scheduler"] == "step":
        milestones = range(setting["decay_epochs"], setting["epochs"], setting["decay_epochs"])
    end = {"cosine": setting["min_lr"] * scale, "linear": 0.01 * setting["base_lr"] * scale}.get(shape, 0.0)
    section = OptimSection(
        base_lr=setting["base_lr"], lr_per_images=512, shape=shape, warmup_epochs=setting["warmup_epochs"],
        warmup_lr=setting["warmup_lr"] * scale, min_lr=end, milestones=tuple(milestones), gamma=setting["gamma"],
        lag_steps=1 / accum, counted_from="run_start" if shape == "cosine" else "warmup_end",
    )  # fmt: skip
    curve = section.lr_curve(total_batch_size=round(512 * scale))
    steps_per_epoch = setting["iters_per_epoch"] // accum
    rates = []
    for index in range(setting["epochs"] * steps_per_epoch):
        epoch = epoch_of(index, steps_per_epoch)
        rates += [value_at(curve, epoch, setting["epochs"], steps_per_epoch)] * accum
    assert rates == pytest.approx(schedule["lr_per_iteration"], rel=1e-12)
    assert accum > 1 or rates[0] == rates[1]  # the first two steps share a rate


@pytest.mark.parametrize("official", SCHEDULES["finetune_layer_decay"], ids=lambda case: case["encoder"])
def test_layer_decay_is_exactly_the_official_one(official: dict[str, Any]):
    """The names of the official fine-tuning are those of its checkpoints without `encoder.`."""
    if official["encoder"] == "vit":
        layout = OfficialViTCheckpoint()
        options = {"depth": official["depth"], "num_heads": 2, "relative_bias": "per_block", "position": "learned"}
        encoder = small_encoder(SimMIMViT, embed_dim=16, **options)
    else:
        layout = OfficialSwinCheckpoint()
        options = {"depths": official["depths"], "num_heads": (1, 2), "window_size": 4, "absolute_position": True}
        encoder = small_encoder(SwinEncoder, embed_dim=16, decay_bias_tables=False, **options)

    def our_name(name: str) -> str:
        in_head = name.startswith(("head.", "fc_norm."))
        return name if in_head else layout.our_name(f"encoder.{name}").removeprefix("encoder.")

    check_rules(fine_tuning_rules(encoder, official), official, rename=our_name)


@pytest.mark.parametrize("group", SCHEDULES["pretrain_param_groups"])
def test_decay_groups_of_pre_training_are_exactly_the_official_ones(group: str, tmp_path: Path):
    """In the cases' sizes; the sane alternative exempts the tables too."""
    official = SCHEDULES["pretrain_param_groups"][group]
    layout = OfficialViTCheckpoint() if group.startswith("vit") else OfficialSwinCheckpoint()
    rename = lambda names: set(layout.import_state(dict.fromkeys(names)))  # noqa: E731
    wanted = rename(official["weight_decay_keys"]), rename(official["no_weight_decay"])
    assert any(name.endswith("bias_table") for name in wanted[0])
    objective = build_model(recipe_of(official, group, tmp_path), Registry()).objective
    groups = {
        g["decay"]: set(g["names"]) for g in parameter_groups(objective.named_parameters(), exempt_names(objective))
    }
    assert (groups[True], groups[False]) == wanted
    objective.encoder.config = objective.encoder.config.model_copy(update={"decay_bias_tables": False})
    assert {name for name in wanted[0] if name.endswith("bias_table")} <= exempt_names(objective)


def recipe_of(official: dict[str, Any], group: str, folder: Path) -> Recipe:
    names = official["weight_decay_keys"] + official["no_weight_decay"]
    if group.startswith("vit"):
        depth = 1 + max(int(name.split(".")[2]) for name in names if ".blocks." in name)
        encoder = {"type": "simmim_vit", "embed_dim": 16, "num_heads": 2, "depth": depth, "patch_size": 16}
        if "abs_pos" in group:
            encoder |= {"position": "learned", "relative_bias": "per_block"}
        if not any("gamma" in name for name in names):
            encoder["layer_scale"] = 0
    else:
        stages = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("encoder.layers."))
        depths = [
            1 + max(int(name.split(".")[4]) for name in names if name.startswith(f"encoder.layers.{s}.blocks."))
            for s in range(stages)
        ]
        encoder = {
            "type": "simmim_swin", "embed_dim": 8, "depths": depths, "num_heads": [1] * stages, "window_size": 2,
            "absolute_position": "ape" in group,
        }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "decay",
            "data": {"source": {"type": "folder", "root": str(folder)}},
            "views": {"type": "image", "img_size": 64},
            "masker": "random",
            "encoder": encoder,
            "target": "pixels",
            "decoder": "linear",
            "loss": "l1",
            "optim": {"lr": 1e-3},
            "train": {"total_batch_size": 2, "steps": 1},
        }
    )
