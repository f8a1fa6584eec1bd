"""What a finished run is worth: its encoder beside raw pixels and the encoder from which it started."""

from __future__ import annotations

from pathlib import Path

from mim_framework.assembly.builder import build_source
from mim_framework.assembly.opened import load_encoder
from mim_framework.base.errors import DataError
from mim_framework.evaluate.knn import KNNSection, knn_top1, online_knn, raw_pixels
from mim_framework.registry.registry import Registry


def evaluate_run(
    run_dir: Path,
    *,
    checkpoint: Path | None = None,
    registry: Registry | None = None,
    section: KNNSection | None = None,
) -> dict[str, float]:
    """kNN top-1 of `raw_pixels`, of the `untrained` encoder (same recipe and seed) and of the `trained` one.

    Args:
        checkpoint: by default the newest whole one of the run.
        section: by default the recipe's `evaluate.knn`.

    Raises:
        DataError: if the run's source has no labelled images.
        CheckpointError: if there is no whole checkpoint, or its model has no part named `encoder`.
    """
    registry = registry or Registry()
    run = load_encoder(run_dir, checkpoint=checkpoint, registry=registry)
    source = build_source(run.recipe, registry)
    sources = source.evaluation_sources()
    if sources is None:
        raise DataError(
            f"kNN needs labelled images to learn from and to test on; source '{source.name}' of {run_dir} has "
            "none. A folder has them with data.source.labels=true and data.source.eval_root=FOLDER"
        )
    section = section or run.recipe.evaluate.knn or KNNSection()
    workers = run.recipe.data.num_workers
    untrained = load_encoder(run_dir, trained=False, registry=registry).encoder
    return {
        "raw_pixels": knn_top1(raw_pixels(run.views), run.views, sources, section, run.device, workers=workers),
        "untrained": online_knn(untrained, run.views, sources, section, run.device, workers=workers),
        "trained": online_knn(run.encoder, run.views, sources, section, run.device, workers=workers),
    }
