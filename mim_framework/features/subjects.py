"""From what a user names to an encoder: a run, a checkpoint of it, an import, an export, or a model of timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_framework.assembly.opened import LoadedEncoder, Origin, load_encoder, method_of, parts_of
from mim_framework.assembly.trained import IMPORTED_SLOTS, imported_slots
from mim_framework.assembly.weights import load_tensors, named_part, some
from mim_framework.base.errors import CheckpointError, MimError, RecipeError, did_you_mean
from mim_framework.base.paths import local_path
from mim_framework.base.section import Choice
from mim_framework.checkpoints.checkpoint import IMPORTED_WEIGHTS, load_weights
from mim_framework.contract.components import Encoder, ViewBuilder
from mim_framework.contract.mask import Mask
from mim_framework.contract.specs import Specs
from mim_framework.convert.importing import read_export
from mim_framework.registry.registry import Registry
from mim_framework.runtime.launch import choose_device

TIMM = "timm:"
TIMM_WAYS = "timm:NAME, timm:NAME,checkpoint=FILE.safetensors or timm:NAME,random; img_size=N may follow"
SUBJECTS = (
    "a run directory, a checkpoint folder inside one, a folder of `mim import`, a file of `mim export` or timm:NAME"
)
UNUSED_WITHOUT_A_MASK = "mask_token"
"""Last part of the name of what stands for hidden patches. Other code has no place for it, so that exports lack it; of
images of which nothing is hidden it is not used."""


def open_encoder(
    subject: str | Path, *, device: str | torch.device | None = None, registry: Registry | None = None
) -> LoadedEncoder:
    """The encoder that a subject names, with views that prepare images as it saw them in training.

    - a run directory, of which the newest whole checkpoint counts, or a checkpoint folder inside one;
    - a folder that `mim import` wrote, or its `weights.safetensors`;
    - a file that `mim export` wrote, of any layout: it says what it holds, so that nothing is guessed;
    - `timm:NAME` with a name of timm such as `vit_base_patch16_224.mae`, and its published weights; or
      `timm:NAME,checkpoint=FILE.safetensors` with those of a file; or `timm:NAME,random` as it is drawn. `img_size=N`
      after a further comma gives another size than timm states for the weights.

    Args:
        device: by default the one of the run's recipe if this machine has it, else the first of cuda, mps and cpu.

    Raises:
        RecipeError: if it names nothing of these, or the device is not there.
        CheckpointError: if its weights cannot be had, are damaged, or do not fill the encoder.
    """
    registry = registry or Registry()
    wanted = None if device is None else _device(device)
    text = str(subject)
    if text.startswith(TIMM):
        opened = _open_timm(text, registry)
    else:
        opened = _open_path(text, registry)
    if wanted is not None and wanted != opened.device:
        opened.trained.to(wanted)
        opened.device = wanted
    return opened


def _device(wanted: str | torch.device) -> torch.device:
    try:
        device = choose_device("auto") if wanted == "auto" else torch.device(wanted)
        if device.type in ("cuda", "mps", "cpu") and device.index is None:
            device = choose_device(device.type)
        torch.empty(0, device=device)
    except (MimError, RuntimeError, AssertionError) as error:
        there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise RecipeError(f"device '{wanted}' is not there; this machine has {', '.join(there)}") from error
    return device


def _open_path(subject: str, registry: Registry) -> LoadedEncoder:
    try:
        path = Path(local_path(subject))
    except ValueError as error:
        raise RecipeError(f"{subject}: {error}") from error
    if (path / "recipe.yaml").is_file():
        return load_encoder(path, registry=registry)
    if path.is_dir() and path.parent.name == "checkpoints" and (path.parent.parent / "recipe.yaml").is_file():
        return load_encoder(path.parent.parent, checkpoint=path, registry=registry)
    folder = path.parent if path.name == IMPORTED_WEIGHTS and path.is_file() else path
    if (folder / IMPORTED_SLOTS).is_file():
        return _open_import(subject, folder, registry)
    if path.is_file():
        return _open_export(subject, path, registry)
    raise RecipeError(f"{subject} {_why_not(subject, path)}. An encoder is named by {SUBJECTS}")


def _why_not(subject: str, path: Path) -> str:
    if path.is_dir():
        return "is a folder without a recipe.yaml or slots.yaml"
    import timm

    return f"does not exist; timm:{subject} is the model of timm" if timm.is_model(subject) else "does not exist"


def _open_import(subject: str, folder: Path, registry: Registry) -> LoadedEncoder:
    encoder_choice, views_choice, slots = imported_slots(folder / IMPORTED_SLOTS)
    views, draw = _drawn_from(subject, views_choice, encoder_choice, registry)
    encoder = draw()
    _fill(encoder, named_part(load_weights(folder / IMPORTED_WEIGHTS), "encoder.", folder), folder)
    origin = Origin(subject, "import", encoder.name, method_of(parts_of(slots), registry))
    device = choose_device("auto")
    return LoadedEncoder(encoder.to(device), views, device, origin, draw=draw)


def _open_export(subject: str, file: Path, registry: Registry) -> LoadedEncoder:
    model, weights, record = read_export(file, registry)
    encoder = model.objective.encoder
    if encoder is None:
        raise CheckpointError(f"{subject} holds objective '{model.objective.name}', which has no encoder to judge")
    _fill(encoder, named_part(weights, "encoder.", file), file)
    _, draw = _drawn_from(subject, model.recipe.views, model.recipe.encoder, registry)
    method = method_of(parts_of(record.slots), registry)
    origin = Origin(subject, "export", encoder.name, method, record.run, record.step, record.images_seen)
    device = choose_device("auto")
    return LoadedEncoder(encoder.to(device), model.views, device, origin, draw=draw)


def _fill(encoder: Encoder, weights: dict[str, Tensor], path: Path) -> None:
    """
    Raises:
        CheckpointError: if the weights do not fit, or lack any that are used where nothing is hidden.
    """
    missing = load_tensors(encoder, weights, path)
    if lacking := [name for name in missing if name.rpartition(".")[2] != UNUSED_WITHOUT_A_MASK]:
        raise CheckpointError(f"{path} lacks {some(lacking)} of encoder '{encoder.name}'")


def _drawn_from(
    subject: str, views: Choice, encoder: Choice, registry: Registry
) -> tuple[ViewBuilder, Callable[[], Encoder]]:
    """The views of two slots, and what draws the encoder for them, each time the same."""
    views_cls, views_config = registry.resolve("views", views)
    encoder_cls, encoder_config = registry.resolve("encoder", encoder)
    try:
        built = views_cls(views_config)
    except ValueError as error:
        raise RecipeError(f"{subject}: views '{views.type}': {error}") from error

    def draw() -> Encoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                return encoder_cls(encoder_config, Specs(views=dict(built.specs)))
            except ValueError as error:
                raise RecipeError(f"{subject}: encoder '{encoder.type}': {error}") from error

    return built, draw


# --- timm ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimmName:
    """`timm:NAME,random,checkpoint=FILE,img_size=N`, taken apart."""

    model: str
    random: bool = False
    checkpoint: str | None = None
    img_size: int | None = None

    @classmethod
    def read(cls, subject: str) -> TimmName:
        """
        Raises:
            RecipeError: naming the part that is wrong.
        """
        model, *parts = subject.removeprefix(TIMM).split(",")
        found: dict[str, str] = {}
        for part in parts:
            key, _, value = part.partition("=")
            if key not in ("random", "checkpoint", "img_size") or (key == "random") == bool(value):
                raise RecipeError(f"{subject}: '{part}' is no option; write {TIMM_WAYS}")
            found[key] = value
        size = found.get("img_size", "1")
        if not size.isdecimal() or not int(size):
            raise RecipeError(f"{subject}: img_size is a number of pixels, got '{size}'")
        if "random" in found and "checkpoint" in found:
            raise RecipeError(f"{subject}: random and checkpoint={found['checkpoint']} exclude each other")
        return cls(model, "random" in found, found.get("checkpoint"), int(size) if "img_size" in found else None)


def _open_timm(subject: str, registry: Registry) -> LoadedEncoder:
    import timm

    name = TimmName.read(subject)
    if not timm.is_model(name.model):
        known = did_you_mean(name.model.partition(".")[0], timm.list_models())
        raise RecipeError(f"{subject}: timm knows no model '{name.model}'{known}; write {TIMM_WAYS}")
    views = Choice.model_validate({"type": "image", **_timm_views(subject, name)})
    options: dict[str, Any] = {"type": "timm", "model": name.model}
    built, draw = _drawn_from(subject, views, Choice.model_validate(options), registry)
    device = choose_device("auto")
    drawn = draw()
    _check_tokens(subject, drawn, built)
    if name.random:
        return LoadedEncoder(drawn.to(device), built, device, Origin(subject, "random", name.model))
    options |= {"pretrained": True} if name.checkpoint is None else {"checkpoint": name.checkpoint}
    encoder = _drawn_from(subject, views, Choice.model_validate(options), registry)[1]()
    try:
        encoder.load_published()
    except ValueError as error:
        ways = (
            f"name a file of timm's weights, timm:{name.model},checkpoint=FILE.safetensors; fill timm's cache where "
            f"there is internet and set HF_HOME to it; or write timm:{name.model},random, if a random network is meant"
        )
        why = str(error) if name.checkpoint is not None else f"its weights cannot be had ({_cause(error)})"
        raise CheckpointError(f"{subject}: {why}. {ways[0].upper()}{ways[1:]}") from error
    return LoadedEncoder(encoder.to(device), built, device, Origin(subject, "timm", name.model), draw=draw)


def _check_tokens(subject: str, encoder: Encoder, views: ViewBuilder) -> None:
    """One pass, as only that shows how a model of timm lays out its tokens.

    Raises:
        RecipeError: if they are no grid.
    """
    image = views.prepare(None, views.example(1))
    try:
        with torch.no_grad():
            encoder.eval().encode(image, {"x": Mask.none(1, encoder.spec.grid)})
    except ValueError as error:
        raise RecipeError(f"{subject}: {error}") from error


def _timm_views(subject: str, name: TimmName) -> dict[str, Any]:
    """Options of the views that show images as timm states it for the weights."""
    import timm
    from timm.data import resolve_data_config

    try:
        published = timm.get_pretrained_cfg(name.model)
    except RuntimeError as error:
        architecture = name.model.partition(".")[0]
        tags = timm.list_models(f"{architecture}.*", pretrained=True) or [architecture]
        raise RecipeError(f"{subject}: timm has no such weights of '{architecture}', but {', '.join(tags)}") from error
    if published is None:
        raise RecipeError(f"{subject}: timm does not state for which images '{name.model}' was made")
    seen = resolve_data_config(pretrained_cfg=published.to_dict())
    size = list(seen["input_size"][1:]) if name.img_size is None else name.img_size
    return {"img_size": size} | {key: seen[key] for key in ("mean", "std", "interpolation")}


def _cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
