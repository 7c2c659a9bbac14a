# SPDX-License-Identifier: Apache-2.0
"""What is known of each image, from the batches that Engine gives, the pool and the pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from anomalib_musc.output.pool_report import decision_of
from anomalib_musc.output.predictions import PoolReport, Prediction
from anomalib_musc.output.regions import Region, find_regions
from anomalib_musc.output.review.pictures import shrink_map
from anomalib_musc.output.visualizer import FolderVisualizer


def report_of(model: Any) -> PoolReport:
    """Return what a model tells of its pools; of one that has none, its decision."""
    if hasattr(model, "pool_report"):
        return model.pool_report()
    return PoolReport(decision=decision_of(getattr(model, "post_processor", None)))


def pictures_of(model: Any) -> tuple[dict[str, Path], dict[str, str]]:
    """Return where a model's visualizer has put the picture of each image, and why there is none."""
    visualizer = getattr(model, "visualizer", None)
    if isinstance(visualizer, FolderVisualizer):
        visualizer.wait()
    return getattr(visualizer, "pictures", {}), getattr(visualizer, "failures", {})


def joined(
    predictions: Sequence[Prediction],
    report: PoolReport,
    pictures: Mapping[str, Path],
    failures: Mapping[str, str],
) -> list[Prediction]:
    """Join what batches, pool and visualizer tell, see :func:`pictures_of`, from the most anomalous image on.

    With them come images of the pool that no batch has brought, where a run has failed.
    """
    seen = {prediction.path for prediction in predictions}
    not_reached = [
        replace(other, notes=[*other.notes, "the run ended before its regions were found"])
        for name, other in report.images.items()
        if name not in seen
    ]
    reached = [
        with_picture(_with_pool(prediction, report.images.get(prediction.path)), pictures, failures)
        for prediction in predictions
    ]
    return sorted([*reached, *not_reached], key=lambda prediction: prediction.order)


def with_picture(prediction: Prediction, pictures: Mapping[str, Path], failures: Mapping[str, str]) -> Prediction:
    """Add where an image's picture is, or why there is none, both by path."""
    failure = [failures[prediction.path]] if prediction.path in failures else []
    return replace(prediction, picture=pictures.get(prediction.path), notes=[*prediction.notes, *failure])


def _with_pool(prediction: Prediction, of_pool: Prediction | None) -> Prediction:
    """Add what the pool knows of an image; its label and regions are those of its batch."""
    if of_pool is None:
        return prediction
    return replace(
        of_pool,
        is_anomalous=prediction.is_anomalous,
        regions=prediction.regions,
        notes=[*of_pool.notes, *prediction.notes],
        size=prediction.size or of_pool.size,
    )


def original_size(item: Any) -> tuple[int, int]:
    """Return width and height of the image file, or of what came where there is none, as of a camera's frame."""
    if item.image_path is None or not Path(item.image_path).exists():
        return item.image.shape[-1], item.image.shape[-2]
    with Image.open(item.image_path) as image:
        return image.size


def prediction_of(item: Any, size: tuple[int, int] | None, notes: Sequence[str] = ()) -> Prediction:
    """Return what an item of a batch tells of its image, which is of this (width, height)."""
    grid = None
    if item.anomaly_map is not None:
        grid = shrink_map(item.anomaly_map.detach().float().cpu().squeeze()).numpy()
    regions: list[Region] = []
    if item.pred_mask is not None and size is not None:
        regions = find_regions(item.pred_mask.cpu().numpy().squeeze(), size)
    return Prediction(
        path=str(Path(item.image_path)) if item.image_path else "",
        score=None if item.pred_score is None else float(item.pred_score),
        is_anomalous=None if item.pred_label is None else bool(item.pred_label),
        size=size,
        regions=regions,
        notes=notes,
        anomaly_map=grid,
    )
