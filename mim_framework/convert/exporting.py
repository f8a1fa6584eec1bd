"""A run's weights in the layout of another code base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.weights import load_tensors
from mim_framework.base.errors import CheckpointError
from mim_framework.base.files import replacing
from mim_framework.checkpoints.checkpoint import find_latest
from mim_framework.contract.components import CheckpointFormat, Objective
from mim_framework.convert.classifiers import classifier_of, timm_options, with_classifier
from mim_framework.convert.records import RECORD, ExportRecord
from mim_framework.recipe.draft import load_written
from mim_framework.registry.registry import Registry

SUFFIX_OF = {"official": ".pth"}
"""Official code reads what `torch.save` writes; every other layout becomes a safetensors file."""


def export_run(
    run_dir: Path,
    to: str,
    output: Path | None = None,
    registry: Registry | None = None,
    *,
    classifier: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the newest checkpoint of a run for other code; returns the file.

    The plugin that brings the encoder brings the layouts too, as checkpoint formats named `METHOD_LAYOUT`; that of an
    objective may bring others for its runs. Beside the tensors stand the slots of the run, which `import_checkpoint`
    reads and other code does not see. The file appears whole or not at all; what a kill leaves is hidden, `.NAME.tmp`,
    and gone with the next export to the same file.

    Args:
        to: the layout, `timm` or `official`.
        output: file to write, `.safetensors` or `.pth`; by default `export/LAYOUT...` in the run directory.
        classifier: write the run's classifier too, which the layout `timm` has a place for.
        note: told in a line what is left out, and how timm loads a classifier.

    Raises:
        CheckpointError: if the plugin has no such layout, the layout cannot hold the model, or writing fails.
    """
    registry = registry or Registry()
    if not (run_dir / "recipe.yaml").is_file():
        raise CheckpointError(f"{run_dir} is no run directory: it has no recipe.yaml")
    recipe = load_written(run_dir / "recipe.yaml", registry)
    checkpoint_format = _format_of(
        registry.find("encoder", recipe.encoder.type), registry.find("objective", recipe.objective.type), to, registry
    )
    model = build_model(recipe, registry, with_weights=False)
    found = find_latest(run_dir / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint yet")
    load_tensors(model.objective, found.tensors("model"), found.path)
    try:
        exported = checkpoint_format.export_state(model.objective.state_dict())
        exported = _with_classifier(exported, model.objective, to, wanted=classifier, note=note)
    except ValueError as error:
        raise CheckpointError(f"{run_dir} cannot be written in layout '{to}': {error}") from error
    record = ExportRecord.of(model, checkpoint_format.name, found.step).data()
    output = output or run_dir / "export" / f"{to}{SUFFIX_OF.get(to, '.safetensors')}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output, in_folder=True) as temporary:
            if output.suffix == ".safetensors":
                tensors = {name: tensor.contiguous() for name, tensor in exported.items()}
                save_file(tensors, temporary, {"format": "pt", RECORD: json.dumps(record)})
            else:
                torch.save({"model": exported, RECORD: record}, temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {getattr(error, 'strerror', None) or error}") from error
    return output


def _with_classifier(
    exported: dict[str, Tensor], objective: Objective, to: str, *, wanted: bool, note: Callable[[str], None]
) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: if a classifier is wanted and there is none, or no place for it.
    """
    found = classifier_of(objective)
    if not wanted:
        if found is not None:
            note("the classifier of the run is left out; --to timm --classifier writes it too")
        return exported
    if found is None:
        raise ValueError("--classifier: the run has no head with decoder 'classifier'; leave the option out")
    if to != "timm":
        raise ValueError("--classifier: only the layout timm has a place for one; write --to timm")
    note(f"timm.create_model(NAME, checkpoint_path=FILE, {timm_options(found)}) loads it")
    return with_classifier(exported, found)


def _format_of(encoder: type, objective: type, to: str, registry: Registry) -> CheckpointFormat:
    package = encoder.__module__.partition(".")[0]
    known = registry.classes("checkpoint_format")
    own = {
        name.rpartition("_")[2]: cls
        for name, cls in known.items()
        if cls.__module__.partition(".")[0] == package and (not cls.encoders or encoder.name in cls.encoders)
    }
    own |= {name.rpartition("_")[2]: cls for name, cls in known.items() if objective.name in cls.objectives}
    if to not in own:
        layouts = f"only {', '.join(sorted(own))}" if own else "none"
        raise CheckpointError(f"no layout '{to}' for encoder '{encoder.name}'; its plugin has {layouts}")
    return own[to]()
