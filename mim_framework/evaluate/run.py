"""What a finished run is worth: its encoder beside raw pixels and the encoder from which it started."""

from __future__ import annotations

from pathlib import Path

from mim_framework.build import load_run
from mim_framework.errors import DataError, MimError
from mim_framework.evaluate.knn import KNNSection, knn_top1, online_knn, raw_pixels
from mim_framework.plugins import Registry


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
        MimError: if the run's objective has no encoder.
        CheckpointError: if there is no whole checkpoint.
    """
    run = load_run(run_dir, checkpoint=checkpoint, registry=registry)
    if not hasattr(run.objective, "encoder"):
        raise MimError(
            f"{run_dir}: objective '{run.objective.name}' keeps no part named 'encoder' that kNN could judge"
        )
    sources = run.source.evaluation_sources()
    if sources is None:
        raise DataError(
            f"kNN needs labelled images to learn from and to test on; source '{run.source.name}' of {run_dir} has "
            "none. A folder has them with data.source.labels=true and data.source.eval_root=FOLDER"
        )
    section = section or run.recipe.evaluate.knn or KNNSection()
    workers = run.recipe.data.num_workers
    untrained = load_run(run_dir, trained=False, registry=registry).objective.encoder
    return {
        "raw_pixels": knn_top1(raw_pixels(run.views), run.views, sources, section, run.device, workers=workers),
        "untrained": online_knn(untrained, run.views, sources, section, run.device, workers=workers),
        "trained": online_knn(run.objective.encoder, run.views, sources, section, run.device, workers=workers),
    }
